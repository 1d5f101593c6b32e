"""What the kernels read and write, counted in the interpreter."""

from __future__ import annotations

import pytest
import torch
from support.kernels import INTERPRETED
from support.tables import every_pair

from gn_det.ops.form import FORMS
from gn_det.studies.kernels.report import (
    LAYOUTS,
    Case,
    accuracy_rows,
    launches_of,
    mask_rcnn_cases,
    passes_of,
    traffic_row,
)
from gn_det.studies.kernels.traffic import SECTOR_BYTES, count_traffic

counted = pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts, not the GPU")

CASES = {case.name: case for case in mask_rcnn_cases(1)}

SPLIT_PASSES = {
    "GN": ((2, 1), (4, 1)),
    "GN+ReLU": ((2, 1), (4, 1)),
    "GN+add+ReLU": ((3, 1), (5, 2)),
    "GN+GN+add+ReLU": ((4, 1), (6, 2)),
    "GN+add": ((3, 1), (4, 1)),
}
ONE_PASS_PASSES = {
    "GN": ((1, 1), (2, 1)),
    "GN+ReLU": ((1, 1), (2, 1)),
    "GN+add+ReLU": ((2, 1), (3, 2)),
    "GN+GN+add+ReLU": ((2, 1), (3, 2)),
    "GN+add": ((2, 1), (2, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_passes_over_memory_are_those_of_the_design(form: str, layout: str) -> None:
    for site, expected in (("res2 conv3", SPLIT_PASSES), ("mask head", ONE_PASS_PASSES)):
        shape = CASES[site].shape
        directions = launches_of(shape, FORMS[form], torch.bfloat16, LAYOUTS[layout])
        assert tuple(passes_of(launches, shape) for launches in directions) == expected[form]


@counted
@pytest.mark.parametrize(
    ("shape", "form", "layout"),
    every_pair({"one pass": (2, 16, 24, 40), "split": (2, 8, 40, 56)}, list(FORMS), list(LAYOUTS)),
)
def test_every_element_of_a_tensor_is_moved_exactly_once_a_pass(
    shape: tuple[int, ...], form: str, layout: str
) -> None:
    groups = 4
    tensor_bytes = 2 * torch.Size(shape).numel()
    for launches in launches_of(
        shape, FORMS[form], torch.bfloat16, LAYOUTS[layout], "cpu", num_groups=groups
    ):
        reads, writes = passes_of(launches, shape)
        counts = [count_traffic(launch) for launch in launches]
        for direction, number in (("loads", reads), ("stores", writes)):
            accesses = [
                access
                for launch, traffic in zip(launches, counts, strict=True)
                for name, access in getattr(traffic, direction).items()
                if launch.arguments[launch.kernel.arg_names.index(name)].shape == shape
            ]
            assert len(accesses) == number
            for access in accesses:
                assert access.bytes == tensor_bytes
                assert access.bytes >= 0.95 * access.sectors * SECTOR_BYTES


LARGE = ["stem", "res2 conv3", "res3 conv3", "FPN, RPN P3"]


@counted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("site", LARGE)
def test_all_else_is_a_small_part_of_the_passes(site: str, layout: str) -> None:
    """In channels_last each program reads the partials of several groups, mostly from the cache."""
    row = traffic_row(CASES[site], "GN+ReLU", "bf16", layout)
    most = 1.0 if layout == "contiguous" else 5.0  # percent
    for direction in ("forward", "backward"):
        assert float(row[f"{direction} other"].rstrip("%")) <= most
        assert float(row[f"{direction} sectors"].rstrip("%")) >= 95


@counted
def test_narrow_tensors_pay_most_for_their_partials_and_parameters() -> None:
    """64 channels_last channels in bfloat16 have 32 groups in 4 tiles; 7×7 has 49 pixels each."""
    narrow = traffic_row(CASES["res2 conv1-2"], "GN+ReLU", "bf16", "channels_last")
    assert float(narrow["forward other"].rstrip("%")) <= 12.0
    box = traffic_row(CASES["box head"], "GN+ReLU", "bf16", "contiguous")
    assert float(box["forward other"].rstrip("%")) <= 5.0
    assert float(box["forward sectors"].rstrip("%")) >= 95


def test_errors_stay_within_those_of_pytorch_or_a_few_ulp() -> None:
    for row in accuracy_rows():
        assert row["ours, ulp"] <= max(1.5 * row["ATen, ulp"], 4.0), row


@counted
def test_an_address_outside_of_the_tensors_is_an_error() -> None:
    case = Case("small", (1, 8, 8, 8))
    (launch,), _ = launches_of(
        case.shape, FORMS["GN"], torch.float32, torch.contiguous_format, "cpu", num_groups=2
    )
    arguments = list(launch.arguments)
    arguments[1] = arguments[1][:, :4].contiguous()  # y too small
    with pytest.raises(Exception, match="lie in none of"):
        count_traffic(launch._replace(arguments=tuple(arguments)))
