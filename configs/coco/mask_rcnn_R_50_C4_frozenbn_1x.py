"""Heads on res4, with res5 for each region: no FPN."""

from detectron2 import model_zoo

from .mask_rcnn_R_50_FPN_frozenbn_1x import dataloader, lr_multiplier, optimizer, train

model = model_zoo.get_config("common/models/mask_rcnn_c4.py").model
model.backbone.freeze_at = 2
