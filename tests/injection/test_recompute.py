"""recompute: the same gradients from less memory, and when nothing is computed again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BottleneckBlock,
    DeformBottleneckBlock,
)
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from support import zoo
from support.models import computed, randomized, small_fpn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import gn_det
from gn_det import FusedGroupNorm, InputError, audit, fuse, inject, recompute, revert
from gn_det.engine.activation_memory import kept_for_backward
from gn_det.layers.recomputation import recomputation, recomputed, recomputes_in
from gn_det.modeling import GNFastRCNNConvFCHead


class Layers(nn.Module):
    """A mask head without its loss."""

    def __init__(self) -> None:
        super().__init__()
        shape = ShapeSpec(channels=32, width=7, height=7)
        self.head = MaskRCNNConvUpsampleHead(shape, num_classes=2, conv_dims=[32, 32, 32])

    def forward(self, x: Tensor) -> Tensor:
        return self.head.layers(x)


MODELS = {
    "identity": (lambda: BottleneckBlock(32, 32, bottleneck_channels=16), (2, 32, 6, 7)),
    "projection": (
        lambda: BottleneckBlock(32, 64, bottleneck_channels=16, stride=2),
        (2, 32, 6, 7),
    ),
    "basic": (lambda: BasicBlock(32, 64, stride=2), (2, 32, 6, 7)),
    "deformable": (
        lambda: DeformBottleneckBlock(32, 64, bottleneck_channels=16, norm="BN"),
        (2, 32, 6, 7),
    ),
    "stem": (lambda: BasicStem(norm="BN"), (2, 3, 20, 21)),
    "fpn": (small_fpn, (1, 3, 64, 96)),
    "box_head": (
        lambda: FastRCNNConvFCHead(ShapeSpec(32, 7, 7), conv_dims=[32, 32], fc_dims=[8]),
        (3, 32, 7, 7),
    ),
    "mask_head": (Layers, (3, 32, 7, 7)),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A fused model, and an input."""
    build, shape = MODELS[name]
    return fuse(randomized(inject(nn.Sequential(build()), "ALL"))), torch.randn(shape)


def kept(model: nn.Module, x: Tensor) -> int:
    def forward() -> list[Tensor]:
        y = model(x.clone().requires_grad_())
        return [level.mean() for level in (y.values() if isinstance(y, dict) else [y])]

    return sum(kept_for_backward(forward).values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bits_from_less_memory(
    name: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.stand_in_for_deform_conv(monkeypatch)
    model, x = built(name)
    model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)
    expected, before = computed(model, x), kept(model, x)
    recompute(model)
    assert all(map(torch.equal, computed(model, x), expected))
    assert kept(model, x) < before


def test_a_bottleneck_keeps_two_narrow_outputs_its_input_and_its_result() -> None:
    model, x = built("identity")
    recompute(model)
    one_channel = 4 * 2 * 6 * 7
    results = (16 + 16) * one_channel + x.numel() * 4
    # In place of its result, which the next layer keeps, the mean keeps nothing; ATen's ReLU does.
    statistics = 3 * 2 * 2 * 32 * 4
    assert results <= kept(model, x) <= results + x.numel() * 4 + statistics


def mask_rcnn(*overrides: object) -> nn.Module:
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.merge_from_other_cfg(
        zoo.model_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    )
    cfg.MODEL.META_ARCHITECTURE = "GNGeneralizedRCNN"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.merge_from_list(list(overrides))
    torch.manual_seed(0)
    return build_model(cfg).train()


@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_a_training_step_of_mask_rcnn_has_the_same_losses_and_gradients(freeze_at: int) -> None:
    steps = []
    for recomputes in (False, True):
        model = mask_rcnn("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.GN.RECOMPUTE", recomputes)
        assert recomputes_in(model) == recomputes
        steps.append(zoo.step(model, zoo.pictures()))
    assert steps[0].keys() == steps[1].keys()
    for name, value in steps[0].items():
        assert torch.equal(steps[1][name], value), name


def test_empty_batches_of_regions_train() -> None:
    for name in ("box_head", "mask_head"):
        model = recompute(built(name)[0])
        empty = torch.zeros(0, 32, 7, 7, requires_grad=True)
        model(empty).sum().backward()
        assert empty.grad.shape == empty.shape
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_weights_and_their_names_stay_and_evaluation_keeps_what_it_kept() -> None:
    model, x = built("fpn")
    twin = copy.deepcopy(model)
    recompute(model)
    assert list(model.state_dict()) == list(twin.state_dict())
    model.eval(), twin.eval()
    assert kept(model, x) == kept(twin, x)
    with torch.no_grad():
        assert all(map(torch.equal, model(x).values(), twin(x).values()))


def test_copies_and_pickles_recompute_too() -> None:
    model, x = built("projection")
    recompute(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(twin, x) == kept(model, x)
        assert all(map(torch.equal, computed(twin, x), computed(model, x)))


def test_revert_undoes_it_in_copies_too() -> None:
    model, x = built("projection")
    plain = revert(copy.deepcopy(model))
    again = revert(pickle.loads(pickle.dumps(recompute(recompute(model)))))
    assert kept(again, x) == kept(plain, x)
    assert not again._forward_hooks and not again._forward_pre_hooks
    assert not again._forward_hooks_always_called


def test_the_audit_shows_what_is_recomputed() -> None:
    model = nn.Sequential(built("identity")[0], built("stem")[0])
    recompute(model[0])
    assert [row.form for row in audit(model).rows] == [
        "GN+ReLU, recomputed",
        "GN+add+ReLU",
        "GN+ReLU",
    ]


def test_components_take_it_as_an_argument_as_lazy_configs_give_it() -> None:
    shape = ShapeSpec(channels=32, height=7, width=7)
    head = GNFastRCNNConvFCHead(shape, conv_dims=[32], fc_dims=[8], recompute=True)
    assert recomputes_in(head)
    assert not recomputes_in(GNFastRCNNConvFCHead(shape, conv_dims=[32], fc_dims=[8]))


def test_a_model_in_which_it_would_change_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="Sequential has no FusedGroupNorm to recompute"):
        recompute(nn.Sequential(nn.GroupNorm(2, 4)))
    with pytest.raises(InputError, match="is fused with .*; call fuse first"):
        recompute(inject(nn.Sequential(BasicStem(norm="BN"))))
    # After fuse nobody is told to call it.
    model = nn.Sequential(nn.Conv2d(3, 32, 1), FusedGroupNorm(32), nn.GELU())
    with pytest.warns(UserWarning, match="none of the 1 norms of Sequential .*1: GELU follows"):
        fuse(model)
    with pytest.raises(InputError, match="no norm of Sequential is fused .*; inject at other"):
        recompute(model)


def test_what_a_convolution_behind_a_hook_saw_stays() -> None:
    model, x = built("projection")
    seen = []
    model[0].conv3.register_forward_hook(lambda module, inputs, output: seen.append(output))
    expected = computed(model, x)
    assert all(map(torch.equal, computed(recompute(model), x), expected))
    assert torch.equal(*seen)


def test_spectral_norms_are_computed_once_and_functional_gradients_work() -> None:
    found = []
    for change in (lambda model: model, recompute):
        torch.manual_seed(0)
        model, x = built("projection")
        for name, conv in [*model.named_modules()]:
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1):
                spectral_norm(model.get_submodule(name))
        changed = change(model)
        found.append([changed(x).square().sum(), *model.buffers()])
        found[-1] += torch.autograd.grad(found[-1][0], [*model.parameters()])
        found[-1].append(torch.func.grad(lambda x, model=changed: model(x).sum())(x))  # type: ignore
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_gradients_and_a_second_backward_pass_are_the_same() -> None:
    found = []
    for change in (lambda model: model, recompute):
        torch.manual_seed(0)
        model, x = built("projection")
        x.requires_grad_()
        loss = change(model)(x).square().sum()
        for _ in range(2):
            (first,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), [*model.parameters()])])
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_mixed_precision_gradients_are_the_same_bits() -> None:
    found = []
    for change in (lambda model: model, recompute):
        torch.manual_seed(0)
        model, x = built("projection")
        with torch.autocast("cpu", torch.bfloat16):
            loss = change(model)(x).float().square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("place", ["norm's input", "result"])
