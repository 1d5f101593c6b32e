"""The pages are true: their commands parse, their code runs, their links and tables are right."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from support import zoo
from support.models import lite0_weights
from support.programs import ROOT, TINY, load_program
from torch import nn

import gn_det
from gn_det.config import load_config, load_lazy_config
from gn_det.injection.sites import DEFAULT_SITES, SITES

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *ROOT.glob("*.md"),
        *(
            p
            for room in ("configs", "demo", "gn_det", "tools")
            for p in (ROOT / room).rglob("*.md")
        ),
    ]
}
LIBRARY, OPERATOR = "gn_det/README.md", "gn_det/ops/README.md"
MAKEFILE = (ROOT / "Makefile").read_text()
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


COMMANDS = [
    line
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.splitlines()
    if line and not line.startswith("#")
]
PROGRAMS = [command for command in COMMANDS if command.startswith(".venv/bin/python ")]
MAKE = {
    *(command for command in COMMANDS if command.startswith("make ")),
    *(text for page in PAGES for text in re.findall(r"`(make [a-z].*?)`", prose(page), re.DOTALL)),
}


def command(*words: str) -> str:
    """The one command of the pages that has all these words."""
    (found,) = [c for c in dict.fromkeys(PROGRAMS) if all(word in c for word in words)]
    return found


def run(
    command: str, folder: Path = ROOT, more: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command of the pages in a folder, with more arguments at its end."""
    words = [sys.executable if w == ".venv/bin/python" else w for w in shlex.split(command)]
    return subprocess.run(
        [*words, *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_every_command_is_one_that_is_tested_here() -> None:
    assert {*COMMANDS} - {*PROGRAMS} - MAKE == {"pip install -e ."}


@pytest.mark.parametrize("command", dict.fromkeys(PROGRAMS), ids=lambda c: c.split()[1])
def test_the_programs_own_parser_takes_a_command(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    args = load_program(program).parse_arguments()
    recipes = getattr(args, "recipes", None) or []
    for file in [getattr(args, "config_file", None), *recipes]:
        if file:
            load(str(file), args.opts)


def load(config_file: str, overrides: list[str]) -> None:
    """Read a config with overrides: a file of the repository, one of a run, one of the zoo."""
    path: Path | None = ROOT / config_file
    if config_file.startswith("output/"):
        path = None  # another command makes it; its keys are the same
    elif not config_file.startswith("configs/"):
        path = Path(model_zoo.get_config_file(config_file))
    if config_file.endswith(".py"):
        load_lazy_config(path, overrides)
    else:
        load_config(path, overrides)


@pytest.mark.parametrize("command", sorted(MAKE))
def test_the_makefile_has_the_target_and_variables_of_a_command(command: str) -> None:
    _, target, *variables = command.split()
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    for variable in variables:
        assert re.search(rf"^{variable.split('=')[0]} \?=", MAKEFILE, re.MULTILINE), variable


def links() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for target in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', prose(page)):
            address = "".join(target)
            if not address.startswith(("http:", "https:")):
                yield page, address


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page, link", dict.fromkeys(links()))
def test_a_link_leads_somewhere(page: str, link: str) -> None:
    file, _, anchor = link.partition("#")
    target = (ROOT / page).parent.joinpath(file).resolve() if file else ROOT / page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("page", PAGES)
def test_every_sentence_ends_before_a_code_block(page: str) -> None:
    lines = [line for line in PAGES[page].splitlines() if line.strip()]
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    for number in fences[::2]:
        assert re.search(r"^#|[.:|]$", lines[number - 1]), lines[number - 1]


def test_the_readme_is_short_and_begins_with_one_screen() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 150
    assert next(n for n, line in enumerate(lines) if line.startswith("## ")) <= 45


def test_the_numbers_of_the_first_screen_are_those_of_the_pages_it_links() -> None:
    rows = re.findall(
        r"^\| \[[a-z A-Z]+\]\((.+?)#.+?\)[^|]*(\|.*)$", PAGES["README.md"], re.MULTILINE
    )
    assert len(rows) == 4
    for page, cells in rows:
        numbers = re.findall(r"\dR\+\dW|\d+\.\d|\d{3,}", cells)
        assert len(numbers) >= 2
        for number in numbers:
            assert re.search(rf"\b{re.escape(number)}\b", PAGES[page]), number


def table(page: str, title: str) -> list[list[str]]:
    """The cells of the table of a page whose first column has this title."""
    _, _, below = PAGES[page].partition(f"| {title} |")
    rows = [line for line in below.split("\n\n")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_the_table_of_sites_is_the_codes() -> None:
    rows = [(site.strip("`"), default) for site, _, default in table(LIBRARY, "site")]
    assert [site for site, _ in rows] == list(SITES)
    assert tuple(site for site, default in rows if default == "yes") == DEFAULT_SITES


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, object]:
    """Values by their whole keys."""
    values: dict[str, object] = {}
    for key, value in cfg.items():
        inner = isinstance(value, CfgNode)
        values |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return values


def test_the_table_of_config_keys_has_every_key_with_its_default() -> None:
    cfg = get_cfg()
    before = flat(cfg)
    gn_det.add_gn_config(cfg)
    added = {key: value for key, value in flat(cfg).items() if key not in before}
    rows = table(LIBRARY, "key")
    assert {key.strip("`"): yaml.safe_load(default.strip("`")) for key, default, _ in rows} == added


def test_the_table_of_public_names_has_every_name() -> None:
    assert sorted(name.strip("`") for name, _ in table(LIBRARY, "name")) == sorted(gn_det.__all__)


def test_the_table_of_programs_has_every_program() -> None:
    listed = [re.search(r"\((.+)\)", row[0])[1] for row in table("tools/README.md", "program")]
    files = [*(ROOT / "tools").glob("*.py"), *(ROOT / "demo").glob("*.py")]
    assert sorted((ROOT / "tools" / name).resolve() for name in listed) == sorted(files)


@pytest.fixture
def yours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a project with its yours.yaml: Detectron2's Mask R-CNN on the CPU."""
    base = model_zoo.get_config_file(MASK_RCNN)
    text = f"_BASE_: {base}\nMODEL:\n  DEVICE: cpu\n  WEIGHTS: ''\n"
    (tmp_path / "yours.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def num_norms(model: nn.Module) -> int:
    return gn_det.audit(model).num_norms


def test_the_pages_without_python_have_no_block_that_goes_untested() -> None:
    assert {page for page in PAGES if blocks(page, "python")} == {"README.md", LIBRARY, OPERATOR}


def test_the_readmes_lines_for_a_project_put_gn_into_its_model(yours: Path) -> None:
    config, _ = blocks("README.md", "python")
    names: dict[str, CfgNode] = {}
    exec(config, names)
    cfg = names["cfg"]
    model = build_model(cfg)
    assert {row.site for row in gn_det.audit(model).rows} == {"backbone", "fpn", "mask_head"}
    assert "GN+add+ReLU" in {str(row.form) for row in gn_det.audit(model).rows}
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 4, 1
    assert num_norms(build_model(cfg)) == num_norms(model) + 4


def test_the_readmes_lines_for_a_trainer_put_gn_into_its_model(yours: Path) -> None:
    _, lines = blocks("README.md", "python")
    names = {"gn_det": gn_det, "DefaultTrainer": DefaultTrainer}
    exec(lines, names)
    cfg = load_config(yours / "yours.yaml")
    model = names["Trainer"].build_model(cfg)
    optimizer = names["Trainer"].build_optimizer(cfg, model)
    assert num_norms(model) == 65
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert {p for p in model.parameters() if p.requires_grad} == held


def test_the_librarys_lines_make_as_many_norms_as_it_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines, *_ = blocks(LIBRARY, "python")
    exec(lines, {"gn_det": gn_det, "model": zoo.build(MASK_RCNN)})
    assert "these lines make 67 GN layers" in prose(LIBRARY).replace("\n", " ")
    assert "67 in all" in capsys.readouterr().out


def test_the_registered_components_make_detectron2s_gn_model(yours: Path) -> None:
    _, components, *_ = blocks(LIBRARY, "python")
    names: dict[str, CfgNode] = {}
    exec(components, names)
    model = build_model(names["cfg"])
    assert "this makes the 69 GN layers" in prose(LIBRARY).replace("\n", " ")
    assert num_norms(model) == 69
    assert (
        model.state_dict().keys()
        == zoo.build("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml").state_dict().keys()
    )


def test_the_librarys_lines_convert_any_model(capsys: pytest.CaptureFixture[str]) -> None:
    (convert,) = [
        each for each in blocks(LIBRARY, "python") if "convert_bn" in each and "distill" not in each
    ]
    model = torchvision.models.resnet18(weights=None).eval()
    exec(convert, {"gn_det": gn_det, "model": model, "batches": [torch.rand(2, 3, 64, 64)]})
    assert "calibrated" in capsys.readouterr().out
    assert sum(isinstance(m, gn_det.FusedGroupNorm) for m in model.modules()) == 20


def test_the_librarys_lines_distill_any_model(capsys: pytest.CaptureFixture[str]) -> None:
    (distill,) = [each for each in blocks(LIBRARY, "python") if "gn_det.distill" in each]
    model = torchvision.models.resnet18(weights=None).eval()
    names = {"gn_det": gn_det, "model": model, "batches": [torch.rand(2, 3, 64, 64)]}
    assert "steps=400" in distill
    exec(distill.replace("steps=400", "steps=2"), names)
    assert "distilled" in capsys.readouterr().out


def test_the_librarys_lines_export_a_model_without_our_operator() -> None:
    (export,) = [each for each in blocks(LIBRARY, "python") if "torch.export" in each]
    model = torchvision.models.resnet18(weights=None).eval()
    gn_det.fuse(gn_det.inject(model))
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    names = {"gn_det": gn_det, "torch": torch, "model": model, "x": x}
    exec(export, names)
    assert not any(isinstance(m, gn_det.FusedGroupNorm) for m in model.modules())
    assert "gn_det" not in str(names["program"].graph)
    assert torch.allclose(names["program"].module()(x), expected, atol=1e-5)


def test_the_lines_of_the_operator_run() -> None:
    (lines,) = blocks(OPERATOR, "python")
    x, shortcut = torch.randn(2, 1, 64, 5, 5)
    names = {"x": x, "shortcut": shortcut, "weight": torch.ones(64), "bias": torch.zeros(64)}
    exec(lines, names)
    expected = F.relu(F.group_norm(x, 32) + shortcut)
    assert torch.allclose(names["y"], expected, atol=1e-5)


def test_the_audit_of_a_config_is_printed(
    call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    _, program, *arguments = shlex.split(command("audit_norms.py"))
    call_main(program, *arguments)
    assert "67 in all" in capsys.readouterr().out


def test_the_benchmark_prints_the_operators_table() -> None:
    done = run(command("benchmark_group_norm.py"))
    assert done.returncode == 0, done.stderr

    def cells(text: str) -> set[tuple[str, ...]]:
        rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
        return {tuple(cell.strip() for cell in row.split("|")) for row in rows}

    printed = {row[1:6] for row in cells(done.stdout)}
    rows = [row for row in cells(PAGES[OPERATOR]) if len(row) == 6 and "R+" in row[1]]
    assert len(rows) == 4
    for _, *counts, saved in rows:
        assert (*counts, saved.removesuffix(" B")) in printed


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("mask_rcnn_R_50_FPN_3x_gn", "mask_rcnn_R_50_FPN_gn_3x"),
        ("scratch_mask_rcnn_R_50_FPN_3x_gn", "scratch_mask_rcnn_R_50_FPN_gn_3x"),
        ("scratch_mask_rcnn_R_50_FPN_9x_gn", "scratch_mask_rcnn_R_50_FPN_gn_9x"),
    ],
)
def test_the_recipes_have_the_parameters_of_the_zoos_gn_detectors(theirs: str, ours: str) -> None:
    assert f"`{theirs}`" in PAGES["configs/README.md"]
    models = (
        zoo.build(f"Misc/{theirs}.yaml"),
        build_model(load_config(ROOT / f"configs/coco/{ours}.yaml", ["MODEL.DEVICE", "cpu"])),
    )
    zoos, recipes = ({k: v.shape for k, v in model.state_dict().items()} for model in models)
    assert recipes == zoos


def test_an_editable_install_works_without_detectron2(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    # Without gn_det's requirements: PyTorch is some gigabytes.
    pip = [python, "-m", "pip", "install", "--no-deps", "--quiet", "-e", str(ROOT)]
    subprocess.run(pip, check=True)
    code = "import gn_det; print(gn_det.__version__)"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"


@pytest.fixture
def clone(shapes: Path, tmp_path: Path) -> Path:
    """A folder like a clone, with data of yours in it."""
    for name in ("Makefile", "configs", "gn_det", "setup.py", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "datasets").mkdir()
    for name in ("mine", "datasets/shapes"):
        (tmp_path / name).symlink_to(shapes)
    return tmp_path


@pytest.mark.slow
def test_the_readmes_commands_train_on_a_folder_and_report(clone: Path) -> None:
    (clone / "weights").mkdir()
    lite0_weights(clone / "weights/lite0.pth")
    small = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", *TINY)
    short = ("SOLVER.WARMUP_ITERS", "1", "MODEL.GN.HAND_OVER_STEPS", "2")
    trained = run(command("train_net.py", "mine/train.json"), clone, more=small + short)
    assert trained.returncode == 0, trained.stderr
    reported = run(command("report_run.py"), clone)
    assert reported.returncode == 0, reported.stderr
    assert "mask" in reported.stdout and (clone / "output/mine/contact_sheet.png").exists()


@pytest.mark.slow
def test_make_compare_does_it_all(clone: Path) -> None:
    options = "SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 0 TEST.EVAL_PERIOD 0"
    small = (
        f"VENV={sys.prefix}",
        f"--assume-old={sys.prefix}/.installed",
        "QUICK=--quick",
        "SHAPES=--num-train 6 --num-val 3",
        "OBJECTS=--num-train 20 --num-val 3",
        f"OPTS={options}",
    )
    done = run("make compare", clone, more=small)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (clone / "output/compare/quick/report.md").read_text()
    assert "# Comparison of frozenbn, bn, frozenbn_gn_heads, gn\n" in report
    assert "Shown beside, and not equal: scratch_gn." in report
    assert (clone / "output/compare/quick/ap.png").exists()
