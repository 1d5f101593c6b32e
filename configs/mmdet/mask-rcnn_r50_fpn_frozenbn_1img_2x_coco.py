"""frozenbn with 1 image a GPU; the learning rate and the warm-up follow."""

_base_ = "mask-rcnn_r50_fpn_frozenbn_2x_coco.py"

train_dataloader = dict(batch_size=1)
