"""The COCO recipes: what each builds, its schedule, and the page that lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.solver import build_lr_scheduler, build_optimizer
from omegaconf import DictConfig, ListConfig, OmegaConf
from support.programs import ROOT
from torch import nn

from gn_det import audit
from gn_det.config import load_config, load_lazy_config
from gn_det.engine.schedule import resolve_schedule

FOLDER = ROOT / "configs" / "coco"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("Base"))
PAGE = (ROOT / "configs" / "README.md").read_text()

# Backbone, FPN, box head, mask head, RetinaNet's towers.
R50, FPN, BOX, MASK, TOWERS = 53, 8, 4, 4, 8
R101 = R50 + 3 * 17


def config(name: str) -> CfgNode:
    return load_config(FOLDER / f"{name}.yaml", ["MODEL.DEVICE", "meta"])


def lazy_config(name: str) -> DictConfig:
    return load_lazy_config(FOLDER / f"{name}.py")


def num_norms(name: str) -> int:
    """The GN layers that the name promises."""
    body = R101 if "R_101" in name else R50
    if "frozenbn" in name:
        return FPN + BOX + MASK if "gn_heads" in name else 0
    if name.startswith("retinanet"):
        return body + 6 + TOWERS
    if "C4" in name:
        return body
    return body + FPN + (3 * BOX if name.startswith("cascade") else BOX) + MASK


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_the_norms_that_its_name_says(name: str) -> None:
    with torch.device("meta"):
        found = audit(build_model(config(name)))
    assert found.num_norms == num_norms(name)
    assert all(row.form.startswith("WS+") == ("_ws_" in name) for row in found.rows)
    without_convolutions = any("NUM_CONV" in left.reason for left in found.left_alone)
    assert without_convolutions == ("2fc" in name or "C4" in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_schedule_that_its_name_says(name: str) -> None:
    cfg = config(name)
    times = int(re.search(r"_(\d)x$", name).group(1))
    assert cfg.SOLVER.MAX_ITER == times * 90_000
    # As Detectron2 has it: the last 60k and 20k of long schedules, 2/3 and 8/9 of 1x and 2x.
    last = cfg.SOLVER.MAX_ITER
    expected = (last - 60_000, last - 20_000) if times > 1 else (60_000, 80_000)
    assert cfg.SOLVER.STEPS == expected
    assert cfg.SOLVER.IMS_PER_BATCH == 16 and cfg.SOLVER.IMS_PER_GPU == 2
    assert cfg.SOLVER.BASE_LR == (0.01 if "retinanet" in name else 0.02)
    assert cfg.SOLVER.WEIGHT_DECAY_NORM == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_starts_from_the_weights_of_its_norm(name: str) -> None:
    cfg = config(name)
    depth = re.search(r"R_(\d+)", name).group(1)
    if name.startswith("scratch"):
        assert cfg.MODEL.WEIGHTS == "" and cfg.MODEL.BACKBONE.FREEZE_AT == 0
        assert min(cfg.MODEL.PIXEL_STD) > 57
    elif "frozenbn" in name:
        assert cfg.MODEL.WEIGHTS.endswith(f"MSRA/R-{depth}.pkl")
        assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    else:
        assert cfg.MODEL.WEIGHTS.endswith(f"FAIR/R-{depth}-GN")
        assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]


def test_frozen_bn_and_gn_differ_in_the_norm_alone() -> None:
    control, gn = config("mask_rcnn_R_50_FPN_frozenbn_2x"), config("mask_rcnn_R_50_FPN_gn_2x")
    # The classifier, and where it has its stride.
    gn.MODEL.META_ARCHITECTURE = control.MODEL.META_ARCHITECTURE
    gn.MODEL.WEIGHTS = control.MODEL.WEIGHTS
    gn.MODEL.RESNETS.STRIDE_IN_1X1 = control.MODEL.RESNETS.STRIDE_IN_1X1
    assert gn == control


def plain(value: Any) -> Any:
    """What an object holds, in built-in types that compare."""
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, nn.Module):  # compared on its own
        return type(value).__name__
    if hasattr(value, "__qualname__"):
        return value.__qualname__
    if isinstance(value, torch.Tensor):
        return value.shape
    return (type(value).__name__, plain(vars(value))) if hasattr(value, "__dict__") else value


def settings(model: nn.Module) -> dict[str, Any]:
    """Class and attributes of every module: all hyperparameters but those of initialisation."""
    found = {}
    for name, module in model.named_modules():
        held = {key: plain(value) for key, value in vars(module).items()}
        for key in vars(nn.Module()):
            held.pop(key, None)
        held.pop("sites", None)  # ["default"] and "default" are the same; the audits tell
        if isinstance(held.get("loss_weight"), dict):  # losses that are not named weigh 1
            held["loss_weight"] = {k: v for k, v in held["loss_weight"].items() if v != 1}
        found[name] = (type(module).__name__, held)
    return found


def parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple]:
    """Of every parameter that the optimizer changes: its learning rate, decay and momentum."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    keys = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
    return {
        names[parameter]: tuple(group[key] for key in keys)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_every_recipe_is_there_as_yaml_and_as_lazy_config() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*NAMES, "common"])


