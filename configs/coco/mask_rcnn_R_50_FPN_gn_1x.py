"""GN everywhere, fine-tuned from FAIR's GN classifier (Wu & He 2018, section 4.2)."""

from gn_det.modeling import GNGeneralizedRCNN

from .mask_rcnn_R_50_FPN_frozenbn_1x import dataloader, lr_multiplier, model, optimizer, train

model._target_ = GNGeneralizedRCNN
model.backbone.bottom_up.stages.stride_in_1x1 = False  # as that classifier has it
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/R-50-GN"
