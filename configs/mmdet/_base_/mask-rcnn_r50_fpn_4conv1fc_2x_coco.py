"""What the configs share: mmdetection's Mask R-CNN with the paper's box head, 2 images a GPU."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_2x.py",
    "mmdet::_base_/default_runtime.py",
]

model = dict(
    # Of Detectron's and Detectron2's weights: BGR, deviation 1.
    data_preprocessor=dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256)),
)
# The paper calls it important for COCO that γ and β do not decay.
optim_wrapper = dict(
    type="AmpOptimWrapper", loss_scale="dynamic", paramwise_cfg=dict(norm_decay_mult=0.0)
)
# The learning rate is that of 16 images per step, and follows from the images of this run.
auto_scale_lr = dict(enable=True, base_batch_size=16)
# So does the warm-up: the images of mmdetection's 500 steps of 16, as a part of an epoch.
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=0.001,
        by_epoch=True,
        begin=0,
        end=500 * 16 / 117266,
        convert_to_iter_based=True,
    ),
    dict(type="MultiStepLR", begin=0, end=24, by_epoch=True, milestones=[16, 22], gamma=0.1),
]
train_dataloader = dict(batch_size=2)
