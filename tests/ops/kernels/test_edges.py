"""Edges: empty batches, odd sizes, any strides, NaN and Inf, extreme values, huge tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from support.kernels import (
    CHANNELS_LAST,
    CONTIGUOUS,
    LAYOUTS,
    check_against_reference,
    make_inputs,
    run_kernels,
)
from support.tables import every_pair
from torch import Tensor

from gn_det.ops import group_norm
from gn_det.ops.form import FORMS
from gn_det.ops.kernels.tile import tile_offsets
from gn_det.ops.reference import group_norm_reference

NORMALIZED = FORMS["GN+GN+add+ReLU"]

# A group fits into a program, or does not; two groups in a tile of channels_last.
ONE_PASS = ((2, 8, 3, 5), 4)
SPLIT = ((2, 8, 25, 41), 2)


@pytest.mark.parametrize("size", [(7, 7), (28, 41)], ids=["one pass", "split"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_empty_batch_gives_zero_not_missing_parameter_gradients(
    form, layout: torch.memory_format, size: tuple[int, int], device: torch.device
) -> None:
    inputs = make_inputs(form, (0, 8, *size), device, layout=layout)
    y, gradients = run_kernels(form, 4, inputs, torch.zeros(0, 8, *size, device=device))
    assert y.shape == (0, 8, *size)
    for name, gradient in gradients.items():
        assert gradient.shape == inputs[name].shape
        assert torch.equal(gradient, torch.zeros_like(inputs[name]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((2, 1, 5, 7), 1),
        ((2, 6, 5, 7), 1),
        ((2, 6, 5, 7), 6),
        ((3, 8, 1, 1), 2),
        ((2, 8, 7, 7), 4),
        ((1, 4, 30, 35), 2),  # 1050, the anchors of a RetinaNet level's smallest image side
        ((1, 6, 1, 61), 2),
        ((1, 4, 1009, 1), 2),
        ((2, 6, 3, 3), 2),
        ((1, 33, 3, 3), 11),
        ((2, 10, 3, 3), 2),  # 5 channels per group
        ((1, 48, 3, 3), 2),  # 24
        ((1, 2, 361, 370), 1),  # more than 128 programs for one group
        ((1, 33, 96, 96), 1),  # the same, of three or five parts each
    ],
    ids=str,
)
def test_channels_groups_and_pixels_of_any_number(
    shape: tuple, num_groups: int, layout: torch.memory_format, device: torch.device
) -> None:
    check_against_reference(
        NORMALIZED, num_groups, make_inputs(NORMALIZED, shape, device, layout=layout)
    )


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 1, 1)], ids=str)
def test_a_group_of_one_element_is_its_bias(shape: tuple, device: torch.device) -> None:
    inputs = make_inputs(FORMS["GN"], shape, device)
    y, gradients = run_kernels(FORMS["GN"], 6, inputs, torch.randn(shape, device=device))
    assert torch.equal(y.flatten(1), inputs["bias"].expand(2, 6))
    assert not gradients["weight"].any()
    # rstd is 316, and what cancels is rounded before.
    assert gradients["x"].abs().max() < 1e-3


STRIDED: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "sliced": lambda randn: randn(2, 9, 7, 11)[:, 2:8, 1:6, ::2],
    "transposed": lambda randn: randn(2, 6, 6, 5).transpose(2, 3),
    "samples and channels swapped": lambda randn: randn(6, 2, 5, 6).transpose(0, 1),
    "permuted": lambda randn: randn(5, 6, 2, 6).permute(2, 1, 3, 0).transpose(2, 3),
    "expanded along height": lambda randn: randn(2, 6, 1, 6).expand(2, 6, 5, 6),
    "expanded along channels": lambda randn: randn(2, 1, 5, 6).expand(2, 6, 5, 6),
    "offset by one element": lambda randn: randn(361)[1:].view(2, 6, 5, 6),
    "three dimensions, channels densest": lambda randn: randn(2, 30, 6).transpose(1, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strides_of_the_input_do_not_matter(
    make: Callable[[Callable[..., Tensor]], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    form = FORMS["GN+add+ReLU"]
    strided = make(functools.partial(torch.randn, device=device, dtype=dtype))
    inputs = make_inputs(form, tuple(strided.shape), device, dtype)
    y, _ = check_against_reference(form, 2, inputs | {"x": strided})
    assert y.is_contiguous()
    check_against_reference(form, 2, inputs | {"residual": strided})


@pytest.mark.parametrize("stride", [0, 3])
def test_strides_of_the_parameters_do_not_matter(stride: int, device: torch.device) -> None:
    inputs = make_inputs(NORMALIZED, (2, 6, 5, 6), device)
    for name in inputs:
        if name not in ("x", "residual"):
            inputs[name] = torch.randn(16, device=device).as_strided((6,), (stride,))
    check_against_reference(NORMALIZED, 2, inputs)


@pytest.mark.parametrize(
    "part", [(slice(None), slice(3, 9)), (slice(None), slice(None), slice(1, 4))], ids=str
)
def test_a_part_of_a_channels_last_input_gives_channels_last(
    part: tuple, device: torch.device
) -> None:
    x = torch.randn(2, 12, 5, 7, device=device).contiguous(memory_format=CHANNELS_LAST)[part]
    assert not x.is_contiguous(memory_format=CHANNELS_LAST)
    inputs = make_inputs(NORMALIZED, tuple(x.shape), device) | {"x": x}
    y, gradients = check_against_reference(NORMALIZED, 3, inputs)
    for tensor in (y, gradients["x"], gradients["residual"]):
        assert tensor.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_residual_and_gradient_may_arrive_in_the_other_layout(
    form, layout: torch.memory_format, device: torch.device
) -> None:
    other = CONTIGUOUS if layout == CHANNELS_LAST else CHANNELS_LAST
    inputs = make_inputs(form, (2, 6, 5, 7), device, layout=layout)
    if form.add:
        inputs["residual"] = inputs["residual"].contiguous(memory_format=other)
    dy = torch.randn(2, 6, 5, 7, device=device).contiguous(memory_format=other)
    y, gradients = check_against_reference(form, 2, inputs, dy)
    for tensor in (y, gradients["x"]):
        assert tensor.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_gradient_may_be_one_number_expanded(
    form, layout: torch.memory_format, device: torch.device
) -> None:
    inputs = make_inputs(form, (2, 6, 5, 7), device, layout=layout)
    dy = torch.ones((), device=device).expand(2, 6, 5, 7)
    check_against_reference(form, 2, inputs, dy)


def test_sum_backward_fills_the_grad_of_every_leaf(device: torch.device) -> None:
    inputs = make_inputs(FORMS["GN+add"], (2, 6, 5, 7), device)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    group_norm(**leaves, num_groups=2).sum().backward()
    assert torch.equal(leaves["residual"].grad, torch.ones(2, 6, 5, 7, device=device))
    assert torch.equal(leaves["bias"].grad, torch.full((6,), 70.0, device=device))
    expected = leaves["x"].detach().double().requires_grad_()
    group_norm_reference(expected, 2, leaves["weight"]).sum().backward()
    assert torch.allclose(leaves["x"].grad, expected.grad.float(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize(
    ("cut", "poison", "layout"),
    every_pair(
        {"one_pass": ONE_PASS, "split": SPLIT},
        {"inf": ("GN+ReLU", "x", torch.inf), "nan": ("GN+GN+add+ReLU", "residual", torch.nan)},
        LAYOUTS,
    ),
)
def test_nan_and_inf_spoil_their_own_group_and_no_bit_of_another(
    cut: tuple,
    poison: tuple[str, str, float],
    layout: torch.memory_format,
    device: torch.device,
) -> None:
    (shape, num_groups), (form, poisoned, value) = cut, poison
    inputs = make_inputs(FORMS[form], shape, device, layout=layout)
    dy = torch.randn(shape, device=device)
    y, gradients = run_kernels(FORMS[form], num_groups, inputs, dy)
    width = shape[1] // num_groups
    group = slice(width, 2 * width)
    others = torch.ones(shape[:2], dtype=torch.bool, device=device)
    others[1, group] = False
    other_channels = others[1]
    inputs[poisoned][1, width + 1, 2, 3] = value
    bad_y, bad_gradients = run_kernels(FORMS[form], num_groups, inputs, dy)
    # All of the group's output: ReLU lets NaN through.
    assert bad_y[1, group].isnan().all() and bad_gradients[poisoned][1, group].isnan().all()
    assert torch.equal(bad_y[others], y[others])
    for name, gradient in gradients.items():
        kept = others if gradient.dim() == 4 else other_channels
        assert torch.equal(bad_gradients[name][kept], gradient[kept]), f"d{name}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), [ONE_PASS, SPLIT], ids=["one_pass", "split"])
def test_constant_groups_give_exactly_the_bias_and_finite_gradients(
    shape: tuple, num_groups: int, layout: torch.memory_format, device: torch.device
) -> None:
    inputs = make_inputs(FORMS["GN"], shape, device, layout=layout)
    values = torch.tensor([0.0, 0.1, -7.3, 1e4 / 3, 1e-3, -3e5, 1.0, 1 / 3], device=device)
    for value in values.split(shape[0] * num_groups):
        constant = value.repeat_interleave(shape[1] // num_groups).view(*shape[:2], 1, 1)
        inputs["x"] = constant.expand(shape).contiguous(memory_format=layout)
        y, gradients = run_kernels(FORMS["GN"], num_groups, inputs, torch.randn(shape).to(device))
        assert torch.equal(y, inputs["bias"].view(1, -1, 1, 1).expand(shape))
        assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), [ONE_PASS, SPLIT], ids=["one_pass", "split"])
def test_a_mean_of_ten_thousand_deviations_costs_a_thousandth(
    shape: tuple, num_groups: int, layout: torch.memory_format, device: torch.device
) -> None:
    inputs = {"x": (1e4 + torch.randn(shape)).to(device).contiguous(memory_format=layout)}
    y, _ = check_against_reference(FORMS["GN"], num_groups, inputs, error=1e-3)
    assert (y.double() - group_norm_reference(inputs["x"], num_groups)).abs().max() < 1e-3


@pytest.mark.parametrize("eps", [1e-5, 1e-14])
@pytest.mark.parametrize(("shape", "num_groups"), [ONE_PASS, SPLIT], ids=["one_pass", "split"])
def test_a_deviation_of_a_millionth(
    shape: tuple, num_groups: int, eps: float, device: torch.device
) -> None:
    inputs = {"x": 1e-6 * torch.randn(shape, device=device)}
    check_against_reference(FORMS["GN"], num_groups, inputs, eps=eps)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), [ONE_PASS, SPLIT], ids=["one_pass", "split"])
def test_squares_beyond_float16_do_no_harm(
    shape: tuple, num_groups: int, layout: torch.memory_format, device: torch.device
) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    inputs = make_inputs(form, shape, device, torch.float16, layout)
    for name in ("x", "residual"):
        inputs[name] = (300 + 700 * torch.rand_like(inputs[name])) * inputs[name].sign()
    check_against_reference(form, num_groups, inputs)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), [ONE_PASS, SPLIT], ids=["one_pass", "split"])
def test_a_variance_beyond_float32_gives_nan_not_zeros(
    shape: tuple, num_groups: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = (1e30 * torch.randn(shape)).to(device, dtype)
    assert group_norm(x, num_groups, activation="relu").isnan().all()


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (1, 6, 25, 45)], ids=["one_pass", "split"])
def test_one_group_is_layer_norm_and_a_group_a_channel_is_instance_norm(
    shape: tuple, device: torch.device
) -> None:
    x = torch.randn(shape, device=device)
    assert torch.allclose(group_norm(x, 1), F.layer_norm(x, x.shape[1:]), atol=1e-5)
    assert torch.allclose(group_norm(x, 6), F.instance_norm(x), atol=1e-5)


@triton.jit
def store_offsets(
    out_ptr, first_channel, first_pixel, num_channels, num_pixels, channels_last: tl.constexpr
):
    """The offsets of 4 channels × 8 pixels."""
    lane = tl.arange(0, 4)
    pixel = tl.arange(0, 8)
    offsets = tile_offsets(
        first_channel + lane,
        first_pixel + pixel,
        num_channels.to(tl.int64),
        num_pixels.to(tl.int64),
        channels_last,
    )
    tl.store(out_ptr + lane[:, None] * 8 + pixel[None, :], offsets)


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_beyond_two_to_the_31st(channels_last: bool, device: torch.device) -> None:
    channels, pixels = 64, 6001 * 7001
    first_channel, first_pixel = channels - 4, pixels - 8
    out = torch.zeros(4, 8, dtype=torch.int64, device=device)
    store_offsets[(1,)](out, first_channel, first_pixel, channels, pixels, channels_last)
    expected = [
        [pixel * channels + channel if channels_last else channel * pixels + pixel
         for pixel in range(first_pixel, pixels)]
        for channel in range(first_channel, channels)
    ]  # fmt: skip
    assert out.tolist() == expected and out.max() > 2**31
