"""Random shapes, layouts, dtypes and forms against the paper's formula."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kernels import CHANNELS_LAST, CONTIGUOUS, DTYPES, check_against_reference, make_inputs

from gn_det.ops.form import FORMS
from gn_det.ops.plan import make_plan

# Programs of one launch: these take the interpreter a second, forward and backward.
MAX_PROGRAMS = 12


@st.composite
def shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """A shape of two to four dimensions, and a number of groups."""
    samples = draw(st.integers(0, 3))
    num_groups = draw(st.integers(1, 6))
    channels = num_groups * draw(st.integers(1, 40))
    spatial = draw(st.lists(st.integers(1, 40), min_size=0, max_size=2))
    return (samples, channels, *spatial), num_groups


def is_small(shape_and_groups: tuple[tuple[int, ...], int]) -> bool:
    (samples, channels, *spatial), num_groups = shape_and_groups
    plans = [
        make_plan(samples, channels, math.prod(spatial), num_groups, itemsize, last, back)
        for itemsize in (2, 4)
        for last in (False, True)
        for back in (False, True)
    ]
    return max(plan.num_programs for plan in plans) <= MAX_PROGRAMS


# The device is the same for all examples.
@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    shape_and_groups=shapes().filter(is_small),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(list(FORMS)),
)
def test_any_shape_equals_the_papers_formula(
    shape_and_groups: tuple[tuple[int, ...], int],
    channels_last: bool,
    dtype: torch.dtype,
    form: str,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    shape, num_groups = shape_and_groups
    layout = CHANNELS_LAST if channels_last and len(shape) == 4 else CONTIGUOUS
    inputs = make_inputs(FORMS[form], shape, device, dtype, layout)
    check_against_reference(FORMS[form], num_groups, inputs)