@pytest.mark.parametrize("name", NAMES)
def test_the_twins_of_a_recipe_are_one_model_and_one_optimizer(name: str) -> None:
    cfg, lazy = config(name), lazy_config(name)
    with torch.device("meta"):
        model, twin = build_model(cfg), instantiate(lazy.model)
    assert settings(twin) == settings(model)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in twin.state_dict().items()} == shapes
    assert audit(twin) == audit(model)

    lazy.optimizer.params.model = twin
    expected = parameters(model, build_optimizer(cfg, model))
    assert parameters(twin, instantiate(lazy.optimizer)) == expected
    # What is left out is frozen.
    assert (len(expected) == len([*model.parameters()])) == name.startswith("scratch")
    norms = {module for row in audit(model).rows for module in row.modules if row.trainable}
    for parameter, (_, decay, *_) in expected.items():
        assert decay == (0 if parameter.rpartition(".")[0] in norms else 1e-4), parameter


@pytest.mark.parametrize("name", NAMES)
def test_the_twins_of_a_recipe_see_the_same_pixels_and_anchors(name: str) -> None:
    cfg, lazy = config(name), lazy_config(name)
    assert lazy.model.pixel_mean == cfg.MODEL.PIXEL_MEAN
    assert lazy.model.pixel_std == cfg.MODEL.PIXEL_STD
    assert lazy.model.input_format == cfg.INPUT.FORMAT

    generator = lazy.model.get("proposal_generator", lazy.model).anchor_generator
    with torch.device("meta"):
        shapes = build_model(cfg).backbone.output_shape()
    retinanet = name.startswith("retinanet")
    levels = cfg.MODEL.RETINANET.IN_FEATURES if retinanet else cfg.MODEL.RPN.IN_FEATURES
    features = [torch.empty(1, 1, 2, 3) for _ in levels]
    anchors = build_anchor_generator(cfg, [shapes[level] for level in levels])(features)
    for boxes, expected in zip(instantiate(generator)(features), anchors, strict=True):
        torch.testing.assert_close(boxes.tensor, expected.tensor, rtol=1e-5, atol=1e-3)
    if retinanet:
        assert lazy.model.head.prior_prob == cfg.MODEL.RETINANET.PRIOR_PROB


