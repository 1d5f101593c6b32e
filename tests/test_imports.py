"""Imports go one way, and importing gn_det brings in nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Storey by storey, and in each the lowest layer first. A module may import from its own layer and
# from those below; the studies from none of each other.
LIBRARY = [
    {"text", "version"},
    {"errors"},
    {"amp", "budget", "files"},
    {"ops"},
    {"layers"},
    {"injection"},
    {"modeling", "mmcv_plugin"},
    {"config"},
]
TRAINER = [{"data", "checkpoint", "plots"}, {"engine"}, {"classification"}]
LAYERS = [*LIBRARY, *TRAINER, {"studies"}]
TRITON = {"ops/kernels", "studies/kernels"}
FILES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "gn_det").rglob("*.py"))
MODULES = [f for f in FILES if f != "gn_det/__init__.py"]


def layer_of(room: str) -> int:
    matches = [index for index, rooms in enumerate(LAYERS) if room in rooms]
    assert matches, f"gn_det.{room} stands in no layer of {LAYERS}"
    return matches[0]


def imports_of(file: str) -> set[str]:
    """The modules that a file imports, wherever it does; ``from a import b`` as a.b."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import; imports here are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported_by(file: str) -> list[list[str]]:
    """What a file imports of gn_det, as the parts of the names behind ``gn_det.``."""
    return [name.split(".")[1:] for name in imports_of(file) if name.startswith("gn_det.")]


@pytest.mark.parametrize("file", MODULES)
def test_imports_go_down(file: str) -> None:
    room = file.split("/")[1].removesuffix(".py")
    for imported, *_ in rooms_imported_by(file):
        assert layer_of(imported) <= layer_of(room), f"{file} imports gn_det.{imported}"


def test_no_two_files_import_each_other() -> None:
    file_of = {file.removesuffix(".py").replace("/", "."): file for file in MODULES}
    graph = {}
    for file in MODULES:
        names = imports_of(file)
        modules = names | {name.rpartition(".")[0] for name in names}
        graph[file] = [file_of[module] for module in modules if module in file_of]
    TopologicalSorter(graph).prepare()  # raises a CycleError, which has the files


@pytest.mark.parametrize("file", [f for f in MODULES if f.startswith("gn_det/studies/")])
def test_no_study_imports_another(file: str) -> None:
    study = file.split("/")[2].removesuffix(".py")
    for room, *rest in rooms_imported_by(file):
        assert room != "studies" or rest[0] == study, f"{file} imports gn_det.studies.{rest[0]}"


@pytest.mark.parametrize("file", MODULES)
def test_triton_is_imported_beside_the_kernels_and_in_their_study_alone(file: str) -> None:
    if not any(file.startswith(f"gn_det/{room}/") for room in TRITON):
        assert not {name for name in imports_of(file) if name.split(".")[0] == "triton"}


@pytest.mark.parametrize(
    "file", [f for f in MODULES if f.split("/")[1] in {"ops", "layers", "injection"}]
)
def test_cfg_stays_out_of_the_lower_layers(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"cfg", "CfgNode"}


def test_tests_stand_where_what_they_test_does() -> None:
    rooms = {p.relative_to(ROOT / "gn_det") for p in (ROOT / "gn_det").rglob("*") if p.is_dir()}
    rooms |= {Path("tools"), Path("demo"), Path("support")}
    for test in (ROOT / "tests").rglob("*.py"):
        folder = test.parent.relative_to(ROOT / "tests")
        assert folder == Path() or folder in rooms, f"{test} mirrors no folder"


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


def test_models_that_are_not_detectron2s_do_not_load_it() -> None:
    run_python(
        "import sys, gn_det\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())\n"
        "gn_det.fuse(gn_det.inject(model, weight_standardization=True))\n"
        "gn_det.recompute(model)\n"
        "assert gn_det.audit(model).rows[0].form == 'WS+GN+ReLU, recomputed'\n"
        "gn_det.revert(model)\n"
        "assert 'detectron2' not in sys.modules\n"
    )


def test_public_names_survive_the_import_of_the_packages_behind_them() -> None:
    run_python(
        "import gn_det.injection.inject, gn_det.ops.group_norm, gn_det.config.files, gn_det\n"
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
