"""Values that cannot work are refused when a config is read, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import zoo
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import load_config, load_lazy_config
from gn_det.config.combinations import check_complete_config
from gn_det.config.constraints import _RULES

# KEY, VALUE, and what the error says of it.
WRONG = [
    ("OUTPUT_DIR", "", "OUTPUT_DIR is '', and has to be not empty"),
    ("OUTPUT_DIR", "s3://bucket/run", "has to be a folder of this machine"),
    ("SEED", "4294967296", "from -1 to 2147483647"),
    ("SEED", "-2", "from -1"),
    ("SOLVER.CHECKPOINT_PERIOD", "0", "CHECKPOINT_PERIOD is 0, and has to be at least 1"),
    ("SOLVER.BASE_LR", "-0.1", "above 0"),
    ("SOLVER.BASE_LR", "1e999", "above 0"),
    ("SOLVER.MAX_ITER", "0", "a whole number from 1 to 2147483647"),
    ("SOLVER.MAX_ITER", "1000000000000000000000", "a whole number from 1 to 2147483647"),
    ("DATALOADER.NUM_WORKERS", "100000", "a whole number from 0 to 256"),
    ("MODEL.RPN.LOSS_WEIGHT", "-1.0", "at least 0"),
    ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "-1.0", "at least 0"),
    ("INPUT.MAX_SIZE_TRAIN", "4", "below MIN_SIZE_TRAIN"),
    ("INPUT.MAX_SIZE_TEST", "4", "below MIN_SIZE_TEST"),
    ("TEST.AUG.MAX_SIZE", "0", "at least 1"),
    ("TEST.EXPECTED_RESULTS", "[1]", r"\[task, metric, value, tolerance\]"),
    ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', '5', 1]]", r"\[task, metric, value, tolerance\]"),
    ("SOLVER.STEPS", "(200, 100)", "increasing order"),
    ("SOLVER.MOMENTUM", "1.5", "from 0 to 1"),
    ("SOLVER.WARMUP_METHOD", "lineer", "did you mean linear"),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosine", "did you mean WarmupCosineLR"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "Norm", "did you mean norm"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.0", "above 0"),
    ("SOLVER.ACCUMULATE_STEPS", "0", "at least 1"),
    ("SOLVER.BACKBONE_MULTIPLIER", "0.0", "above 0"),
    ("SOLVER.STEPS", "(1, 'a')", "increasing order"),
    ("TEST.DETECTIONS_PER_IMAGE", "0", "at least 1"),
    ("DATALOADER.NUM_WORKERS", "-1", "from 0 to 256"),
    ("DATALOADER.SAMPLER_TRAIN", "RandomSampler", "one of TrainingSampler"),
    ("INPUT.FORMAT", "RGBA", "did you mean RGB"),
    ("INPUT.MASK_FORMAT", "rle", "one of polygon, bitmask"),
    ("INPUT.MIN_SIZE_TRAIN", "()", "a list of at least 1"),
    ("INPUT.MIN_SIZE_TRAIN", "(0,)", "each is at least 1"),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "is no range"),
    ("INPUT.CROP.ENABLED", "True", "needs the package shapely"),
    ("MODEL.DEVICE", "mps", "MODEL.DEVICE is 'mps', and has to be cpu, cuda or cuda:N"),
    ("MODEL.DEVICE", "gpu", "cpu, cuda or cuda:N"),
    ("MODEL.META_ARCHITECTURE", "GNGeneralisedRCNN", "did you mean GNGeneralizedRCNN"),
    ("MODEL.BACKBONE.NAME", "build_gn_resnet_fpn", "did you mean build_gn_resnet_fpn_backbone"),
    ("MODEL.BACKBONE.FREEZE_AT", "7", "from 0 to 5"),
    ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvHead", "did you mean .*FastRCNNConvFCHead"),
    ("MODEL.RESNETS.DEPTH", "20", "one of 18, 34, 50, 101, 152"),
    ("MODEL.RESNETS.NORM", "GroupNorm", "did you mean GN"),
    ("MODEL.RESNETS.NORM", "gn", "did you mean GN"),
    ("MODEL.FPN.NORM", "syncbn", "did you mean SyncBN"),
    ("MODEL.ROI_MASK_HEAD.NORM", "BatchNorm2d", "did you mean BN"),
    ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]", "each is above 0"),
    ("MODEL.PIXEL_MEAN", "[1.0]", "different numbers of channels"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]", "has 2 lists, and .* 5 levels"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", "[[]]", "each is a list of at least 1"),
    ("MODEL.ROI_HEADS.NUM_CLASSES", "0", "at least 1"),
    ("MODEL.GN.NUM_GROUPS", "0", "at least 1"),
    ("SOLVER.STEPS", "(-3,)", "each is at least 0"),
    ("SOLVER.REFERENCE_WORLD_SIZE", "-1", "at least 0"),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "0.0", "above 0"),
    ("TEST.EVAL_PERIOD", "-5", "at least 0"),
    ("TEST.EXPECTED_RESULTS", "['x']", r"\[task, metric, value, tolerance\]"),
    ("TEST.AUG.MIN_SIZES", "()", "a list of at least 1"),
    ("DATALOADER.REPEAT_THRESHOLD", "-1.0", "at least 0"),
    ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "l1", "one of smooth_l1"),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "l2", "one of smooth_l1"),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(0.0, 1.0, 1.0, 1.0)", "each is above 0"),
    ("MODEL.ROI_MASK_HEAD.CONV_DIM", "0", "at least 1"),
    ("MODEL.RPN.CONV_DIMS", "[0]", "each is at least 1"),
    ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]", "in increasing order"),
    ("MODEL.RPN.IOU_LABELS", "[0, 1]", "one label more"),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.5, 0.7]", "one label more"),
    ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "5.0", "from 0 to 1"),
    ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator", "go together"),
    ("MODEL.GN.SITES", "[]", "a list of at least 1"),
    ("SOLVER.STEPS", "None", "SOLVER.STEPS is null; leave it out"),
    ("MODEL.RESNETS.DEPTH", "None", "DEPTH is null"),
    ("MODEL.KEYPOINT_ON", "None", "KEYPOINT_ON is null"),
]
CONFIG = ROOT / "configs/small/quickstart.yaml"


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_value_that_cannot_work_is_refused_with_what_can(
    key: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=message) as raised:
        check_complete_config(load_config(CONFIG, [key, value]))
    assert key.rsplit(".", 1)[0] in str(raised.value) and "\n" not in str(raised.value)


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"SEED is -5.*; .*CHECKPOINT_PERIOD is 0"):
        load_config(CONFIG, ["SEED", "-5", "SOLVER.CHECKPOINT_PERIOD", "0"])


LAZY = [
    ("train.max_iter=0", "a whole number from 1"),
    ("train.max_iter=1.5", "a whole number from 1"),
    ("dataloader.train.num_workers=257", "a whole number from 0 to 256"),
    ("train.device=mps", "cpu, cuda or cuda:N"),
    ("train.output_dir=''", "not empty"),
    ("train.checkpointer.period=0", "at least 1"),
    ("optimizer.lr=-1", "above 0"),
    ("dataloader.train.total_batch_size=0", "at least 1"),
    ("dataloader.train.mapper.image_format=RGBA", "did you mean RGB"),
]


@pytest.mark.parametrize(("override", "message"), LAZY)
def test_lazy_configs_are_checked_alike(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_lazy_config(ROOT / "configs/small/quickstart.py", [override])


def test_every_rule_is_for_a_key_that_exists() -> None:
    cfg = load_config(None)
    for key in _RULES:
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize(
    "file", sorted(zoo.CONFIGS.rglob("*.yaml")), ids=lambda f: f.relative_to(zoo.CONFIGS).as_posix()
)
def test_every_config_of_detectron2_passes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # shapely, for one
    cfg = load_config(file)
    if not file.name.startswith("Base"):
        check_complete_config(cfg)
