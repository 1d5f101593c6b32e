"""quickstart.yaml as a LazyConfig. Gradients are not clipped: LazyConfigs have no key for that."""

from detectron2 import model_zoo
from detectron2.config import LazyCall
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from gn_det.modeling import GNGeneralizedRCNN

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

# ResNet-18-FPN, 64 wide, with GN everywhere.
model._target_ = GNGeneralizedRCNN
model.pixel_std = [57.375, 57.12, 58.395]  # from scratch, inputs of unit variance
model.backbone.out_channels = 64
_stages = model.backbone.bottom_up.stages
_stages.depth = 18
del _stages.stride_in_1x1  # bottleneck blocks only

_rpn = model.proposal_generator
_rpn.head.in_channels = 64
_rpn.anchor_generator.sizes = [[16], [32], [64], [96], [128]]
_rpn.pre_nms_topk = (500, 500)
_rpn.post_nms_topk = (300, 300)

_heads = model.roi_heads
_heads.batch_size_per_image = 128
_heads.box_head.input_shape.channels = 64
_heads.box_head.update(conv_dims=[64, 64], fc_dims=[256])
_heads.box_predictor.input_shape.channels = 256
_heads.mask_head.input_shape.channels = 64
_heads.mask_head.conv_dims = [64, 64, 64]  # the last is the deconvolution's

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
    checkpointer=dict(period=240, max_to_keep=None),
    ims_per_gpu=0,  # the numbers above as they stand
    accumulate_steps=1,
    channels_last=False,
    compile_backbone=False,
)
