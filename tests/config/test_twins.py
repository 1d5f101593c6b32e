"""A config that ships as YAML and as LazyConfig is one model, trained in one way."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig, OmegaConf
from support import zoo
from support.programs import ROOT
from torch import Tensor, nn

from gn_det import audit
from gn_det.config import load_config, load_lazy_config

CONFIGS = ROOT / "configs"
TWINS = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if path.with_suffix(".py").exists()
)
# Of each kind of model one, for `make test`.
FAMILIES = {
    "coco/cascade_mask_rcnn_R_50_FPN_gn_1x",
    "coco/mask_rcnn_R_50_C4_gn_1x",
    "coco/mask_rcnn_R_50_FPN_gn_1x",
    "coco/retinanet_R_50_FPN_gn_1x",
    "small/quickstart",
}


of_each_family = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAMILIES else pytest.mark.slow) for n in TWINS]
)


@functools.cache
def loaded(name: str) -> CfgNode:
    return load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "meta"])


def config(name: str) -> CfgNode:
    return loaded(name).clone()


def lazy_config(name: str) -> DictConfig:
    return load_lazy_config(CONFIGS / f"{name}.py")


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
    if isinstance(value, Tensor):
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


def first_losses(model: nn.Module) -> dict[str, Tensor]:
    """Of the first step on a picture of the zoo; what is sampled is the same each time."""
    torch.manual_seed(0)
    with EventStorage():
        return model.train()(zoo.pictures())


def test_every_recipe_and_the_quickstart_have_a_twin() -> None:
    recipes = {f"coco/{path.stem}" for path in (CONFIGS / "coco").glob("*_R_*")}
    assert set(TWINS) == {"small/quickstart", *recipes}
    lazy = {path.relative_to(CONFIGS) for path in CONFIGS.glob("[cs]*/*.py")}
    assert {path.with_suffix("").as_posix() for path in lazy} == {"coco/common", *TWINS}


@of_each_family
def test_twins_are_one_model_and_one_optimizer(name: str) -> None:
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
    assert (len(expected) == len([*model.parameters()])) == (cfg.MODEL.BACKBONE.FREEZE_AT == 0)
    norms = {module for row in audit(model).rows for module in row.modules if row.trainable}
    for parameter, (_, decay, *_) in expected.items():
        assert decay == (0 if parameter.rpartition(".")[0] in norms else 1e-4), parameter


@of_each_family
def test_twins_have_equal_first_losses(name: str) -> None:
    cfg, lazy = config(name), lazy_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8  # few regions, to save time
    if "roi_heads" in lazy.model:
        lazy.model.roi_heads.batch_size_per_image = 8
    model, twin = build_model(cfg), instantiate(lazy.model)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(first_losses(twin), first_losses(model))


@pytest.mark.parametrize("name", TWINS)
def test_twins_see_the_same_pixels_and_anchors(name: str) -> None:
    cfg, lazy = config(name), lazy_config(name)
    assert lazy.model.pixel_mean == cfg.MODEL.PIXEL_MEAN
    assert lazy.model.pixel_std == cfg.MODEL.PIXEL_STD
    assert lazy.model.input_format == cfg.INPUT.FORMAT

    generator = lazy.model.get("proposal_generator", lazy.model).anchor_generator
    with torch.device("meta"):
        shapes = build_backbone(cfg).output_shape()
    retinanet = "retinanet" in name
    levels = cfg.MODEL.RETINANET.IN_FEATURES if retinanet else cfg.MODEL.RPN.IN_FEATURES
    features = [torch.empty(1, 1, 2, 3) for _ in levels]
    anchors = build_anchor_generator(cfg, [shapes[level] for level in levels])(features)
    for boxes, expected in zip(instantiate(generator)(features), anchors, strict=True):
        torch.testing.assert_close(boxes.tensor, expected.tensor, rtol=1e-5, atol=1e-3)
    if retinanet:
        assert lazy.model.head.prior_prob == cfg.MODEL.RETINANET.PRIOR_PROB


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_one_schedule(name: str) -> None:
    cfg, lazy = config(name), lazy_config(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=cfg.SOLVER.BASE_LR)
    expected = build_lr_scheduler(cfg, optimizer)._multiplier
    found = instantiate(lazy.lr_multiplier)
    last, warmup = cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS
    steps = cfg.SOLVER.STEPS if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" else ()
    around = [step + k for step in (warmup, *steps) for k in range(-2, 3)]
    during = [*range(0, warmup, warmup // 20), *range(0, last, last // 50)]
    for iteration in [*during, *around, last - 1]:
        where = iteration / last
        assert found(where) == pytest.approx(expected(where), rel=1e-9), iteration

    train = lazy.train
    assert dict(train.checkpointer) == {
        "period": cfg.SOLVER.CHECKPOINT_PERIOD,
        "max_to_keep": None,  # all, as Detectron2's trainer
    }
    assert train.max_iter == last and train.eval_period == cfg.TEST.EVAL_PERIOD
    assert train.get("ims_per_gpu", 0) == cfg.SOLVER.IMS_PER_GPU
    assert train.get("accumulate_steps", 1) == cfg.SOLVER.ACCUMULATE_STEPS
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert train.amp.enabled == cfg.SOLVER.AMP.ENABLED
    assert train.get("channels_last", False) == cfg.MODEL.CHANNELS_LAST
    assert train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert train.get("seed", -1) == cfg.SEED


@pytest.mark.parametrize("name", TWINS)
def test_twins_read_the_same_data(name: str) -> None:
    cfg, lazy = config(name), lazy_config(name)
    train, test = lazy.dataloader.train, lazy.dataloader.test
    if name.startswith("coco"):  # the quickstart's folders are named by --train and --val
        assert (train.dataset.names,) == cfg.DATASETS.TRAIN
        assert (test.dataset.names,) == cfg.DATASETS.TEST
        assert lazy.train.output_dir == cfg.OUTPUT_DIR
    assert train.num_workers == test.num_workers == cfg.DATALOADER.NUM_WORKERS
    mapper, plain_mapper = instantiate(train.mapper), DatasetMapper(cfg, is_train=True)
    assert plain(mapper) == plain(plain_mapper)
    assert mapper.augmentations.augs[0].short_edge_length == cfg.INPUT.MIN_SIZE_TRAIN
    test.mapper.augmentations[0].sample_style = "choice"  # of one size, as a range of it
    # Masks are read in training alone.
    assert plain(instantiate(test.mapper)) == plain(
        DatasetMapper(cfg, is_train=False, use_instance_mask=False)
    )
    evaluator = lazy.dataloader.evaluator
    assert evaluator.dataset_name == test.dataset.names
    assert evaluator.output_dir == f"{lazy.train.output_dir}/inference"
    assert "max_dets_per_image" not in evaluator and cfg.TEST.DETECTIONS_PER_IMAGE == 100
