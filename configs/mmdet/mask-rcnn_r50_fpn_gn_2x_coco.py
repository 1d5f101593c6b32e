"""mmdetection's Mask R-CNN with FusedGN in backbone, FPN and heads: mim run mmdet train this.py."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_2x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["gn_det.mmcv_plugin"], allow_failed_imports=False)

norm_cfg = dict(type="FusedGN", num_groups=32, requires_grad=True)
model = dict(
    # Detectron's R-50-GN: BGR, deviation 1.
    data_preprocessor=dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(
        norm_cfg=norm_cfg,
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron/resnet50_gn"),
    ),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
# The paper calls it important for COCO.
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