def test_a_change_in_place_is_noticed(place: str) -> None:
    norm, weight = FusedGroupNorm(32), torch.ones(1, 32, 1, 1, requires_grad=True)
    x = torch.randn(2, 32, 4, 4)
    with recomputation():
        y = (x * weight).requires_grad_()
        z = norm(y)
        if place == "result":
            z.relu_()  # as ReLUs that are not fused: what comes after keeps its own result
        loss = (z * weight).sum()
    if place == "result":
        expected = (norm(x * weight).relu() * weight).sum()
        ours, theirs = (torch.autograd.grad(each, weight) for each in (loss, expected))
        assert torch.equal(*ours, *theirs)
    else:
        with torch.no_grad():
            y.mul_(2)
        with pytest.raises(RuntimeError, match=r"\(2, 32, 4, 4\) .* was changed in place"):
            loss.backward()


def test_each_result_is_computed_again_once() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    x = torch.ones(3, requires_grad=True)
    with recomputation():
        y = recomputed(double, x + 0)
        z = recomputed(double, y)
        loss = y.square().sum() + z.square().sum()
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 4
    assert torch.equal(x.grad, torch.full((3,), 8.0 + 32.0))


def test_a_forward_pass_that_fails_leaves_nothing_behind() -> None:
    model, x = built("identity")
    recompute(model)
    with pytest.raises(RuntimeError):
        model(x[:, :5])
    expected = kept(model, x)
    other, y = built("identity")
    assert kept(other, y) > expected


def test_an_interrupted_forward_pass_is_forgotten_by_the_next() -> None:
    model, x = built("identity")
    recompute(model)

    def interrupt(module: nn.Module, inputs: object) -> None:
        raise KeyboardInterrupt

    handle = model[0].conv2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    expected = kept(model, x)
    other, y = built("identity")
    assert kept(other, y) > expected


def test_distributed_and_accumulated_gradients_are_the_same(one_process: None) -> None:
    found = []
    for change in (lambda model: model, recompute):
        torch.manual_seed(0)
        model, x = built("projection")
        parallel = DistributedDataParallel(change(model))
        with parallel.no_sync():
            parallel(x).square().sum().backward()
        parallel(2 * x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_checkpointed_otherwise_is_left_to_that(use_reentrant: bool) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    torch.manual_seed(0)
    model, x = built("identity")
    model = nn.Sequential(Checkpointed(model, *built("identity")[0]), built("identity")[0])
    expected, before = computed(model, x), kept(model, x)
    recompute(model)
    assert all(map(torch.equal, computed(model, x), expected))
    assert kept(model, x) < before


def test_a_recomputing_model_compiles_without_a_graph_break() -> None:
    model, x = built("fpn")
    expected = recompute(model)(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name, level in compiled(x).items():
        torch.testing.assert_close(level, expected[name])


def test_parts_that_recompute_make_a_whole() -> None:
    """As with the registered components, each of which is built by itself."""
    model, x = built("fpn")
    expected = computed(model, x)
    recompute(model[0].bottom_up.res2), recompute(model[0].bottom_up)
    assert all(map(torch.equal, computed(model, x), expected))
