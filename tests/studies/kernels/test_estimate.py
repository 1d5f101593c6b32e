"""The estimate follows from bytes, launches and programs, and says so."""

from __future__ import annotations

import pytest

from gn_det.ops.form import FORMS
from gn_det.studies.kernels.estimate import (
    ASSUMPTIONS,
    CARDS,
    OF_PEAK,
    SECONDS_OF_LAUNCH,
    Work,
    bound_of,
    card_of,
    estimate_rows,
    microseconds,
)
from gn_det.studies.kernels.peers import PEER_SHAPE, peer_rows
from gn_det.studies.kernels.report import Case, mask_rcnn_cases

GIB = 2**30
H100 = CARDS["H100"]
FULL = Work(["x"], ["y"], programs=132 * 64, threads=256)
LAUNCH = 1e6 * SECONDS_OF_LAUNCH


def test_a_large_tensor_takes_its_bytes_at_the_memorys_speed() -> None:
    expected = 1e6 * 2 * GIB / (H100.memory * 1e9 * OF_PEAK) + LAUNCH
    assert microseconds([FULL], GIB, H100) == pytest.approx(expected)
    assert bound_of([FULL], GIB, H100) == pytest.approx((expected - LAUNCH) * OF_PEAK)


def test_an_empty_launch_takes_its_launch() -> None:
    assert microseconds([Work([], [], 1, 64)] * 3, GIB, H100) == pytest.approx(3 * LAUNCH)


def test_few_programs_do_not_reach_the_memorys_speed() -> None:
    times = [microseconds([FULL._replace(programs=n)], GIB, H100) for n in (1, 8, 64, 512)]
    assert times == sorted(times, reverse=True) and times[0] > 7 * times[1]


def test_a_last_wave_that_is_not_full_costs_as_much_as_a_full_one() -> None:
    thin = Work(["x"], ["y"], programs=528, threads=64, registers=255)  # 4 a multiprocessor
    one, two = (microseconds([thin._replace(programs=n)], GIB, H100) for n in (528, 529))
    assert two > 1.9 * one


@pytest.mark.parametrize(("tensor_bytes", "cached"), [(2**20, True), (40 * 2**20, False)])
def test_what_was_just_read_comes_from_the_cache_where_it_fits(
    tensor_bytes: int, cached: bool
) -> None:
    again = microseconds([FULL, FULL], tensor_bytes, H100)
    other = FULL._replace(reads=["a"], writes=["b"])
    assert (again < microseconds([FULL, other], tensor_bytes, H100)) == cached


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_shape_has_an_estimate_on_every_card(form: str, layout: str) -> None:
    for card in CARDS:
        rows = estimate_rows(mask_rcnn_cases(1), form, "bf16", layout, card)
        assert len(rows) == 16
        for row in rows:
            assert all(value > 0 for name, value in row.items() if name != "site")
            assert ("compiled forward µs" in row) == (form == "GN+ReLU" and layout == "contiguous")


def test_atens_launches_are_those_of_the_table_of_peers() -> None:
    peer = next(row for row in peer_rows() if row["implementation"] == "ATen, GN then ReLU")
    from gn_det.studies.kernels.estimate import _atens

    directions = _atens(Case("res2", PEER_SHAPE), FORMS["GN+ReLU"], "contiguous")
    assert " + ".join(str(len(works)) for works in directions) == peer["launches"]
    for name, works in zip(("forward", "backward"), directions, strict=True):
        reads, writes = (sum(len(work[i]) for work in works) for i in (0, 1))
        assert peer[name].startswith(f"{reads}R+{writes}W")


def test_a_card_is_known_by_its_devices_name() -> None:
    assert card_of("NVIDIA H100 80GB HBM3") == "H100"
    assert card_of("NVIDIA GeForce RTX 4090") == "RTX 4090" and card_of("Tesla T4") is None


def test_the_assumptions_are_told() -> None:
    assert "Assumed:" in ASSUMPTIONS and "L2" in ASSUMPTIONS
