"""Three box heads, each with GN."""

from detectron2 import model_zoo

from .mask_rcnn_R_50_FPN_gn_1x import dataloader, lr_multiplier, model, optimizer, train

_cascade = model_zoo.get_config("common/models/cascade_rcnn.py").model.roi_heads
_cascade.box_heads = [model.roi_heads.box_head] * 3
model.roi_heads = _cascade
model.proposal_generator.post_nms_topk = (2000, 1000)
