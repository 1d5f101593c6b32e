"""The package as pip builds and installs it."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.programs import ROOT, build_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_setup_imports_neither_torch_nor_the_package() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"runpy", "pathlib", "setuptools"}


def test_the_metadata_names_what_users_need(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = archive.read(name).decode()
    assert "Name: gn_det\n" in metadata or "Name: gn-det\n" in metadata
    assert "Requires-Python: >=3.10" in metadata
    for extra in ("detectron2", "mmcv", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == [
        "Requires-Dist: tabulate",
        "Requires-Dist: torch>=2.6",
    ]


def test_an_installed_package_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import gn_det\n"
        f"assert gn_det.__file__.startswith({str(tmp_path)!r}), gn_det.__file__\n"
        "assert gn_det.get_config('small/quickstart.yaml').MODEL.RESNETS.DEPTH == 18\n"
        "assert gn_det.get_config('small/quickstart.py').train.max_iter > 0\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_every_module_and_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "gn_det").rglob("*.py")}
    configs = {p for p in (ROOT / "configs").rglob("*") if p.suffix in {".yaml", ".py"}}
    assert modules <= names
    assert {f"gn_det/{p.relative_to(ROOT).as_posix()}" for p in configs} <= names
