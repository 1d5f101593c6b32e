"""standardize_weight and the convolutions with it, against the formula and mmcv's layer."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.conv_ws import ConvWS2d as MMCVConvWS2d
from torch import Tensor, nn
from torch.testing import assert_close

from gn_det.layers.weight_standardization import (
    ConvWS1d,
    ConvWS2d,
    ConvWS3d,
    standardize_weight,
)

KERNELS = [(8, 4, 3, 3), (6, 1, 3, 3), (4, 16, 1, 1), (5, 3, 7), (4, 2, 3, 1, 2)]


def standardized_by_the_formula(weight: Tensor, eps: float = 1e-5) -> Tensor:
    channels = []
    for channel in weight.double():
        mean = channel.sum() / channel.numel()
        variance = (channel - mean).square().sum() / (channel.numel() - 1)
        channels.append((channel - mean) / (variance.sqrt() + eps))
    return torch.stack(channels)


@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_every_output_channel_is_that_of_the_formula(shape: tuple[int, ...]) -> None:
    weight = 3 + 0.1 * torch.randn(shape, dtype=torch.float64)
    standard = standardize_weight(weight)
    assert_close(standard, standardized_by_the_formula(weight))
    assert_close(standardize_weight(weight.float()), standard.float(), rtol=1e-4, atol=1e-4)


def test_eps_is_added_to_the_deviation() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    assert_close(standardize_weight(weight, eps=0.5), standardized_by_the_formula(weight, 0.5))


@pytest.mark.parametrize("shape", KERNELS, ids=str)
def test_the_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardize_weight, weight)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_layer_is_mmcvs(groups: int) -> None:
    arguments = {"stride": 2, "padding": 2, "dilation": 2, "groups": groups}
    ours = ConvWS2d(8, 12, 3, **arguments)
    theirs = MMCVConvWS2d(8, 12, 3, **arguments)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 9, 11)
    outputs = [layer(x) for layer in (ours, theirs)]
    assert_close(*outputs)
    dy = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad(y, [*layer.parameters()], dy)
        for y, layer in zip(outputs, (ours, theirs), strict=True)
    ]
    assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "plain"),
    [(ConvWS1d, nn.Conv1d), (ConvWS2d, nn.Conv2d), (ConvWS3d, nn.Conv3d)],
)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_layer_is_pytorchs_with_the_standardized_weight(
    layer: type[nn.Module], plain: type[nn.Module], padding_mode: str
) -> None:
    ours = layer(4, 6, 3, padding=1, padding_mode=padding_mode)
    theirs = plain(4, 6, 3, padding=1, padding_mode=padding_mode)
    assert isinstance(ours, plain)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict({**ours.state_dict(), "weight": standardize_weight(ours.weight)})
    x = torch.randn(2, 4, *[5] * (ours.weight.dim() - 2))
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (4, 3, 1, 1), (4, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_weights_become_zero_with_a_finite_gradient(
    shape: tuple[int, ...], value: float
) -> None:
    weight = torch.full(shape, value, requires_grad=True)
    standard = standardize_weight(weight)
    assert not standard.any()
    standard.backward(torch.randn(shape))
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept_and_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    weight = (1 + torch.rand(4, 256, 3, 3)).to(dtype)
    standard = standardize_weight(weight)
    assert standard.dtype == dtype
    expected = standardize_weight(weight.double())
    assert_close(standard.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_channels_last_stays() -> None:
    weight = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    standard = standardize_weight(weight)
    assert standard.is_contiguous(memory_format=torch.channels_last)
    assert_close(standard, standardize_weight(weight.contiguous()))


def test_under_autocast_the_weight_is_rounded_after_it_is_standardized() -> None:
    layer, x = ConvWS2d(64, 8, 3, bias=False), torch.randn(1, 64, 6, 6)
    with torch.no_grad():
        layer.weight += 10  # deviations that bfloat16 cannot tell from the mean
        expected = F.conv2d(x.bfloat16(), standardize_weight(layer.weight).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and torch.isfinite(layer.weight.grad).all()


def test_under_cuda_autocast_the_weight_is_standardized_in_float32(
    cuda: torch.device, autocast: None
) -> None:
    with cuda:
        layer = ConvWS2d(64, 8, 3)
    assert standardize_weight(layer.weight).dtype == torch.float32
    assert layer(torch.empty(1, 64, 6, 6, device=cuda)).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layer", [ConvWS1d, ConvWS2d, ConvWS3d])
def test_a_scripted_layer_survives_saving(layer: type[nn.Module]) -> None:
    conv, saved = layer(4, 6, 3, padding=1), io.BytesIO()
    torch.jit.save(torch.jit.script(conv), saved)
    saved.seek(0)
    x = torch.randn(2, 4, *[5] * (conv.weight.dim() - 2))
    assert_close(torch.jit.load(saved)(x), conv(x))
