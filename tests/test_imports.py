"""Imports go one way, and importing gn_det brings in nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first: a module may import from its own layer and from those before it.
LAYERS = [
    {"errors", "utils", "version"},
    {"ops"},
    {"layers"},
    {"injection"},
    {"modeling", "mmcv_plugin"},
    {"config"},
    {"data", "checkpoint"},
    {"engine", "analysis"},
]
FILES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "gn_det").rglob("*.py"))


def layer_of(part: str) -> int:
    matches = [index for index, parts in enumerate(LAYERS) if part in parts]
    assert matches, f"gn_det.{part} stands in no layer of {LAYERS}"
    return matches[0]


def imported_parts(file: str) -> set[str]:
    """The parts of gn_det that a file imports, by the name after `gn_det.`."""
    package = file.removesuffix(".py").split("/")[:-1]
    parts = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{module}.{a.name}" for a in node.names] if module == "gn_det" else [module]
        else:
            continue
        parts |= {m.split(".")[1] for m in modules if m.startswith("gn_det.")}
    return parts


@pytest.mark.parametrize("file", [f for f in FILES if f != "gn_det/__init__.py"])
def test_imports_go_one_way(file: str) -> None:
    part = file.split("/")[1].removesuffix(".py")
    for imported in imported_parts(file):
        assert layer_of(imported) <= layer_of(part), f"{file} imports gn_det.{imported}"


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.split("/")[1] in {"ops", "layers", "injection"}]
)
def test_cfg_stays_out_of_the_lower_layers(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"cfg", "CfgNode"}


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_gn_det_loads_neither_torch_nor_detectron2() -> None:
    loaded = run_python("import sys, gn_det; print(*sys.modules)").split()
    assert not {"torch", "triton", "detectron2", "mmcv", "numpy"} & set(loaded)


def test_every_public_name_resolves_without_detectron2_and_mmcv_and_triton() -> None:
    run_python(
        "import sys\n"
        "for name in ('detectron2', 'mmcv', 'mmengine', 'triton'): sys.modules[name] = None\n"
        "import gn_det\n"
        "for name in gn_det.__all__: getattr(gn_det, name)\n"
        "import torch\n"
        "assert gn_det.FusedGroupNorm(48)(torch.ones(1, 48, 2, 2)).shape == (1, 48, 2, 2)\n"
    )


def test_public_names_survive_the_import_of_the_packages_behind_them() -> None:
    run_python(
        "import gn_det.injection.convert, gn_det.ops.group_norm, gn_det.config.files, gn_det\n"
        "assert callable(gn_det.inject) and callable(gn_det.group_norm)\n"
        "assert callable(gn_det.get_config)\n"
    )


def test_dir_lists_the_public_names() -> None:
    import gn_det

    assert set(dir(gn_det)) == set(gn_det.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import gn_det

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = gn_det.no_such_thing
