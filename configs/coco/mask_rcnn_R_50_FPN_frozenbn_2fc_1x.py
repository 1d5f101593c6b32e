"""Frozen BN with the box head of two fully connected layers: Detectron2's default model."""

from .mask_rcnn_R_50_FPN_frozenbn_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_head.update(conv_dims=[], fc_dims=[1024, 1024])
