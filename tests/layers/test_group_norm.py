"""FusedGroupNorm where people put it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from detectron2.layers import get_norm
from detectron2.solver.build import get_default_optimizer_params
from torch import nn
from torchvision.ops import Conv2dNormActivation

from gn_det.layers import FusedGroupNorm


def test_groups_are_the_default_number_where_none_is_given() -> None:
    assert [FusedGroupNorm(channels).num_groups for channels in (256, 48, 37)] == [32, 24, 1]


def test_channels_that_are_no_multiple_of_the_groups_are_refused_with_both_values() -> None:
    with pytest.raises(ValueError, match="num_channels, 48, is not a multiple of num_groups, 32"):
        FusedGroupNorm(48, 32)


def test_output_is_that_of_pytorchs_layer_with_the_same_state_dict() -> None:
    ours, theirs = FusedGroupNorm(64, 16, eps=1e-3), nn.GroupNorm(16, 64, eps=1e-3)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 64, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_without_affine_there_are_no_parameters() -> None:
    norm = FusedGroupNorm(8, affine=False)
    assert list(norm.parameters()) == []
    assert norm(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)


def test_without_bias_it_is_pytorchs_layer_without_bias() -> None:
    ours = FusedGroupNorm(8, 2, activation="relu", bias=False)
    theirs = nn.GroupNorm(2, 8)
    theirs.bias = None
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == ["weight"]
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x).relu())


def test_fits_the_norm_slots_of_detectron2_and_torchvision() -> None:
    assert get_norm(FusedGroupNorm, 256).num_channels == 256
    block = Conv2dNormActivation(3, 48, norm_layer=FusedGroupNorm)
    assert block(torch.randn(1, 3, 8, 8)).shape == (1, 48, 8, 8)


def test_is_exempt_from_weight_decay_wherever_pytorchs_layer_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), FusedGroupNorm(8))
    groups = get_default_optimizer_params(model, weight_decay=1e-4, weight_decay_norm=0.0)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay[id(model[0].weight)] == 1e-4
    assert decay[id(model[1].weight)] == decay[id(model[1].bias)] == 0.0


def test_relu_in_the_layer_does_what_relu_after_it_does() -> None:
    fused, plain = FusedGroupNorm(8, activation="relu"), FusedGroupNorm(8)
    nn.init.normal_(fused.weight)
    nn.init.normal_(fused.bias)
    assert list(fused.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    dy = torch.randn(2, 8, 3, 3)
    y, expected = fused(x), nn.Sequential(plain, nn.ReLU())(x)
    assert torch.equal(y, expected)
    assert (y == 0).any() and (y > 0).any()
    gradients = torch.autograd.grad(y, [x, *fused.parameters()], dy)
    truth = torch.autograd.grad(expected, [x, *plain.parameters()], dy)
    for ours, theirs in zip(gradients, truth, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ["gelu", "ReLU", ""])
def test_an_unknown_activation_is_refused_by_its_name(activation: str) -> None:
    with pytest.raises(ValueError, match=f'activation is "{activation}", not None or "relu"'):
        FusedGroupNorm(8, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_the_input_is_kept_with_parameters_in_float32(dtype: torch.dtype) -> None:
    norm, x = FusedGroupNorm(8, activation="relu"), torch.randn(2, 8, 3, 3).to(dtype)
    assert norm(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == dtype


@pytest.mark.parametrize("activation", [None, "relu"])
def test_survives_deepcopy_and_pickling(activation: str | None) -> None:
    norm = FusedGroupNorm(48, eps=1e-4, activation=activation)
    x = torch.randn(1, 48, 3, 3)
    for clone in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(clone(x), norm(x))
        assert (clone.num_groups, clone.eps, clone.activation) == (24, 1e-4, activation)


def test_repr_names_channels_and_groups() -> None:
    assert repr(FusedGroupNorm(48)) == ("FusedGroupNorm(48, num_groups=24, eps=1e-05, affine=True)")


def test_repr_names_the_activation_if_there_is_one() -> None:
    assert repr(FusedGroupNorm(48, activation="relu")) == (
        "FusedGroupNorm(48, num_groups=24, eps=1e-05, affine=True, activation=relu)"
    )


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_scripts_and_traces(activation: str | None, affine: bool) -> None:
    norm = FusedGroupNorm(8, affine=affine, activation=activation)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(2, 8, 3, 3).to(dtype)
        expected = norm(x)
        for compiled in (torch.jit.script(norm), torch.jit.trace(norm, x)):
            y = compiled(x)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_layer_takes_other_shapes_and_survives_saving() -> None:
    norm = FusedGroupNorm(8, 4, activation="relu")
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(norm), saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    for shape in ((1, 8, 5, 7), (3, 8), (0, 8, 3, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), norm(x))
