"""The cut of a shape into programs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gn_det.ops.plan import TARGET_PROGRAMS, make_plan
from gn_det.studies.kernels.report import Case, mask_rcnn_cases

SPLIT_SITES = ("stem", "res2", "res3", "FPN, RPN P2", "FPN, RPN P3")
LARGE = [case for case in mask_rcnn_cases(1) if case.name.startswith(SPLIT_SITES)]
ROI_HEADS = [case for case in mask_rcnn_cases(1) if case.name.endswith("head")]


def plan_of(
    case: Case, itemsize: int, channels_last: bool, backward: bool = False, num_groups: int = 32
):
    n, c, height, width = case.shape
    return make_plan(n, c, height * width, num_groups, itemsize, channels_last, backward)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_groups", [1, 2, 32])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_one_image_fills_the_chip_at_every_large_site(
    case: Case, num_groups: int, itemsize: int, channels_last: bool
) -> None:
    for backward in (False, True):
        plan = plan_of(case, itemsize, channels_last, backward, num_groups)
        assert not plan.one_pass
        assert 2 * 132 <= plan.num_programs <= TARGET_PROGRAMS


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("case", ROI_HEADS, ids=lambda case: case.name)
def test_the_groups_of_roi_heads_stay_in_registers(
    case: Case, itemsize: int, channels_last: bool
) -> None:
    for backward in (False, True):
        plan = plan_of(case, itemsize, channels_last, backward)
        assert plan.one_pass and plan.num_splits == 1


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    num_samples=st.integers(0, 600),
    num_groups=st.integers(1, 64),
    channels_per_group=st.integers(1, 5000),
    num_pixels=st.integers(1, 2**28),
    itemsize=st.sampled_from([2, 4]),
    channels_last=st.booleans(),
    backward=st.booleans(),
)
def test_any_shape_is_covered_within_the_kernels_limits(
    num_samples: int,
    num_groups: int,
    channels_per_group: int,
    num_pixels: int,
    itemsize: int,
    channels_last: bool,
    backward: bool,
) -> None:
    plan = make_plan(
        num_samples, num_groups * channels_per_group, num_pixels, num_groups, itemsize,
        channels_last, backward,
    )  # fmt: skip
    assert plan.parts * plan.lanes >= channels_per_group
    assert plan.num_tiles * plan.segments >= num_groups * plan.parts
    assert plan.num_splits * plan.split_blocks * plan.block_pixels >= num_pixels
    # No split is empty, and one program of the second launch can read the partials of all.
    assert (plan.num_splits - 1) * plan.split_blocks * plan.block_pixels < num_pixels
    assert plan.num_splits * plan.parts <= plan.max_entries
    assert plan.segments == 1 or plan.parts == 1
    assert 64 <= plan.num_threads <= 512
    assert plan.num_runs * plan.samples_per_run >= num_samples
    contiguous = plan.num_channels if plan.channels_last else num_pixels
    assert contiguous % plan.vector == 0


def test_one_pixel_is_read_along_channels() -> None:
    assert make_plan(4, 64, 1, 32, 4, channels_last=False, backward=False).channels_last


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_or_two_samples_leave_no_partial_sums_of_parameters(
    num_samples: int, channels_last: bool
) -> None:
    for channels, pixels in ((64, 16), (256, 49), (256, 14 * 14), (2048, 9)):
        plan = make_plan(num_samples, channels, pixels, 32, 4, channels_last, backward=True)
        assert plan.one_pass and plan.num_runs == 1
