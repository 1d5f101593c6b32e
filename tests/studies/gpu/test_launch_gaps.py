"""What a trace of kernels says of the time between them."""

from __future__ import annotations

import pytest

from gn_det.studies.gpu.launch_gaps import gaps_of


@pytest.mark.parametrize(
    ("kernels", "calls", "expected"),
    [
        ([(0, 10), (10, 30)], 1, (2, 30, 0, 0)),
        ([(0, 10), (15, 20), (27, 28)], 1, (3, 16, 12, 6)),
        ([(27, 28), (0, 10), (15, 20)], 1, (3, 16, 12, 6)),  # the trace is not in order
        ([(0, 10), (5, 8), (6, 20)], 1, (3, 20, 0, 0)),  # two streams at once
        ([(0, 1), (3, 4), (6, 7), (9, 10)], 2, (2, 2, 3, 2)),
        ([(5, 6)], 1, (1, 1, 0, 0)),
    ],
)
def test_busy_and_idle_time_of_a_call(kernels: list, calls: int, expected: tuple) -> None:
    assert tuple(gaps_of(kernels, calls).values()) == pytest.approx(expected)


def test_a_trace_without_kernels_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no kernels"):
        gaps_of([], 1)
