"""Memory: nothing is read that was not written, ReLU's mask is the output's, bits repeat."""

from __future__ import annotations

import pytest
import torch
from support.kernels import LAYOUTS, check_against_reference, make_inputs, run_kernels
from support.tables import every_pair

from gn_det.ops.form import FORMS
from gn_det.ops.reference import group_norm_reference

# Lanes, pixels and, in channels_last, groups of a tile are partly empty in both.
ONE_PASS = ((2, 9, 3, 5), 3)
SPLIT = ((1, 9, 25, 41), 3)


@pytest.mark.parametrize(
    ("form", "cut", "layout"), every_pair(FORMS, {"one_pass": ONE_PASS, "split": SPLIT}, LAYOUTS)
)
def test_what_memory_held_before_does_not_matter(
    form,
    cut: tuple,
    layout: torch.memory_format,
    nan_in_new_memory: list[torch.Size],
    device: torch.device,
) -> None:
    shape, num_groups = cut
    inputs = make_inputs(form, shape, device, layout=layout)
    check_against_reference(form, num_groups, inputs)
    # y and dx at the least.
    assert nan_in_new_memory.count(torch.Size(shape)) >= 2


@pytest.mark.parametrize("cut", [ONE_PASS, SPLIT], ids=["one_pass", "split"])
@pytest.mark.parametrize("form", ["GN+add+ReLU", "GN+GN+add+ReLU"])
def test_repeated_runs_give_the_same_bits(form: str, cut: tuple, device: torch.device) -> None:
    shape, num_groups = cut
    inputs = make_inputs(FORMS[form], shape, device)
    dy = torch.randn(shape, device=device)
    y, gradients = run_kernels(FORMS[form], num_groups, inputs, dy)
    again_y, again = run_kernels(FORMS[form], num_groups, inputs, dy)
    assert torch.equal(again_y, y)
    assert all(torch.equal(again[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize(
    ("form", "cut", "layout"),
    every_pair(
        ["GN+ReLU", "GN+add+ReLU", "GN+GN+add+ReLU"],
        {"one_pass": ONE_PASS, "split": SPLIT},
        LAYOUTS,
    ),
)
def test_gradients_pass_exactly_where_the_output_is_positive(
    form: str, cut: tuple, layout: torch.memory_format, device: torch.device
) -> None:
    shape, num_groups = cut
    inputs = make_inputs(FORMS[form], shape, device, torch.float16, layout)
    # Outputs of a few times 3e-8, which float16 rounds to 0 or 6e-8: half of the positive z are 0.
    for name in inputs:
        inputs[name] = (3e-8 if "weight" in name else 0) * inputs[name].sign()
    # A deviation of 1e-3, so that dx is of a size that float16 can hold.
    inputs["x"] = (1e-3 * torch.randn(shape)).to(inputs["x"])
    if FORMS[form].normalize_add:
        inputs["residual"] = (1e-3 * torch.randn(shape)).to(inputs["x"])
    eps = 1e-12
    # Whole numbers, whose sums are exact in any order.
    dy = 1024 * torch.randint(-8, 9, shape).to(inputs["x"])

    y, gradients = check_against_reference(FORMS[form], num_groups, inputs, dy, eps)
    residual = FORMS[form].normalize_add
    z = group_norm_reference(**inputs, num_groups=num_groups, eps=eps, normalize_residual=residual)
    assert ((z > 0) & (y == 0)).sum() > z.numel() / 20 and (y > 0).any()
    expected = (dy.double() * (y > 0)).sum(dim=(0, 2, 3))
    assert torch.equal(gradients["bias"].double(), expected)
    if residual:
        assert torch.equal(gradients["residual_bias"].double(), expected)
    elif FORMS[form].add:
        assert torch.equal(gradients["residual"], dy * (y > 0))


@pytest.mark.parametrize("cut", [ONE_PASS, SPLIT], ids=["one_pass", "split"])
def test_no_gradient_passes_where_the_output_is_zero(cut: tuple, device: torch.device) -> None:
    shape, num_groups = cut
    inputs = make_inputs(FORMS["GN+ReLU"], shape, device)
    inputs["x"] = torch.ones_like(inputs["x"])
    inputs["bias"] = torch.zeros_like(inputs["bias"])
    dy = torch.randn(shape, device=device)
    y, gradients = run_kernels(FORMS["GN+ReLU"], num_groups, inputs, dy)
    assert not any(tensor.any() for tensor in (y, *gradients.values()))
