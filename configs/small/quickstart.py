"""quickstart.yaml as a LazyConfig, without its clipping: the generated shapes, 2 images a step."""

from detectron2 import model_zoo
from detectron2.config import LazyCall
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from gn_det.layers import FusedGroupNorm

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

# ResNet-18-FPN, 64 wide, GN everywhere.
backbone = model.backbone
backbone.out_channels = 64
backbone.norm = FusedGroupNorm
backbone.bottom_up.stem.norm = FusedGroupNorm
backbone.bottom_up.stages.depth = 18
backbone.bottom_up.stages.norm = FusedGroupNorm
del backbone.bottom_up.stages.stride_in_1x1  # bottleneck blocks only

rpn = model.proposal_generator
rpn.head.in_channels = 64
rpn.anchor_generator.sizes = [[16], [32], [64], [96], [128]]
rpn.pre_nms_topk = (500, 500)
rpn.post_nms_topk = (300, 300)

heads = model.roi_heads
heads.batch_size_per_image = 128
heads.box_head = LazyCall(FastRCNNConvFCHead)(
    input_shape=dict(_target_="detectron2.layers.ShapeSpec", channels=64, height=7, width=7),
    conv_dims=[64, 64],
    conv_norm=FusedGroupNorm,
    fc_dims=[256],
)
heads.box_predictor.input_shape.channels = 256
heads.mask_head.input_shape.channels = 64
heads.mask_head.conv_dims = [64, 64, 64]
heads.mask_head.conv_norm = FusedGroupNorm
model.pixel_std = [57.375, 57.12, 58.395]  # from scratch, inputs of unit variance

dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 2
dataloader.train.mapper.augmentations[0].update(short_edge_length=(128,), max_size=192)
dataloader.test.num_workers = 2
dataloader.test.mapper.augmentations[0].update(short_edge_length=128, max_size=192)
dataloader.evaluator.output_dir = "${train.output_dir}/inference"

optimizer.lr = 0.04
lr_multiplier = LazyCall(WarmupParamScheduler)(
    scheduler=LazyCall(CosineParamScheduler)(start_value=1, end_value=0),
    warmup_length=100 / 720,
    warmup_method="linear",
    warmup_factor=0.001,
)

train.update(
    output_dir="output/quickstart_lazy",
    device="auto",
    max_iter=720,
    eval_period=240,
    seed=0,
    checkpointer=dict(period=240, max_to_keep=100),
)
