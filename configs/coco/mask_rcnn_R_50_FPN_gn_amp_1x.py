"""GN everywhere in mixed precision and channels_last order."""

from .mask_rcnn_R_50_FPN_gn_1x import dataloader, lr_multiplier, model, optimizer, train

train.amp.enabled = True
train.channels_last = True
