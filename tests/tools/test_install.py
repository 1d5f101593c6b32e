"""tools/install.py: each way that it can fail ends with one line that says what to do."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
from support.programs import ROOT, build_wheel, load_program


@pytest.fixture
def install() -> ModuleType:
    return load_program("tools/install.py")


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


def test_old_pythons_can_parse_it() -> None:
    ast.parse((ROOT / "tools" / "install.py").read_text(), feature_version=(3, 6))


def test_an_unsupported_python_is_told(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["install.py", "nowhere"])
    monkeypatch.setattr(install.sys, "version_info", (3, 8, 18, "final", 0))
    with pytest.raises(SystemExit, match=r"error: Python 3\.8 is too old: .* PYTHON=python3\.11"):
        install.main()
    assert not Path("nowhere").exists()


def test_a_missing_python_is_told(tmp_path: Path) -> None:
    command = ["make", "install", "PYTHON=python-of-nowhere", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path / "venv").exists()
    assert "error: there is no python-of-nowhere; install Python 3.10 or newer" in done.stderr


def test_a_folder_that_cannot_be_written_is_told(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: no virtual environment could be made in"):
        install.create(str(tmp_path / "file" / "venv"))


def test_a_folder_that_holds_something_else_is_not_touched(
    install: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="exists and is no virtual environment"):
        install.create(str(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_interruption_leaves_no_half_made_environment(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(command: list[str], **kwargs: object) -> None:
        Path(command[-1], "bin").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(install.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install.create(str(tmp_path / "venv"))
    assert not (tmp_path / "venv").exists()


def test_a_full_disk_is_told_before_anything_is_fetched(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(100e9, 97e9, 3e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match=r"3\.0 GB of disk are free .* about 7, .* VENV="):
        install.check_disk(str(tmp_path))


def test_a_disk_that_holds_the_environment_but_no_downloads_is_tried(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(100e9, 91e9, 9e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    install.check_disk(str(tmp_path))


def test_no_network_is_told(install: ModuleType, without_network: None) -> None:
    with pytest.raises(SystemExit, match="Thing could not be installed: PyPI cannot be reached"):
        install.step("Thing", sys.executable, ["a-package-of-nowhere==1.0"])


def test_a_detectron2_with_another_hash_is_refused(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(install, "DETECTRON2", f"gn_det==0.1.0 --hash=sha256:{'0' * 64}")
    with pytest.raises(SystemExit, match="not the file that was checked"):
        install.install_detectron2(sys.executable)


def test_what_is_importable_is_found_and_left_alone(install: ModuleType) -> None:
    assert install.has(sys.executable, "detectron2")
    assert not install.has(sys.executable, "detectron3")


@pytest.mark.slow
@pytest.mark.parametrize("left", ["no RECORD", "a file is missing", "a folder alone"])
def test_an_interrupted_install_repairs_itself(
    left: str, install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv, packages = tmp_path / "venv", []
    for name in ("torch", "other"):
        folder = tmp_path / name / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("value = 1\n")
        (folder.parent / "setup.py").write_text(
            f"import setuptools; setuptools.setup(name={name!r}, version='1', packages=[{name!r}])"
        )
        pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
        subprocess.run([*pip, "-w", tmp_path, folder.parent], check=True)
        packages.append(f"{name}==1")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = str(venv / "bin" / "python")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    def install_both(venv: str, python: str) -> None:
        if not install.has(python, "torch"):
            install.step("PyTorch", python, packages[:1])
        install.step("the rest", python, packages)

    monkeypatch.setattr(install, "install", install_both)
    monkeypatch.setattr(sys, "argv", ["install.py", str(venv)])
    install.main()
    assert not (venv / ".gn_det_installing").exists()
    site = next((venv / "lib").glob("*/site-packages"))
    information = site / "torch-1.dist-info"
    (site / "torch" / "__init__.py").write_text("value =")  # half a file
    if left == "no RECORD":
        (information / "RECORD").unlink()
        (information / "INSTALLER").unlink()
    elif left == "a file is missing":
        (site / "torch" / "__init__.py").unlink()
    else:
        shutil.rmtree(information)
    (venv / ".gn_det_installing").touch()
    install.main()
    assert install.output(python, "import torch, other; print(torch.value, other.value)") == "1 1"
