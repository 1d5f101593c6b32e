"""Frozen BN, and the heads of the GN models without a norm: the control for GN."""

from detectron2 import model_zoo

from .common import dataloader, lr_multiplier, optimizer, train

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.freeze_at = 2
model.roi_heads.box_head.update(conv_dims=[256] * 4, fc_dims=[1024])
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
