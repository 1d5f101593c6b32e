from .common import schedule
from .mask_rcnn_R_101_FPN_gn_2x import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = schedule(3)
