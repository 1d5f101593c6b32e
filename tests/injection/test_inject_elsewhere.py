"""Norms in models of others: of vectors, of a kind of their own, and of which code needs more."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured

from gn_det import FusedGroupNorm, audit, convert_bn, inject


class ByCode(nn.Module):
    """Layers that forward calls in some way."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def linear_in_a_wrapper() -> nn.Module:
    return ByCode(lin=nn.Linear(64, 64))


@pytest.mark.parametrize(
    "layers",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(64)),
        nn.Sequential(linear_in_a_wrapper(), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), nn.BatchNorm1d(64)),
        ByCode(fc=linear_in_a_wrapper(), bn=nn.BatchNorm1d(64)),
        ByCode(conv=nn.Conv2d(64, 64, 3), bn=nn.BatchNorm1d(64)),
        ByCode(
            fcs=nn.ModuleList(nn.Linear(64, 64) for _ in range(2)),
            bns=nn.ModuleList(nn.BatchNorm1d(64) for _ in range(2)),
        ),
    ],
    ids=["flattened", "wrapped", "behind LayerNorm", "in a class", "pooled by code", "lists"],
)
def test_norms_of_vectors_stay_and_are_told(layers: nn.Module) -> None:
    model = inject(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), layers))
    assert type(model[1]) is FusedGroupNorm
    assert not any(isinstance(m, FusedGroupNorm) for m in layers.modules())
    assert any("BatchNorm1d of vectors" in left.reason for left in audit(model).left_alone)


class IntKernel(nn.Module):
    """A convolution of somebody's own, with its kernel as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kernel_size = nn.Parameter(torch.ones(64, 3, 5)), 5
        self.in_channels, self.out_channels = 3, 64


@pytest.mark.parametrize(
    "layers",
    [
        nn.Sequential(nn.Conv1d(3, 64, 3), nn.BatchNorm1d(64)),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 64, 3), nn.BatchNorm1d(64)),
        ByCode(bn1=nn.BatchNorm1d(64), conv1=nn.Conv1d(64, 64, 3)),
        ByCode(
            convs=nn.ModuleList(nn.Conv1d(64, 64, 1) for _ in range(2)),
            bns=nn.ModuleList(nn.BatchNorm1d(64) for _ in range(2)),
        ),
        nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 64, 3), nn.GroupNorm(8, 64)),
        ByCode(conv=nn.Conv2d(3, 64, 3), flatten=nn.Flatten(), bn=nn.BatchNorm2d(64)),
        ByCode(conv=IntKernel(), bn=nn.BatchNorm1d(64)),
    ],
    ids=["1D", "flattened maps", "pre-activation", "lists", "GroupNorm", "any order", "own class"],
)
def test_norms_of_maps_become_gn_in_one_dimension_too(layers: nn.Module) -> None:
    inject(layers)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in layers.modules())
    assert any(isinstance(m, FusedGroupNorm) for m in layers.modules())


class ReadsStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def folded(self) -> Tensor:
        return self.conv.weight * self.bn.running_var.rsqrt().view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.folded())


class FoldsAtTheEnd(ReadsStatistics):
    """As blocks that are reparametrized after training; others have methods of that name too."""

    def forward(self, x: Tensor, neck: nn.Module | None = None) -> Tensor:
        return self.bn(self.conv(x if neck is None else neck.folded(x)))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    random_unstructured(model[1], "weight", 0.5)
    return model


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    return model


def quantized_later() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    fused = torch.ao.quantization.fuse_modules_qat(model, [["0", "1", "2"]])
    return torch.ao.quantization.prepare_qat(fused)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize(
    ("build", "why"),
    [
        (ReadsStatistics, "whose statistics the code around it reads"),
        (pruned, "whose weight is parametrized or pruned"),
        (parametrized, "whose weight is parametrized or pruned"),
        (quantized_later, "whose statistics the code around it reads"),
    ],
)
def test_norms_of_which_somebody_needs_more_stay_and_run(build: Callable, why: str) -> None:
    model = nn.Sequential(build(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    inject(model)
    assert type(model[2]) is FusedGroupNorm
    assert [m for m in model[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(why in left.reason for left in audit(model).left_alone)
    model(torch.rand(2, 3, 9, 9)).sum().backward()


def test_a_block_that_folds_its_norm_after_training_gets_gn() -> None:
    assert type(inject(FoldsAtTheEnd()).bn) is FusedGroupNorm


class UNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2))
            for _ in range(depth)
        )
        self.first, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape[2:], self.first(x)
        for block in self.down:
            x = block(x)
        return torch.sigmoid(F.interpolate(self.out(x), shape))


def test_the_bottom_of_a_deep_network_is_no_gate() -> None:
    model = inject(UNet(8))
    assert all(type(block[1]) is FusedGroupNorm for block in model.down)


class FrozenBatchNorm2d(nn.Module):
    """As DETR and those after it have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        shift = (self.bias - self.running_mean * scale.flatten()).view(1, -1, 1, 1)
        return x * scale + shift


@pytest.mark.parametrize("name", ["FrozenBatchNorm2d", "DetrFrozenBatchNorm2d"])
def test_frozen_bn_of_a_projects_own_is_replaced_and_converted(name: str) -> None:
    kind = type(name, (FrozenBatchNorm2d,), {})
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.ReLU())
    weight = model[1].weight.clone()
    replaced = inject(copy.deepcopy(model))
    assert type(replaced[1]) is FusedGroupNorm and torch.equal(replaced[1].weight, weight)
    calibration = convert_bn(model, [torch.rand(2, 3, 9, 9) for _ in range(2)], num_groups=1)
    assert type(model[1]) is FusedGroupNorm and calibration.calibrated < 0.9


def test_hooks_of_the_state_dict_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[1].register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({f"{prefix}more": torch.ones(1)})
    )
    loaded = []
    model[1].register_load_state_dict_pre_hook(lambda module, *_: loaded.append(module))
    assert "1.more" in inject(model).state_dict()
    model.load_state_dict(model.state_dict(), strict=False)
    assert loaded == [model[1]]


def test_norms_that_inference_mode_saw_made_train() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU())
    with torch.inference_mode():
        inject(model)
    model(torch.rand(1, 3, 9, 9)).sum().backward()
    assert model[1].weight.grad is not None
