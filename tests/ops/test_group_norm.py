"""The function against the paper's formula, and its refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gn_det.ops import group_norm
from gn_det.ops.reference import group_norm_reference

# Largest error against float64, by the rounding of the dtype at values of a few units.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}

SHAPES = [
    ((2, 64, 7, 9), 32),
    ((1, 48, 5, 5), 24),  # channels that are no power of two
    ((3, 6, 1, 1), 2),  # one pixel
    ((2, 8), 4),  # no spatial dimension
    ((2, 12, 3, 4, 5), 3),  # volumes
]


def parameters(channels: int, dtype: torch.dtype = torch.float32) -> tuple:
    return torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES)
def test_equals_the_papers_formula(shape: tuple, num_groups: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    weight, bias = parameters(shape[1])
    y = group_norm(x, num_groups, weight, bias)
    expected = group_norm_reference(x, num_groups, weight, bias)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() < TOLERANCE[dtype]


def test_reference_equals_pytorch_in_double_precision() -> None:
    x = torch.randn(2, 12, 5, 3, dtype=torch.float64)
    weight, bias = parameters(12, torch.float64)
    expected = F.group_norm(x, 4, weight, bias, 1e-3)
    assert torch.allclose(group_norm_reference(x, 4, weight, bias, 1e-3), expected, atol=1e-12)


def test_one_group_is_layer_norm_and_a_group_a_channel_is_instance_norm() -> None:
    x = torch.randn(2, 6, 4, 5)
    assert torch.allclose(group_norm(x, 1), F.layer_norm(x, x.shape[1:]), atol=1e-5)
    assert torch.allclose(group_norm(x, 6), F.instance_norm(x), atol=1e-5)


def test_gradients_equal_the_papers_formula() -> None:
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (p.requires_grad_() for p in parameters(8, torch.float64))
    grad_y = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    ours = torch.autograd.grad(group_norm(x, 4, weight, bias), (x, weight, bias), grad_y)
    expected = torch.autograd.grad(
        group_norm_reference(x, 4, weight, bias), (x, weight, bias), grad_y
    )
    for gradient, truth in zip(ours, expected, strict=True):
        assert torch.allclose(gradient, truth, atol=1e-10)


def test_an_empty_batch_gives_zero_not_missing_parameter_gradients() -> None:
    weight, bias = (p.requires_grad_() for p in parameters(8))
    y = group_norm(torch.zeros(0, 8, 7, 7), 4, weight, bias)
    y.sum().backward()
    assert y.shape == (0, 8, 7, 7)
    assert torch.equal(weight.grad, torch.zeros(8)) and torch.equal(bias.grad, torch.zeros(8))


def test_autocast_leaves_the_dtype_of_the_input() -> None:
    weight, bias = parameters(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = group_norm(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16), 4, weight, bias)
    assert y.dtype == torch.bfloat16


def test_the_layout_of_the_input_is_kept() -> None:
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    assert group_norm(x, 4).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("error", "message", "x", "num_groups", "weight", "bias"),
    [
        (ValueError, "48, is not a multiple of num_groups, 32", (1, 48, 2, 2), 32, None, None),
        (ValueError, "8, is not a multiple of num_groups, 0", (1, 8, 2, 2), 0, None, None),
        (ValueError, r"weight has shape .*4.* 8 channels", (1, 8, 2, 2), 4, 4, 8),
        (ValueError, r"bias has shape .*9.* 8 channels", (1, 8, 2, 2), 4, 8, 9),
        (ValueError, r"needs an input \(N, C", (8,), 4, None, None),
    ],
)
def test_bad_arguments_are_refused_with_both_values(
    error: type, message: str, x: tuple, num_groups: int, weight: int | None, bias: int | None
) -> None:
    weight = None if weight is None else torch.ones(weight)
    bias = None if bias is None else torch.ones(bias)
    with pytest.raises(error, match=message):
        group_norm(torch.zeros(x), num_groups, weight, bias)


def test_integer_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        group_norm(torch.zeros(1, 8, 2, 2, dtype=torch.int64), 4)
