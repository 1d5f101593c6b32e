"""The control of gn: BN frozen in the backbone, no norm in FPN and heads."""

_base_ = "_base_/mask-rcnn_r50_fpn_4conv1fc_2x_coco.py"

model = dict(
    backbone=dict(
        norm_cfg=dict(requires_grad=False),
        norm_eval=True,
        style="caffe",
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://detectron2/resnet50_caffe"),
    ),
)
