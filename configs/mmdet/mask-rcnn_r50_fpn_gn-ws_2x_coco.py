"""gn, with Weight Standardization before each GN, and the weights that were trained so."""

_base_ = "mask-rcnn_r50_fpn_gn_2x_coco.py"

conv_cfg = dict(type="ConvWS")
model = dict(
    # Of these weights: RGB, ImageNet's deviations.
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        conv_cfg=conv_cfg,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://jhu/resnet50_gn_ws"),
    ),
    neck=dict(conv_cfg=conv_cfg),
    roi_head=dict(bbox_head=dict(conv_cfg=conv_cfg), mask_head=dict(conv_cfg=conv_cfg)),
)