@pytest.mark.parametrize("name", NAMES)
def test_the_twins_of_a_recipe_have_one_schedule(name: str) -> None:
    cfg, lazy = config(name), lazy_config(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=cfg.SOLVER.BASE_LR)
    expected = build_lr_scheduler(cfg, optimizer)._multiplier
    found = instantiate(lazy.lr_multiplier)
    last = cfg.SOLVER.MAX_ITER
    around = [step + k for step in (1000, *cfg.SOLVER.STEPS) for k in range(-2, 3)]
    for iteration in [*range(0, 1000, 50), *around, *range(0, last, last // 50), last - 1]:
        where = iteration / last
        assert found(where) == pytest.approx(expected(where), rel=1e-9), iteration

    assert dict(lazy.train.checkpointer) == {
        "period": cfg.SOLVER.CHECKPOINT_PERIOD,
        "max_to_keep": None,  # all, as Detectron2's trainer
    }
    assert lazy.train.max_iter == last and lazy.train.eval_period == cfg.TEST.EVAL_PERIOD
    assert lazy.train.ims_per_gpu == cfg.SOLVER.IMS_PER_GPU == 2
    assert lazy.train.accumulate_steps == cfg.SOLVER.ACCUMULATE_STEPS
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.train.amp.enabled == cfg.SOLVER.AMP.ENABLED
    assert lazy.train.channels_last == cfg.MODEL.CHANNELS_LAST
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.train.output_dir == cfg.OUTPUT_DIR
    assert lazy.train.get("seed", -1) == cfg.SEED


@pytest.mark.parametrize("name", NAMES)
def test_the_twins_of_a_recipe_read_the_same_data(name: str) -> None:
    cfg, lazy = config(name), lazy_config(name)
    train, test = lazy.dataloader.train, lazy.dataloader.test
    assert (train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (test.dataset.names,) == cfg.DATASETS.TEST
    assert train.num_workers == test.num_workers == cfg.DATALOADER.NUM_WORKERS
    mapper, plain_mapper = instantiate(train.mapper), DatasetMapper(cfg, is_train=True)
    assert plain(mapper) == plain(plain_mapper)
    assert mapper.augmentations.augs[0].short_edge_length == (640, 672, 704, 736, 768, 800)
    test.mapper.augmentations[0].sample_style = "choice"  # of one size, as a range of it
    # Masks are read in training alone.
    assert plain(instantiate(test.mapper)) == plain(
        DatasetMapper(cfg, is_train=False, use_instance_mask=False)
    )
    evaluator = lazy.dataloader.evaluator
    assert evaluator.dataset_name == test.dataset.names
    assert evaluator.output_dir == f"{cfg.OUTPUT_DIR}/inference"
    assert "max_dets_per_image" not in evaluator and cfg.TEST.DETECTIONS_PER_IMAGE == 100


def rows() -> Iterator[list[str]]:
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"`\w+`", cells[0]):
            yield cells


def test_the_page_lists_every_recipe_once_and_no_number_of_ours() -> None:
    listed = [cells[0].strip("`") for cells in rows()]
    assert sorted(listed) == NAMES
    assert all(not ours for *_, ours in rows())


def test_every_published_number_of_the_page_has_its_source() -> None:
    for name, _, published, _ in rows():
        numbers = re.findall(r"\d\d\.\d/\d\d\.\d", published)
        assert len(re.findall(r"\d\d\.\d/\d\d\.\d \[[1-5]\]", published)) == len(numbers), name
    assert all(f"[{source}] " in PAGE.split("Sources:")[1] for source in range(1, 6))


def test_the_pages_schedules_are_the_resolved_ones() -> None:
    found = re.findall(
        r"^\| ([\d ×machines]+) \| (\d+) \| ([\d.]+) \| (\d+) \| (\d+) \|", PAGE, re.M
    )
    assert len(found) == 5
    for name, images, lr, warmup, iterations in found:
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        cfg = config("mask_rcnn_R_50_FPN_gn_1x")
        cfg.SOLVER.IMS_PER_GPU = numbers[-1]
        world_size = numbers[0] * (numbers[1] if len(numbers) == 3 else 1)
        solver = resolve_schedule(cfg, world_size).SOLVER
        assert solver.IMS_PER_BATCH == int(images)
        assert solver.BASE_LR == pytest.approx(float(lr))
        assert (solver.WARMUP_ITERS, solver.MAX_ITER) == (int(warmup), int(iterations))
