from .common import schedule
from .mask_rcnn_R_50_FPN_gn_1x import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = schedule(3)
