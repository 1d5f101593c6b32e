"""The kernels compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support.tables import every_pair

from gn_det.ops.form import FORMS
from gn_det.ops.kernels.launch import Launch
from gn_det.studies.kernels.machine_code import (
    TARGETS,
    MachineCode,
    compile_launch,
    scattered_sums,
)
from gn_det.studies.kernels.report import DTYPES, LAYOUTS, Case, launches_of, mask_rcnn_cases

CASES = {case.name: case for case in mask_rcnn_cases(1)}

# More registers than 64 in a split or 128 in one pass. A thread holds 8 channels in channels_last
# bfloat16 (4 in float32), or rows of several channels where the pixels of a row are odd in number,
# each with its mean, scale, bias and sums; a second norm doubles them.
REGISTERS = {
    ("gradient_sums_kernel", False): 128,  # as many programs fit as with 116
    ("gradient_sums_kernel", True): 168,
    ("apply_gradients_kernel", True): 128,
    ("apply_kernel", True): 80,
    ("one_pass_gradients_kernel", True): 136,
}


def check(code: MachineCode, kernel: str, two_norms: bool, target: str) -> None:
    assert code.spill_bytes == 0
    assert code.atomics == 0
    # Without a loop, what is counted is the whole kernel: its position in the grid, once a program.
    assert code.divisions <= (3 if kernel == "one_pass_kernel" else 0)
    limit = REGISTERS.get((kernel, two_norms), 128 if kernel.startswith("one_pass") else 64)
    if target != "gfx942":  # its 256 threads a SIMD have twice as many
        assert code.registers <= limit


@pytest.mark.parametrize(
    ("site", "layout", "target"),
    every_pair(["FPN, RPN P2", "mask head"], list(LAYOUTS), list(TARGETS)),
)
def test_hot_loops_move_128_bits_at_a_time_and_nothing_spills(
    site: str, layout: str, target: str
) -> None:
    """bfloat16 GN+ReLU, where rows are aligned; those of 14×14 are to 8 bytes, not 16."""
    case = CASES[site]
    widest = 64 if site == "mask head" and layout == "contiguous" else 128
    directions = launches_of(case.shape, FORMS["GN+ReLU"], torch.bfloat16, LAYOUTS[layout])
    for launch in (launch for launches in directions for launch in launches):
        kernel = launch.kernel.__name__
        code = compile_launch(launch, target)
        check(code, kernel, two_norms=False, target=target)
        assert 16 not in code.loads and 16 not in code.stores
        if kernel == "reduce_gradients_kernel":  # reads partial sums only
            continue
        assert widest in code.loads
        if kernel == "apply_gradients_kernel":  # its loop over partial sums is narrower
            assert code.loads[128] == 2 * code.stores[128] and set(code.stores) == {128}
        elif "one_pass" not in kernel:
            assert set(code.loads) | set(code.stores) == {128}
        if "apply" in kernel or "one_pass" in kernel:
            assert widest in code.stores


def test_tensors_that_are_not_aligned_are_read_narrowly_but_right() -> None:
    forward, _ = launches_of(
        CASES["FPN, RPN P2"].shape, FORMS["GN"], torch.bfloat16, torch.contiguous_format
    )
    code = compile_launch(forward[0], "sm_90", aligned=False)
    assert set(code.loads) == {16}
    check(code, "statistics_kernel", two_norms=False, target="sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_form_spills_or_exceeds_its_registers(dtype: str, layout: str, form: str) -> None:
    for site in ("res2 conv1-2", "FPN, RPN P2", "FPN, RPN P5", "box head", "mask head"):
        case: Case = CASES[site]
        directions = launches_of(case.shape, FORMS[form], DTYPES[dtype], LAYOUTS[layout])
        for launch in (launch for launches in directions for launch in launches):
            code = compile_launch(launch, "sm_90")
            check(code, launch.kernel.__name__, FORMS[form].normalize_add, "sm_90")


# Groups whose channels a vector does not hold, several in a tile: one pass and split.
SEVERAL_NARROW_GROUPS = [((2, 96, 9, 11), 32), ((1, 256, 50, 84), 32), ((1, 33, 40, 48), 11)]


@pytest.mark.parametrize(
    ("layout", "dtype", "form"),
    every_pair(list(LAYOUTS), list(DTYPES), ["GN+ReLU", "GN+GN+add+ReLU"]),
)
def test_no_reduction_adds_threads_that_are_no_neighbours(
    layout: str, dtype: str, form: str
) -> None:
    for shape, num_groups in SEVERAL_NARROW_GROUPS:
        directions = launches_of(
            shape, FORMS[form], DTYPES[dtype], LAYOUTS[layout], num_groups=num_groups
        )
        for launch in (launch for launches in directions for launch in launches):
            assert scattered_sums(launch, "sm_90") == 0, (launch.kernel.__name__, shape)


@triton.jit
def sums_of_pairs(x_ptr, y_ptr, num_channels):
    """Of four channels × 32 pixels, channels contiguous, one sum of each two channels."""
    channel = tl.arange(0, 4)
    x = tl.load(x_ptr + tl.arange(0, 32)[None, :] * num_channels + channel[:, None])
    tl.store(y_ptr + tl.arange(0, 2), tl.sum(tl.reshape(x, [2, 64]), axis=1))


def test_such_a_reduction_would_be_found() -> None:
    x = torch.empty(128, device="meta")
    assert scattered_sums(Launch(sums_of_pairs, 1, (x, x, 5), {}, 32), "sm_90") == 1
