"""GN with Weight Standardization (Qiao et al. 2019) before every GN, from scratch."""

from .scratch_mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

model.weight_standardization = True
