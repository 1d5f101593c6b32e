"""The five forms, forward and backward, against the paper's formula: layouts, dtypes and cuts."""

from __future__ import annotations

import pytest
import torch
from support.kernels import (
    CHANNELS_LAST,
    CONTIGUOUS,
    DTYPES,
    LAYOUTS,
    check_against_reference,
    make_inputs,
)
from support.tables import every_pair

from gn_det.ops import plan
from gn_det.ops.form import FORMS

# Several groups, nothing a power of two; a group fits into a program or does not.
ONE_PASS = ((2, 9, 3, 5), 3)
SPLIT = ((1, 6, 31, 37), 2)

# What one small shape cannot show, by name.
CUTS = {
    "several samples": ((2, 6, 25, 41), 2),
    "forward in one pass, backward split": ((1, 15, 21, 23), 3),
    "a group in several tiles": ((2, 40, 13, 17), 1),
    "a group in several tiles, some lanes empty": ((1, 35, 9, 29), 1),
    "several groups in a tile, the last one empty": ((1, 6, 31, 37), 3),
    "narrow groups": ((2, 33, 4, 5), 11),
    "one channel": ((1, 1, 70, 71), 1),
}


def plan_of(shape: tuple, num_groups: int, itemsize: int, layout: torch.memory_format) -> tuple:
    """The plans forward and backward."""
    pixels = shape[2] * shape[3]
    return tuple(
        plan.make_plan(
            shape[0], shape[1], pixels, num_groups, itemsize, layout == CHANNELS_LAST, backward
        )
        for backward in (False, True)
    )


