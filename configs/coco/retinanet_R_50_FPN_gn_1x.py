"""RetinaNet with GN in body, FPN and towers, P6 and P7 as they are."""

from detectron2 import model_zoo

from gn_det.modeling import GNRetinaNet

from .common import dataloader, lr_multiplier, optimizer, train

model = model_zoo.get_config("common/models/retinanet.py").model
model._target_ = GNRetinaNet
model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.stages.stride_in_1x1 = False
train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/R-50-GN"
dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
