"""The memory of a training step: what GN costs, and that the step is the real one's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from support.programs import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gn_det import InputError
from gn_det.config import get_config, load_config
from gn_det.engine.activation_memory import ELSEWHERE, autocast, kept_for_backward
from gn_det.studies.kernels.training_step import made_up_batch
from gn_det.studies.memory import step as step_memory
from gn_det.studies.memory.step import (
    VARIANTS,
    StepMemory,
    build_variant,
    count_step,
    synthetic_step,
)


@functools.cache
def counted(variant: str, num_images: int, freeze_at: int) -> StepMemory:
    """Mask R-CNN R-50-FPN with 4conv1fc heads in mixed precision on 800×1333."""
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_1x.yaml")
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.SOLVER.AMP.ENABLED = True
    return count_step(cfg, variant, num_images, (800, 1333))


@pytest.mark.parametrize("freeze_at", [0, 2])
@pytest.mark.parametrize("num_images", [1, pytest.param(2, marks=pytest.mark.slow)])
class TestMaskRCNN:
    def test_ours_keeps_less_than_half_of_detectron2s_gn(
        self, num_images: int, freeze_at: int
    ) -> None:
        ours = counted("gn_det", num_images, freeze_at)
        theirs = counted("Detectron2's GN", num_images, freeze_at)
        assert ours.resnet <= 0.43 * theirs.resnet
        assert ours.kept <= 0.49 * theirs.kept

    def test_recomputing_keeps_no_more_than_frozen_bn(
        self, num_images: int, freeze_at: int
    ) -> None:
        ours = counted("gn_det, RECOMPUTE", num_images, freeze_at)
        frozen = counted("frozen BN", num_images, freeze_at)
        assert ours.resnet <= frozen.resnet
        assert ours.kept <= 1.01 * frozen.kept


def test_parts_that_recompute_each_by_itself_keep_a_tenth_more_at_most() -> None:
    """As projects with a meta-architecture of their own: what FPN hands to the RPN is kept."""
    cfg = get_config("Base-Mask-RCNN-FPN-GN.yaml")
    cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_fpn_backbone"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "GNFastRCNNConvFCHead"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "GNMaskRCNNConvUpsampleHead"
    cfg.MODEL.DEVICE, cfg.MODEL.GN.RECOMPUTE = "cuda", True
    with FakeTensorMode(), torch.device("cuda"), autocast(enabled=True):
        model = META_ARCH_REGISTRY.get("GeneralizedRCNN")(cfg).train()
        step, parts = synthetic_step(model, 1, (800, 1333))
        kept = kept_for_backward(step, parts, model.parameters())
    assert 1.01 < sum(kept.values()) / counted("frozen BN", 1, freeze_at=2).kept <= 1.1


class Convolutions(TorchDispatchMode):
    """Counts operations of convolutions, forward and backward.

    As FlopCounterMode, which watches all modules by hooks, so that blocks would run unfused.
    """

    operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "convolution" in func.name():
            count = flop_registry[func._overloadpacket]
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("freeze_at", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_recomputing_costs_three_percent_more_convolution_operations(freeze_at: int) -> None:
    operations = {}
    for variant in ("gn_det", "gn_det, RECOMPUTE"):
        cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_1x.yaml")
        cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.DEVICE = freeze_at, "cpu"
        with FakeTensorMode():
            step, _ = synthetic_step(build_variant(cfg, variant), 1, (800, 1333))
            with Convolutions() as counter:
                sum(step().values()).backward()
        operations[variant] = counter.operations
    assert 1 < operations["gn_det, RECOMPUTE"] / operations["gn_det"] <= 1.03


def test_the_synthetic_step_keeps_what_the_real_one_does_in_all_that_no_object_decides() -> None:
    cfg = get_config("small/mask_rcnn_R_18_FPN_gn.yaml")
    cfg.MODEL.DEVICE = "cpu"
    batch = made_up_batch()
    model = build_variant(cfg, "gn_det")
    parts = step_memory.parts_of(model)
    with EventStorage():
        real = kept_for_backward(lambda: model(batch), parts)
    step, parts = synthetic_step(model, 2, (128, 128))
    synthetic = kept_for_backward(step, parts)
    for part in ("stem", "res2", "res3", "res4", "res5", "FPN"):
        assert synthetic[part] == real[part] > 0, part
    # The real one's losses come on top, and it finds fewer objects than it may sample.
    assert synthetic["RPN"] <= real["RPN"]
    assert sum(real.values()) <= 1.1 * sum(synthetic.values())


def test_detectron2s_gn_is_what_detectron2_builds_of_its_own_norm_keys() -> None:
    cfg = get_config("coco/mask_rcnn_R_50_FPN_frozenbn_1x.yaml")
    cfg.SOLVER.AMP.ENABLED = True
    expected = count_step(cfg, "Detectron2's GN", 1, (256, 320))
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        node.NORM = "GN"
    cfg.MODEL.DEVICE = "cuda"
    with FakeTensorMode(), torch.device("cuda"), autocast(enabled=True):
        model = META_ARCH_REGISTRY.get("GeneralizedRCNN")(cfg).train()
        step, parts = synthetic_step(model, 1, (256, 320))
        kept = kept_for_backward(step, parts, model.parameters())
    assert kept == expected.activations


def test_parameters_gradients_and_momentum_follow_what_trains() -> None:
    cfg = get_config("small/mask_rcnn_R_18_FPN_gn.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", 3
    cfg.MODEL.WEIGHTS = ""
    model = build_model(cfg)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = count_step(cfg, "gn_det", 1, (64, 64))
    assert memory.gradients == memory.momentum and sum(memory.gradients.values()) == trained
    assert memory.gradients.keys() == memory.parameters.keys() - {"stem", "res2", "res3", ELSEWHERE}
    all_of_it = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert sum(memory.parameters.values()) == all_of_it
    assert memory.total == all_of_it + 2 * trained + memory.kept + 4 * 3 * 64 * 64
    cfg.SOLVER.MOMENTUM = 0.0
    assert count_step(cfg, "gn_det", 1, (64, 64)).momentum == {}


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        pytest.param(
            "coco/cascade_mask_rcnn_R_50_FPN_gn_1x.yaml",
            {"box head 3", "mask head"},
            marks=pytest.mark.slow,
        ),
        pytest.param("coco/mask_rcnn_R_50_C4_gn_1x.yaml", {"RoI heads"}, marks=pytest.mark.slow),
        ("coco/retinanet_R_50_FPN_gn_1x.yaml", {"dense head"}),
    ],
)
def test_every_meta_architecture_that_is_listed_is_counted(name: str, heads: set[str]) -> None:
    cfg = get_config(name)
    cfg.SOLVER.AMP.ENABLED = True
    sizes = [count_step(cfg, variant, 1, (128, 160)) for variant in VARIANTS]
    frozen, theirs, ours, recomputed = (memory.kept for memory in sizes)
    assert heads <= sizes[0].activations.keys()
    assert frozen < ours < theirs and recomputed < ours


def test_a_hand_over_is_counted_as_the_gn_that_it_ends_in() -> None:
    kept = {}
    for recipe in ("gn_distilled", "gn_handed_over"):
        cfg = load_config(ROOT / f"configs/compare/photos/{recipe}.yaml")
        kept[recipe] = count_step(cfg, "gn_det", 1, (64, 96))
    assert kept["gn_distilled"] == kept["gn_handed_over"]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("weights", ["timm", "not/there.pth"])
def test_a_timm_backbone_needs_no_weights_and_its_norm_does_not_matter(
    norm: str, weights: str
) -> None:
    file = ROOT / "configs/compare/photos/frozenbn_gn_heads.yaml"
    keys = ["MODEL.TIMM.NORM", norm, "MODEL.TIMM.WEIGHTS", weights]
    cfg = load_config(file, [*keys, "MODEL.TIMM.NAME", "resnet18"])
    norms = build_variant(cfg, "frozen BN").modules()
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) for m in norms)


def test_other_meta_architectures_are_refused_with_a_list_of_those_that_are_known() -> None:
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_1x.yaml")
    cfg.MODEL.META_ARCHITECTURE = "GNPanopticFPN"
    with pytest.raises(InputError, match="step of PanopticFPN is not known.*GeneralizedRCNN with"):
        count_step(cfg, "gn_det", 1, (64, 64))


@pytest.mark.parametrize("amp", [False, True])
def test_the_layout_counts_too(amp: bool) -> None:
    cfg = get_config("small/mask_rcnn_R_18_FPN_gn.yaml")
    cfg.SOLVER.AMP.ENABLED = amp
    contiguous = count_step(cfg, "frozen BN", 1, (64, 64)).activations
    cfg.MODEL.CHANNELS_LAST = True
    last = count_step(cfg, "frozen BN", 1, (64, 64)).activations
    # The box head's linear layer keeps a copy of ReLU's result, in the other order.
    assert last["box head"] > contiguous["box head"]
    assert last["res3"] == contiguous["res3"]
