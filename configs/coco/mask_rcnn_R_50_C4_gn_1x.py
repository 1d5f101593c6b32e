from gn_det.modeling import GNGeneralizedRCNN

from .mask_rcnn_R_50_C4_frozenbn_1x import dataloader, lr_multiplier, model, optimizer, train

model._target_ = GNGeneralizedRCNN
model.backbone.stages.stride_in_1x1 = False
model.roi_heads.res5.stride_in_1x1 = False
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/R-50-GN"
