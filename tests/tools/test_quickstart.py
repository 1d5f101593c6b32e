"""make quickstart: in a form of seconds, and at full size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import ROOT, TINY

ARTIFACTS = {
    "model_final.pth", "last_checkpoint", "metrics.json", "config.yaml", "results.json",
    "curves.png", "contact_sheet.png", "inference",
}  # fmt: skip


def quickstart(folder: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    environment = f"{sys.prefix}/.installed"  # this one, whoever installed it
    command = ["make", "quickstart", f"VENV={sys.prefix}", f"--assume-old={environment}"]
    places = [f"DATA={folder / 'shapes'}", f"OUTPUT={folder / 'run'}"]
    return subprocess.run([*command, *places, *variables], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_two_steps_leave_everything_and_a_second_run_skips_what_is_done(tmp_path: Path) -> None:
    variables = ["SHAPES=--num-train 6 --num-val 3", f"OPTS={' '.join(TINY)}"]
    first = quickstart(tmp_path, *variables)
    assert first.returncode == 0, first.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= ARTIFACTS and any(name.startswith("events.out") for name in left)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    row = next(line for line in first.stdout.splitlines() if line.startswith("mask "))
    assert float(row.split()[1]) == round(results["segm"]["AP"], 1)

    trained = (tmp_path / "run" / "model_final.pth").stat().st_mtime_ns
    second = quickstart(tmp_path, *variables)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "run" / "model_final.pth").stat().st_mtime_ns == trained
    assert "Starting training" not in second.stdout and row in second.stdout
    assert "holds a finished run; remove it to train anew" in second.stdout

    other = quickstart(tmp_path, "SHAPES=--num-train 7 --num-val 3", f"OPTS={' '.join(TINY)}")
    assert other.returncode != 0 and "is not the shapes set of" in other.stderr


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    options = " ".join([*TINY, "SOLVER.CHECKPOINT_PERIOD 1"])
    variables = ["SHAPES=--num-train 6 --num-val 3", f"OPTS={options}"]
    assert quickstart(tmp_path, *variables).returncode == 0
    run = tmp_path / "run"
    for name in ("results.json", "model_final.pth"):
        (run / name).unlink()
    (run / "last_checkpoint").write_text("model_0000000.pth")
    again = quickstart(tmp_path, *variables)
    assert again.returncode == 0, again.stderr
    assert "Starting training from iteration 1" in again.stdout


@pytest.mark.slow
def test_the_full_quickstart_reaches_mask_ap_50(tmp_path: Path) -> None:
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["segm"]["AP"] >= 50
    assert results["bbox"]["AP"] >= 45
