from .common import schedule
from .scratch_mask_rcnn_R_50_FPN_gn_3x import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = schedule(6)
