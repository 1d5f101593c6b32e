"""GN in backbone, FPN and heads, fused: mim run mmdet train this.py."""

_base_ = "_base_/mask-rcnn_r50_fpn_4conv1fc_2x_coco.py"
custom_imports = dict(imports=["gn_det.mmcv_plugin"], allow_failed_imports=False)

norm_cfg = dict(type="GN", num_groups=32, requires_grad=True)
model = dict(
    type="InjectGN",
    model="MaskRCNN",
    sites="GN",
    backbone=dict(
        norm_cfg=norm_cfg,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron/resnet50_gn"),
    ),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