def assert_layout(layout: torch.memory_format, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(memory_format=layout), f"{name} has strides {tensor.stride()}"


@pytest.mark.parametrize(
    ("form", "cut", "layout", "dtype"),
    every_pair(FORMS, {"one_pass": ONE_PASS, "split": SPLIT}, LAYOUTS, DTYPES),
)
def test_output_and_all_gradients_equal_the_papers_formula(
    form, cut, layout, dtype, device: torch.device
) -> None:
    shape, num_groups = cut
    for direction in plan_of(shape, num_groups, dtype.itemsize, layout):
        assert direction.one_pass == (cut is ONE_PASS)
    inputs = make_inputs(form, shape, device, dtype, layout)
    y, gradients = check_against_reference(form, num_groups, inputs)
    images = {name: gradients[name] for name in ("x", "residual") if name in gradients}
    assert_layout(layout, y=y, **images)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_every_cut_of_a_shape_gives_the_same(
    cut: tuple, layout: torch.memory_format, device: torch.device
) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    shape, num_groups = cut
    check_against_reference(form, num_groups, make_inputs(form, shape, device, layout=layout))


def test_the_cuts_are_of_every_kind() -> None:
    for layout in LAYOUTS:
        both = [plan_of(*cut, 4, layout) for cut in CUTS.values()]
        assert any(forward.one_pass and not backward.one_pass for forward, backward in both)
        split = [forward for forward, _ in both if not forward.one_pass]
        assert any(p.parts > 1 for p in split)
        assert any(p.parts > 1 and p.parts * p.lanes > p.channels_per_group for p in split)
        assert any(p.num_splits > 1 and p.num_samples > 1 for p in split)
        if layout == CHANNELS_LAST:
            assert any(p.segments > 1 and p.num_groups % p.segments for p in split)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", ["GN+add+ReLU", "GN+GN+add+ReLU"])
def test_a_program_takes_several_blocks_of_pixels_in_turn(
    form: str, layout: torch.memory_format, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Natural plans with several blocks have hundreds of programs, seconds in the interpreter.
    monkeypatch.setattr(plan, "TARGET_PROGRAMS", 6)
    shape, num_groups = (1, 10, 38, 41), 2
    for direction in plan_of(shape, num_groups, 4, layout):
        # Rows of 64 bytes in channels_last, where other shapes here have 32.
        assert direction.segments * direction.lanes == (16 if layout == CHANNELS_LAST else 8)
        # The last block is not full, and the last split has fewer blocks.
        assert direction.split_blocks > 1 and direction.num_splits > 1
        assert direction.num_pixels % (direction.split_blocks * direction.block_pixels)
    inputs = make_inputs(FORMS[form], shape, device, layout=layout)
    check_against_reference(FORMS[form], num_groups, inputs)


@pytest.mark.slow
def test_a_natural_plan_takes_several_blocks_of_pixels_in_turn(device: torch.device) -> None:
    shape, num_groups = (1, 128, 91, 91), 1
    forward, _ = plan_of(shape, num_groups, 4, CONTIGUOUS)
    assert forward.split_blocks > 1 and forward.num_splits > 1 and forward.parts > 1
    check_against_reference(FORMS["GN"], num_groups, make_inputs(FORMS["GN"], shape, device))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", ["GN+ReLU", "GN+add+ReLU", "GN+GN+add+ReLU"])
def test_a_program_takes_several_samples_in_turn(
    form: str, layout: torch.memory_format, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "GRADIENT_THREADS", 1)
    shape, num_groups = (5, 6, 3, 4), 2
    _, backward = plan_of(shape, num_groups, 4, layout)
    assert backward.samples_per_run == 5 and backward.num_runs == 1
    monkeypatch.setattr(plan, "GRADIENT_THREADS", 2 * 64 * backward.num_tiles)
    _, backward = plan_of(shape, num_groups, 4, layout)
    # The last run is shorter.
    assert backward.samples_per_run == 2 and backward.num_runs == 3
    inputs = make_inputs(FORMS[form], shape, device, layout=layout)
    check_against_reference(FORMS[form], num_groups, inputs)


@pytest.mark.parametrize("cut", [ONE_PASS, SPLIT], ids=["one_pass", "split"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "bias_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_parameters_have_dtypes_of_their_own_and_so_have_their_gradients(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    cut: tuple,
    device: torch.device,
) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    shape, num_groups = cut
    inputs = make_inputs(form, (1, *shape[1:]), device, dtype)
    dtypes = {
        "weight": weight_dtype,
        "bias": bias_dtype,
        "residual_weight": bias_dtype,
        "residual_bias": weight_dtype,
    }
    inputs |= {name: inputs[name].to(dtypes[name]) for name in dtypes}
    check_against_reference(form, num_groups, inputs)


@pytest.mark.parametrize("cut", [ONE_PASS, SPLIT], ids=["one_pass", "split"])
@pytest.mark.parametrize(
    "parameters",
    [(), ("weight",), ("bias",), ("bias", "residual_weight"), ("weight", "residual_bias")],
    ids=lambda names: "+".join(names) or "none",
)
def test_any_parameter_may_be_missing(
    parameters: tuple[str, ...], cut: tuple, device: torch.device
) -> None:
    normalize_residual = any(name.startswith("residual") for name in parameters)
    form = FORMS["GN+GN+add+ReLU" if normalize_residual else "GN+ReLU"]
    shape, num_groups = cut
    inputs = make_inputs(form, (1, *shape[1:]), device)
    images = {name: inputs[name] for name in ("x", "residual") if name in inputs}
    check_against_reference(form, num_groups, images | {name: inputs[name] for name in parameters})


@pytest.mark.parametrize("shape", [(2, 12), (2, 12, 35), (1, 12, 1500), (2, 12, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_two_three_and_five_dimensions(form, shape: tuple, device: torch.device) -> None:
    y, _ = check_against_reference(form, 3, make_inputs(form, shape, device))
    assert_layout(CONTIGUOUS, y=y)


@pytest.mark.parametrize(
    "shape", [(2, 12, 3, 4, 5), (1, 12, 11, 10, 10)], ids=["one_pass", "split"]
)
def test_volumes_in_channels_last(shape: tuple, device: torch.device) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    inputs = make_inputs(form, shape, device, layout=torch.channels_last_3d)
    y, gradients = check_against_reference(form, 3, inputs)
    images = {name: gradients[name] for name in ("x", "residual")}
    assert_layout(torch.channels_last_3d, y=y, **images)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("cut", [ONE_PASS, SPLIT], ids=["one_pass", "split"])
def test_eps_is_added_to_the_variance(cut: tuple, eps: float, device: torch.device) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    shape, num_groups = cut
    inputs = make_inputs(form, (1, *shape[1:]), device)
    check_against_reference(form, num_groups, inputs, eps=eps)
