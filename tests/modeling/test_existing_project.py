"""The lines that an existing Detectron2 project adds, with Detectron2's own trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

import gn_det

THEIRS = """
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  DEVICE: "cpu"
  WEIGHTS: ""
  MASK_ON: True
  PIXEL_STD: [57.375, 57.12, 58.395]
  BACKBONE: {NAME: "build_resnet_fpn_backbone", FREEZE_AT: 0}
  RESNETS: {DEPTH: 50, OUT_FEATURES: ["res2", "res3", "res4", "res5"]}
  FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"]}
  ROI_HEADS:
    NAME: "StandardROIHeads"
    IN_FEATURES: ["p2", "p3", "p4", "p5"]
    BATCH_SIZE_PER_IMAGE: 16
    NUM_CLASSES: 3
  ROI_BOX_HEAD: {NAME: "FastRCNNConvFCHead", NUM_FC: 2, POOLER_RESOLUTION: 7}
  ROI_MASK_HEAD: {NAME: "MaskRCNNConvUpsampleHead", NUM_CONV: 4, POOLER_RESOLUTION: 14}
DATASETS: {TRAIN: ["theirs_train"], TEST: []}
INPUT: {MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: 2, CHECKPOINT_PERIOD: 2}
DATALOADER: {NUM_WORKERS: 0}
VERSION: 2
"""


@pytest.fixture
def cfg(shapes: Path, tmp_path: Path) -> CfgNode:
    register_coco_instances("theirs_train", {}, str(shapes / "train.json"), str(shapes / "images"))
    (tmp_path / "theirs.yaml").write_text(THEIRS)

    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.merge_from_file(str(tmp_path / "theirs.yaml"))
    cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_fpn_backbone"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "GNFastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 4, 1
    cfg.MODEL.ROI_MASK_HEAD.NAME = "GNMaskRCNNConvUpsampleHead"

    cfg.OUTPUT_DIR = str(tmp_path / "output")
    yield cfg
    DatasetCatalog.remove("theirs_train")
    MetadataCatalog.remove("theirs_train")


@pytest.mark.slow
def test_trains_checkpoints_and_reloads_with_the_same_outputs(cfg: CfgNode) -> None:
    trainer = DefaultTrainer(cfg)
    assert sum(isinstance(m, gn_det.FusedGroupNorm) for m in trainer.model.modules()) == 69
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.resume_or_load(resume=False)
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert "backbone.bottom_up.stem.conv1.norm.weight" in moved
    assert "roi_heads.mask_head.mask_fcn1.norm.bias" in moved

    reloaded = build_model(cfg)
    DetectionCheckpointer(reloaded).load(f"{cfg.OUTPUT_DIR}/model_final.pth")
    image = {"image": torch.randint(0, 255, (3, 96, 128)).float()}
    expected, actual = (
        model.eval()([image])[0]["instances"] for model in (trainer.model, reloaded)
    )
    assert len(expected) > 0
    assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.pred_masks, expected.pred_masks)
