"""tools/check_gpu.py on the CPU, which stands in for a GPU with small shapes and a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.programs import ROOT, load_program

from gn_det import InputError
from gn_det.ops import group_norm
from gn_det.ops.form import FORMS
from gn_det.studies.gpu.section import Section
from gn_det.studies.kernels import report as kernel_report
from gn_det.studies.kernels.report import Case

CPU = torch.device("cpu")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, where everything takes 2 ms and nothing is compiled."""

    monkeypatch.setattr(kernel_report, "_milliseconds", lambda function: [2.0])
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    return load_program("tools/check_gpu.py")


@pytest.fixture
def tiny(program: ModuleType) -> tuple:
    return program.FULL._replace(
        checked=[Case("small", (1, 64, 4, 4))],
        timed=[Case("small", (1, 64, 4, 4)), Case("other", (1, 32, 5, 3))],
        variants=[("bf16", "channels_last"), ("fp32", "contiguous")],
        config="small/mask_rcnn_R_18_FPN_gn.yaml",
        batches=((1, (64, 96)),),
        rounds=1,
        iterations=4,
        quickstart_images=4,
    )


def only(program: ModuleType, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(program, "SECTIONS", {name: program.SECTIONS[name] for name in names})


def read(output: Path) -> tuple[dict, str]:
    return json.loads((output / "report.json").read_text()), (output / "report.md").read_text()


def test_without_a_gpu_it_ends_with_one_line(
    call_main: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no GPU, and everything here runs on one"):
        call_main("tools/check_gpu.py", "--output", tmp_path / "gpu")
    assert not (tmp_path / "gpu").exists()


def test_it_reports_errors_times_and_memory_and_draws_them(
    program: ModuleType, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(program, monkeypatch, "exactness", "times", "steps")
    assert program.check(CPU, tmp_path, tiny) == 0
    data, page = read(tmp_path)
    assert data["passed"] and data["environment"]["PyTorch"] == torch.__version__
    checked = data["sections"]["exactness"]["rows"]
    assert len(checked) == len(FORMS) * 3 * 2
    assert {row["form"] for row in checked} == set(FORMS)
    assert all(row["error"] < 0.02 for row in checked)
    bf16, *_ = timed = data["sections"]["times"]["rows"]
    assert len(timed) == 4
    assert {"ours forward ms", "ATen, autocast backward ms", "compiled ATen forward ms"} <= set(
        bf16
    )
    assert bf16["forward GB/s"] > 0 and bf16["forward of copy"] == "100%"
    rows = data["sections"]["steps"]["rows"]
    assert {(row["norm"], row["precision"]) for row in rows} == {
        (norm, precision)
        for norm in ("frozen BN", "Detectron2's GN", "gn_det", "gn_det, RECOMPUTE")
        for precision in ("AMP", "fp32")
    }
    assert all(row["step ms"] > 0 and row["forecast MiB"] > 0 for row in rows)
    assert "Every check that ran passed." in page and "| frozen BN |" in page
    for plot in ("bandwidth.png", "memory.png"):
        assert f"({plot})" in page and (tmp_path / plot).stat().st_size > 1000


def test_a_failed_check_takes_its_figure_away_and_leaves_the_others(
    program: ModuleType, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_on_other(**arguments: object) -> torch.Tensor:
        y = group_norm(**arguments)
        return 1.1 * y if arguments["x"].size(1) == 32 else y

    monkeypatch.setattr(kernel_report, "group_norm", wrong_on_other)
    only(program, monkeypatch, "exactness", "times")
    assert program.check(CPU, tmp_path, tiny) == 1
    data, page = read(tmp_path)
    assert not data["passed"]
    assert [row["site"] for row in data["sections"]["times"]["rows"]] == ["small", "small"]
    assert len(data["sections"]["times"]["faults"]) == 2
    assert not data["sections"]["exactness"]["faults"]
    assert "**Failed: times.**" in page
    assert "Failed: other, bf16, channels_last: ArithmeticError: other (1, 32, 5, 3): y is" in page


def test_times_stand_over_the_estimate_where_the_card_has_one(
    program: ModuleType, tiny: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row_on(name: str) -> dict:
        monkeypatch.setattr(program, "environment", lambda device: {"card": name})
        found = Section("", 60)
        program.times(found, CPU, Path(), tiny._replace(timed=tiny.timed[:1], variants=variants))
        assert not found.faults
        return found.rows[0]

    variants = [("bf16", "contiguous")]
    row = row_on("NVIDIA H100 80GB HBM3")
    for direction in ("forward", "backward"):
        assert 2.0 < row[f"{direction} / estimate"] * 2.7 < 2000.0  # of 2 ms, at least one launch
    row = row_on("Tesla T4")
    assert not [name for name in row if "estimate" in name]


def test_the_hosts_time_of_a_call_is_that_of_all_calls_over_their_number(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("waited"))
    monkeypatch.setattr(program.time, "perf_counter", iter((10.0, 10.5)).__next__)
    assert program.host_microseconds(lambda: events.append("called"), calls=5) == 1e5
    assert events == ["waited", *["called"] * 5, "waited"]


def test_a_plot_without_figures_is_not_left_from_before(
    program: ModuleType, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bandwidth.png").write_bytes(b"of another day")
    monkeypatch.setattr(kernel_report, "group_norm", lambda **a: 1.1 * group_norm(**a))
    only(program, monkeypatch, "times")
    assert program.check(CPU, tmp_path, tiny) == 1
    assert not (tmp_path / "bandwidth.png").exists()
    assert "bandwidth.png" not in read(tmp_path)[1]


def test_other_features_than_with_detectron2s_gn_take_the_step_away(
    program: ModuleType, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share_changed(models: dict) -> None:
        with torch.no_grad():
            for model in models.values():
                model.load_state_dict(models["gn_det"].state_dict(), strict=False)
            for parameter in models["gn_det"].backbone.parameters():
                parameter.mul_(1.2)

    monkeypatch.setattr(program, "share_weights", share_changed)
    only(program, monkeypatch, "steps")
    assert program.check(CPU, tmp_path, tiny) == 1
    found = read(tmp_path)[0]["sections"]["steps"]
    assert not found["rows"] and not (tmp_path / "memory.png").exists()
    assert all("of gn_det differs from that of Detectron2's GN by" in f for f in found["faults"])


def test_the_kernels_tests_are_counted_and_their_failures_named(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {
        0: "== 3 passed, 1 skipped in 2.00s ==",
        1: "FAILED tests/ops/x.py::y - assert\n1 failed",
    }

    def run(command: list[str], log: Path, seconds: float, more: dict[str, str]) -> int:
        assert more == {"TRITON_INTERPRET": "0"} and str(ROOT / "tests/ops/kernels") in command
        log.write_text(f"...\n{said[status]}\n")
        return status

    monkeypatch.setattr(program, "run", run)
    for status in (0, 1):
        found = Section("", 60)
        program.kernel_tests(found, CPU, tmp_path, program.FULL)
        assert found.rows == ([] if status else [{"tests": "3 passed, 1 skipped in 2.00s"}])
        assert found.faults == (
            ["tests/ops/kernels: RuntimeError: FAILED tests/ops/x.py::y - assert"] if status else []
        )


def test_the_tests_of_the_kernels_can_be_collected_by_themselves() -> None:
    """Without the other tests' fixtures, which need Detectron2."""
    folder = ROOT / "tests/ops/kernels"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--collect-only", f"--confcutdir={folder}"),
            *(str(folder), f"--ignore={folder / 'test_fused_models.py'}"),
        ],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_what_takes_too_long_or_is_not_installed_is_left_out(
    program: ModuleType, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Section("", 0.2)
    endless = [sys.executable, "-c", "import time; time.sleep(60)"]
    slow.check("sleep", lambda: program.run(endless, tmp_path / "log", 0.2, {}))
    slow.check("more", lambda: {"never": 1})
    assert [text.split(":")[0] for text in slow.left_out] == ["sleep", "more"]
    assert not slow.rows and not slow.faults

    monkeypatch.setattr(program, "installed", lambda package: package != "detectron2")
    only(program, monkeypatch, "exactness", "steps", "quickstart")
    assert program.check(CPU, tmp_path, tiny) == 0
    data, page = read(tmp_path)
    assert data["sections"]["exactness"]["rows"] and not data["sections"]["steps"]["rows"]
    assert page.count("detectron2 is not installed") == 3


WITHOUT = """
import importlib.util, runpy, sys
from pathlib import Path
for name in ("detectron2", "tabulate", "matplotlib", "tqdm", "mmcv"):
    sys.modules[name] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if sys.modules.get(name, 1) is None else find(name)
output = sys.argv[1]
program = runpy.run_path("tools/check_gpu.py", run_name="check_gpu")
for name in ("tests", "times", "gaps"):
    del program["SECTIONS"][name]
import torch
extent = program["FULL"]._replace(checked=[program["kernel_report"].Case("small", (1, 64, 4, 4))])
assert program["check"](torch.device("cpu"), Path(output), extent) == 0
sys.argv = ["check_gpu.py", "--output", output]
runpy.run_path("tools/check_gpu.py", run_name="__main__")
"""


def test_the_program_runs_in_an_environment_with_little_but_pytorch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr  # the second time it looks for a GPU
    assert "error: PyTorch" in done.stderr and "Traceback" not in done.stderr
    data, _ = read(tmp_path)
    assert len(data["sections"]["exactness"]["rows"]) == len(FORMS) * 3 * 2


@pytest.mark.parametrize(
    ("losses", "learns"),
    [
        ([3.0, 2.0, 1.0], True),
        ([3.0, 2.0, 2.1, 1.9], True),
        ([3.0, 2.0, 3.1, 3.2], False),
        ([3.0], False),
        ([3.0, float("nan"), 1.0], False),
        ([float("inf"), 2.0, 1.0], False),
    ],
)
def test_a_training_that_learns_nothing_is_a_fault(
    program: ModuleType, losses: list[float], learns: bool
) -> None:
    if learns:
        program.check_losses(losses)
    else:
        with pytest.raises(ArithmeticError, match="nothing was learnt"):
            program.check_losses(losses)


@pytest.mark.slow
def test_a_short_training_gives_losses_and_ap(
    program: ModuleType, tiny: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "check_losses", lambda losses: None)  # so short, it learns nothing
    found = Section("", 300)
    program.quickstart(found, CPU, tmp_path, tiny)
    assert not found.faults
    (row,) = found.rows
    assert row["iterations"] == 4 and row["first loss"] > 0
    assert row["seconds of an iteration"] > 0 and "segm AP" in row
