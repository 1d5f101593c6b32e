"""A norm is replaced wherever a model holds it, or the model is refused."""

from __future__ import annotations

import copy
import functools
from collections import deque
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gn_det import InputError, convert_bn, inject
from gn_det.layers import FusedGroupNorm
from gn_det.modeling.timm_backbone.frozen_norm import freeze_batch_norms


class Pair(NamedTuple):
    conv: nn.Module
    norm: nn.Module


def in_itself(norms: list[nn.Module]) -> list:
    norms.append(norms)
    return norms


# What a module may have its norms in besides its children, and how it takes norm i out of that.
HOLDERS = {
    "list": (list, lambda held, i: held[i]),
    "tuple": (tuple, lambda held, i: held[i]),
    "deque": (deque, lambda held, i: held[i]),
    "a list in itself": (in_itself, lambda held, i: held[i]),
    "dict of named tuples": (
        lambda norms: {i: Pair(nn.Identity(), norm) for i, norm in enumerate(norms)},
        lambda held, i: held[i].norm,
    ),
    "partials": (
        lambda norms: [functools.partial(norm) for norm in norms],
        lambda held, i: held[i],
    ),
    "partials of a function": (
        lambda norms: [functools.partial(call, norm=norm) for norm in norms],
        lambda held, i: held[i],
    ),
}


def call(x: Tensor, norm: nn.Module) -> Tensor:
    return norm(x)


class Head(nn.Module):
    """Layers as Detectron2 often has them: registered by add_module, and called from elsewhere."""

    def __init__(self, holder: str) -> None:
        super().__init__()
        self.holder = holder
        norms = [nn.BatchNorm2d(8) for _ in range(2)]
        for number, norm in enumerate(norms):
            self.add_module(f"conv{number}", nn.Conv2d(8, 8, 3, bias=False))
            self.add_module(f"norm{number}", norm)
            torch.nn.init.uniform_(norm.weight)
            norm.running_mean.uniform_()
        self.norms = HOLDERS[holder][0](norms)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(2):
            norm = HOLDERS[self.holder][1](self.norms, number)
            x = torch.relu(norm(self.get_submodule(f"conv{number}")(x)))
        return x


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("holder", HOLDERS)
def test_gn_is_called_where_a_model_has_its_norms_elsewhere_too(holder: str, x: Tensor) -> None:
    torch.manual_seed(0)
    model = Head(holder)
    expected = x
    for conv, norm in ((model.conv0, model.norm0), (model.conv1, model.norm1)):
        gn = nn.functional.group_norm(conv(expected), 2, norm.weight, norm.bias)
        expected = torch.relu(gn)
    inject(model, num_groups=2)
    assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("holder", ["list", "dict of named tuples"])
def test_conversion_fits_the_norms_that_run(holder: str, x: Tensor) -> None:
    torch.manual_seed(0)
    model = Head(holder).eval()
    bn = copy.deepcopy(model)
    found = convert_bn(model, [x], num_groups=1)
    error = (model(x) - bn(x)).norm() / (bn(x) - bn(x).mean((0, 2, 3), keepdim=True)).norm()
    assert error < 0.6 and all(row.calibrated < 0.5 for row in found.rows)


def enclosed(norm: nn.Module) -> object:
    return lambda x: norm(x)


@pytest.mark.parametrize(
    "held",
    [
        lambda norm: norm.forward,
        lambda norm: [norm.forward],
        enclosed,
        lambda norm: {"a": (enclosed(norm),)},
        lambda norm: enclosed(norm.forward),
        lambda norm: functools.partial(norm.forward),
    ],
)
def test_a_function_that_has_a_norm_for_itself_is_refused(held: object, x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model.function = held(model[1])
    before = model(x)
    with pytest.raises(InputError, match=r"function is a function that has a BatchNorm2d for its"):
        inject(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert_close(model(x), before)


def test_functions_of_other_parts_are_none_of_its_business(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model.forward_of_conv, model.same = model[0].forward, enclosed(model)
    model[1].old_forward = model[1].forward  # as what wraps a forward keeps it
    assert type(inject(model)[1]) is FusedGroupNorm


def test_frozen_bn_is_called_where_a_model_has_its_norms_elsewhere_too(x: Tensor) -> None:
    model = Head("list").train()
    expected = copy.deepcopy(model).eval()(x)
    freeze_batch_norms(model, [*model.modules()])
    assert_close(model(x), expected)
