"""Standard streams that are closed, end early, or lack letters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import ROOT

HELP = "PYTHON tools/convert_bn_to_gn.py --help"  # with γ
CODE = "from gn_det.engine.command import run_command as run; run(lambda: print(1))"
PRINTS = f'PYTHON -c "{CODE}"'


def run(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line.replace('PYTHON', sys.executable)}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(folder), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (f"{PRINTS} >&-", 0, ""),
        (f"{PRINTS} | head -c 0", 141, ""),
        (f"{PRINTS} >/dev/full", 2, "error: a file, standard output or shared memory"),
        ("PYTHON tools/report_run.py $OUT/none 2>&-", 2, ""),
        ("PYTHON tools/report_run.py $OUT/none", 2, "error: "),
        ("PYTHON tools/norm_diagram.py --output $OUT/$(printf 'x%.0s' {1..300}).png", 2, "error: "),
    ],
)
def test_no_trace_comes_of_them(line: str, status: int, said: str, tmp_path: Path) -> None:
    done = run(line, tmp_path)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr


def test_letters_that_an_encoding_lacks_are_shown_as_escapes(tmp_path: Path) -> None:
    done = run(HELP, tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and r"\u03b3" in done.stdout, done.stderr
