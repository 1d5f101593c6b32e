"""BN frozen in the backbone, GN in FPN and heads, fused."""

_base_ = "mask-rcnn_r50_fpn_frozenbn_2x_coco.py"
custom_imports = dict(imports=["gn_det.mmcv_plugin"], allow_failed_imports=False)

norm_cfg = dict(type="GN", num_groups=32, requires_grad=True)
model = dict(
    type="InjectGN",
    model="MaskRCNN",
    sites="GN",
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
