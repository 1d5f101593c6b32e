"""tools/plan_memory.py: the plan of a real config, without a GPU and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.programs import ROOT, run_program

from gn_det import InputError
from gn_det.config import get_config
from gn_det.studies.memory.step import measure_step

TOOL = "tools/plan_memory.py"
SMALL = str(ROOT / "configs/small/mask_rcnn_R_18_FPN_gn.yaml")


def test_prints_tables_what_to_change_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "plan.png"
    done = run_program(
        TOOL, "--config-file", SMALL, "--gpu-memory", "340MiB", "--ims-per-gpu", 2,
        "--sizes", "256x320", "--output", picture,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gn_det, RECOMPUTE") == 1
    assert "Not counted: CUDA's context" in done.stdout
    assert "2 images of 256×320: MODEL.GN.RECOMPUTE True" in done.stdout
    assert picture.stat().st_size > 0


def test_an_existing_picture_is_not_overwritten(call_main: Callable, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    picture.write_text("mine")
    with pytest.raises(InputError, match=r"plan\.png exists; remove it, or name another"):
        call_main(TOOL, "--config-file", SMALL, "--gpu-memory", "8GiB", "--output", picture)
    assert picture.read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu-memory", "8"], "--gpu-memory 8: give a number and a unit"),
        (
            ["--gpu-memory", "8GiB", "--ims-per-gpu", "0"],
            "--ims-per-gpu 0: at least 1",
        ),
        (["--gpu-memory", "8GiB", "--sizes", "800"], "--sizes 800: give HEIGHTxWIDTH"),
        (["--gpu-memory", "8GiB", "--sizes", "0x10"], "--sizes 0x10: give HEIGHTxWIDTH"),
        (
            ["--gpu-memory", "8GiB", "MODEL.META_ARCHITECTURE", "GNPanopticFPN"],
            "step of PanopticFPN is not known here; known are GeneralizedRCNN with RPN",
        ),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], message: str, call_main: Callable, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        call_main(TOOL, "--config-file", SMALL, "--output", tmp_path / "plan.png", *flags)
    assert not (tmp_path / "plan.png").exists()


@pytest.mark.slow
def test_sizes_follow_from_the_config(call_main: Callable, tmp_path: Path, capsys) -> None:
    call_main(
        TOOL, "--config-file", SMALL, "--gpu-memory", "8GiB", "--ims-per-gpu", 1,
        "--output", tmp_path / "plan.png", "INPUT.MIN_SIZE_TRAIN", "(64, 100)",
        "INPUT.MAX_SIZE_TRAIN", "160",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert all(size in printed for size in ("60×96", "80×128", "100×160"))
    assert "What to change" not in printed


def test_a_measured_step_runs_with_its_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, standing in for a GPU, whose allocator holds what it is told."""
    held: Iterator[int]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 500)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    cfg = get_config("small/mask_rcnn_R_18_FPN_gn.yaml")
    for variant in ("gn_det", "gn_det, RECOMPUTE"):
        held = iter([100, 160, 100, 170])
        assert measure_step(cfg, variant, 1, (64, 64), device="cpu") == (70, 500)
