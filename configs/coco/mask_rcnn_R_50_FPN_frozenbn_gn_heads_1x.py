"""GN in FPN and heads above a frozen BN body: most of GN, with ordinary weights."""

from gn_det.modeling import GNGeneralizedRCNN

from .mask_rcnn_R_50_FPN_frozenbn_1x import dataloader, lr_multiplier, model, optimizer, train

model.update(_target_=GNGeneralizedRCNN, sites=["fpn", "box_head", "mask_head"])
