"""GN everywhere from scratch: nothing may be frozen, and pixels get unit variance."""

from .mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

model.pixel_std = [57.375, 57.12, 58.395]
model.backbone.bottom_up.freeze_at = 0
train.init_checkpoint = ""
