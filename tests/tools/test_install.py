"""tools/install.py: each way that it can fail ends with one line that says what to do."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
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


def stand_in(folder: Path, name: str, version: str, module: str) -> None:
    """A distribution of one module, as pip leaves it in an environment."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(f"version = {version!r}\n")
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n"
                                          f"Version: {version}\n")  # fmt: skip


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python whose packages are those of tmp_path/site alone."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} -S "$@"\n')
    program.chmod(0o755)
    (tmp_path / "site").mkdir()
    return program


THEIRS = {
    "nothing": ([], set()),
    "mmcv": ([("mmcv", "2.1.0", "mmcv")], {"mmcv-lite"}),
    "mmcv-full": ([("mmcv-full", "1.7.2", "mmcv")], {"mmcv-lite"}),
    "mmcv-lite": ([("mmcv-lite", "2.1.0", "mmcv")], {"mmcv-lite"}),
    "OpenCV": ([("opencv-python", "4.9.0", "cv2")], set()),
    "another OpenCV": (
        [("opencv-python-headless", "4.9.0", "cv2")],
        {"opencv-python", "mmengine", "mmcv-lite"},
    ),
    "a third OpenCV and mmcv": (
        [("opencv-contrib-python", "4.9.0", "cv2"), ("mmcv", "2.1.0", "mmcv")],
        {"opencv-python", "mmengine", "mmcv-lite"},
    ),
}


@pytest.mark.parametrize("there", THEIRS)
def test_nothing_is_asked_for_that_would_be_written_over_what_is_there(
    there: str, install: ModuleType, python: Path, tmp_path: Path
) -> None:
    distributions, left_out = THEIRS[there]
    for distribution in distributions:
        stand_in(tmp_path / "site", *distribution)

    def names(requirements: list[str]) -> set[str]:
        return {each.split(">")[0].split("<")[0] for each in requirements}

    everything = {"torchvision", "fvcore", "opencv-python", "mmengine", "mmcv-lite", "pytest"}
    assert names(install.needs(str(python))) & everything == everything - left_out


@pytest.mark.parametrize(
    ("name", "module"), [("torch", "torch"), ("Mm_Cv", "mmcv"), ("setuptools", None)]
)
def test_pip_is_told_to_hold_what_is_there(
    name: str,
    module: str | None,  # None where pip may renew it
    install: ModuleType,
    python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(tmp_path / "site", name, "9.8.7+cu121", module or name)
    held = []

    def step(title: str, python: str, arguments: list[str]) -> None:
        held.append(Path(arguments[0].removeprefix("--constraint=")).read_text())

    monkeypatch.setattr(install, "step", step)
    install.install_beside("Things", str(python), ["thing"])
    assert held == [f"{name.lower().replace('_', '-')}==9.8.7+cu121" if module else ""]


@pytest.mark.parametrize(
    ("torch", "too_old"),
    [("1.13.1", True), ("2.5.1+cu121", True), ("2.6.0", False), ("2.14.1+cpu", False),
     ("3.0.0a0+git1234", False)],
)  # fmt: skip
def test_an_old_pytorch_is_refused_before_anything_changes(
    torch: str,
    too_old: bool,
    install: ModuleType,
    python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("torch", "detectron2"):
        stand_in(tmp_path / "site", name, torch, name)
    steps = []
    monkeypatch.setattr(install, "step", lambda *arguments: steps.append(arguments))
    if too_old:
        with pytest.raises(SystemExit, match=r"has PyTorch .* needs 2\.6 or newer; nothing was ch"):
            install.install("venv", str(python))
    else:
        install.install("venv", str(python))
    assert len(steps) == (0 if too_old else 1)


@pytest.mark.parametrize("version", [(3, 8), (3, 9), (2, 7)])
def test_an_environment_of_an_old_python_is_refused_before_anything_changes(
    version: tuple[int, int], install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "output", lambda python, code: json.dumps(version))
    monkeypatch.setattr(install, "step", lambda *arguments: pytest.fail("pip ran"))
    told = (
        rf"theirs has Python {version[0]}\.{version[1]}, and gn_det needs 3\.10 or newer; nothing"
    )
    with pytest.raises(SystemExit, match=told):
        install.install("theirs", "python")


def write_wheel(folder: Path, name: str, version: str, module: str, needs: str = "") -> None:
    """A wheel of one module."""
    distribution = name.replace("-", "_")
    information = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{distribution}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", f"version = {name + version!r}\n")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        if needs:
            metadata += f"Requires-Dist: {needs}\n"
        wheel.writestr(f"{information}/METADATA", metadata)
        tag = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{information}/WHEEL", tag)
        wheel.writestr(f"{information}/RECORD", "")


@pytest.mark.slow
def test_an_environment_with_mmcv_keeps_all_that_it_has(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    theirs = [
        ("torch", "2.6.0", "torch"),
        ("numpy", "1.26.4", "numpy"),
        ("mmcv", "2.1.0", "mmcv"),
        ("opencv-python-headless", "4.9.0", "cv2"),
    ]
    ours = [
        ("gn-det", "1.0", "gn_det"),
        ("mmcv-lite", "2.2.0", "mmcv"),
        ("opencv-python", "5.0.0", "cv2"),
        ("numpy", "2.4.0", "numpy"),
        ("fvcore", "0.1", "fvcore"),
    ]
    for wheel in [*theirs, *ours]:
        write_wheel(shop, *wheel)
    write_wheel(shop, "picky", "1.0", "picky", needs="numpy>=2")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = str(venv / "bin" / "python")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    install.step("theirs", python, [f"{name}=={version}" for name, version, _ in theirs])
    site = next((venv / "lib").glob("*/site-packages"))
    before = {path: path.read_bytes() for path in site.rglob("*.py")}

    monkeypatch.setattr(install, "GN_DET", ["gn-det"])
    there = {"numpy", "fvcore", "mmcv-lite", "opencv-python"}
    needed = [each for each in install.needs(python) if each.split(">")[0] in there]
    assert needed == ["fvcore"]
    install.install_beside("gn_det", python, install.GN_DET + needed)
    with pytest.raises(SystemExit, match="picky could not be installed: a package of this envi"):
        install.install_beside("picky", python, ["picky"])
    assert install.has(python, "gn_det") and install.has(python, "fvcore")
    assert {path: path.read_bytes() for path in before} == before


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
