"""Every program that takes a config begins alike: bad input is one line with advice that works."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import ROOT, TINY, folder_flags

from gn_det import InputError

YAML = ["--config-file", ROOT / "configs/compare/gn.yaml"]
SCRATCH = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0]


def train_net(folder: Path, output: Path, overrides: list) -> list[object]:
    return [*YAML, *folder_flags(folder), "OUTPUT_DIR", output, *overrides, *TINY]


def lazyconfig_train_net(folder: Path, output: Path, overrides: list) -> list[object]:
    lazy = {"MODEL.WEIGHTS": "train.init_checkpoint", "MODEL.DEVICE": "train.device"}
    given = [
        f"{lazy[key]}={value}"
        for key, value in zip(overrides[::2], overrides[1::2], strict=True)
        if key in lazy
    ]
    config = ["--config-file", ROOT / "configs/small/quickstart.py"]
    tiny = ["train.max_iter=2", "dataloader.train.num_workers=0", f"train.output_dir={output}"]
    return [*config, *folder_flags(folder), *tiny, *given]


def compare(folder: Path, output: Path, overrides: list) -> list[object]:
    recipes = ["--recipes", YAML[1], "--ims-per-gpu", 2, "--seeds", 0, "--output", output]
    return [*recipes, *folder_flags(folder), *overrides, *TINY]


def convert_bn_to_gn(folder: Path, output: Path, overrides: list) -> list[object]:
    config = ["--config-file", ROOT / "configs/compare/bn.yaml", "--output", output]
    # Any file that is there will do: the data are checked first.
    weights = overrides if overrides[1] else ["MODEL.WEIGHTS", Path(__file__), *overrides[2:]]
    return [*config, *folder_flags(folder), *weights, *TINY]


def feature_distribution(folder: Path, output: Path, overrides: list) -> list[object]:
    recipes = [
        "--recipes",
        YAML[1],
        "--module",
        "roi_heads.mask_head.mask_fcn1",
        "--output",
        output,
    ]
    return [*recipes, *folder_flags(folder), *overrides, *TINY]


def measure_accumulation(folder: Path, output: Path, overrides: list) -> list[object]:
    return [*YAML, "--output", output, *folder_flags(folder)[:3], *overrides, *TINY]


PROGRAMS = {
    f"tools/{flags.__name__}.py": flags
    for flags in (
        train_net,
        lazyconfig_train_net,
        compare,
        convert_bn_to_gn,
        feature_distribution,
        measure_accumulation,
    )
}
FAULTS = {
    "a broken image": (SCRATCH, r"1 of 6 images are missing in .*: 000002\.jpg \("),
    "no GPU": ([*SCRATCH, "MODEL.DEVICE", "cuda"], "device cuda is asked for, and PyTorch sees 0"),
    "missing weights": (["MODEL.WEIGHTS", "gone.pth"], r"weights gone\.pth do not exist"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_every_flag_that_it_advises_exists(
    fault: str, program: str, edit_shapes: Callable, tmp_path: Path, call_main: Callable,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    folder = edit_shapes(lambda dataset: None)
    if fault == "a broken image":
        (folder / "images" / "000002.jpg").unlink()
    overrides, message = FAULTS[fault]
    output = tmp_path / "output"
    with pytest.raises(InputError, match=message) as raised:
        call_main(program, *PROGRAMS[program](folder, output, overrides))
    assert "\n" not in str(raised.value)
    assert not output.exists()
    with pytest.raises(SystemExit):
        call_main(program, "--help")
    usage = capsys.readouterr().out
    for flag in re.findall(r"--[a-z-]+", str(raised.value)):
        assert flag in usage, f"{program} has no {flag}"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["tools/compare.py", "tools/feature_distribution.py"])
def test_runs_of_a_study_leave_bad_images_out_as_asked(
    program: str, edit_shapes: Callable, tmp_path: Path
) -> None:
    folder = edit_shapes(lambda dataset: None)
    (folder / "images" / "000002.jpg").unlink()
    flags = PROGRAMS[program](folder, tmp_path / "output", SCRATCH)
    command = [sys.executable, ROOT / program, "--skip-bad-images", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search("1 of 6 images are missing in .*: 000002.jpg .* continues", done.stdout)
