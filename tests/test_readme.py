"""Every command of the README does what it says, here in a form of seconds."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from support import zoo
from support.programs import ROOT, TINY, folder_flags

import gn_det
from gn_det.injection.sites import DEFAULT_SITES, SITES

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
# Config overrides with which a recipe for COCO takes seconds.
SMALL = [
    "SOLVER.IMS_PER_BATCH", "1", "SOLVER.IMS_PER_GPU", "1",
    "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0",
    "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", *TINY,
]  # fmt: skip
MASK_RCNN = "mask_rcnn_R_50_FPN_1x.yaml"
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PYTHON = [command for command in COMMANDS if command.startswith(".venv/bin/python ")]
# Run by CI as they stand, quickstart in tests/tools/test_quickstart.py as well; compare below.
MAKE = {
    "make install", "make quickstart", "make compare", "make test", "make test-all", "make lint",
}  # fmt: skip
PIP = {"pip install -e ."}  # below


def test_no_command_of_the_readme_goes_untested() -> None:
    assert set(COMMANDS) == {*PYTHON, *MAKE, *PIP}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.removeprefix("make ") for command in MAKE} <= targets


@pytest.fixture
def home(shapes: Path, tmp_path: Path) -> Path:
    """A folder to run the README in: the checkout, the data that the README speaks of."""
    for name in ("configs", "demo", "gn_det", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "datasets").mkdir()
    for name in ("mine", "datasets/shapes"):
        (tmp_path / name).symlink_to(shapes)
    coco = tmp_path / "datasets" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (coco / f"{split}2017").symlink_to(shapes / "images")
        dataset = json.loads((shapes / f"{split}.json").read_text())
        dataset["categories"] = [c for c in COCO_CATEGORIES if c["isthing"]]
        path = coco / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(dataset))
    return tmp_path


def run(command: str, home: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable if w == ".venv/bin/python" else w for w in shlex.split(command)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("DETECTRON2_DATASETS", None)
    return subprocess.run(
        [*words, *more], cwd=home, env=environment, capture_output=True, text=True
    )


def command(*words: str) -> str:
    """The one Python command of the README that has all these words."""
    (found,) = [c for c in PYTHON if all(word in c for word in words)]
    return found


@pytest.mark.slow
def test_train_on_a_folder_and_report(home: Path) -> None:
    trained = run(command("photos.yaml"), home, *TINY)
    assert trained.returncode == 0, trained.stderr
    reported = run(command("report_run.py"), home)
    assert reported.returncode == 0, reported.stderr
    assert "mask" in reported.stdout and (home / "output/mine/contact_sheet.png").exists()


@pytest.mark.slow
def test_train_and_evaluate_on_coco(home: Path) -> None:
    train = command("mask_rcnn_R_50_FPN_gn_2x", "--num-gpus 8").replace("--num-gpus 8", "")
    trained = run(train, home, *SMALL)
    assert trained.returncode == 0, trained.stderr
    evaluate = command("mask_rcnn_R_50_FPN_gn_2x", "--eval-only")
    weights = ["MODEL.WEIGHTS", "output/coco/model_final.pth"]
    evaluated = run(evaluate, home, *SMALL, *weights)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "Evaluation results for coco_2017_val" in evaluated.stdout


@pytest.mark.slow
def test_recomputation_trains_and_its_memory_is_planned(home: Path) -> None:
    cpu = ["SOLVER.AMP.ENABLED", "False", "OUTPUT_DIR", "output/recomputed"]
    trained = run(command("RECOMPUTE"), home, *SMALL, *cpu)
    assert trained.returncode == 0, trained.stderr
    assert "recomputed" in trained.stdout
    one = "--images 1 --sizes 480x800 --gpu-memory"
    planned = run(command("plan_memory.py").replace("--gpu-memory", one), home)
    assert planned.returncode == 0, planned.stderr
    assert "Detectron2's GN" in planned.stdout and (home / "memory.png").exists()


@pytest.mark.slow
def test_train_a_lazy_config(home: Path) -> None:
    tiny = ["train.max_iter=1", "dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    trained = run(command("lazyconfig_train_net.py"), home, *tiny)
    assert trained.returncode == 0, trained.stderr
    assert (home / "output/quickstart_lazy/results.json").exists()


@pytest.mark.slow
def test_compare_does_it_all(home: Path) -> None:
    for name in ("Makefile", "setup.py"):
        (home / name).symlink_to(ROOT / name)
    options = "SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 0 TEST.EVAL_PERIOD 0"
    done = subprocess.run(
        [
            "make", "compare", f"VENV={sys.prefix}", f"--assume-old={sys.prefix}/.installed",
            "QUICK=--quick", "SHAPES=--num-train 6 --num-val 3", f"OPTS={options}",
            "OBJECTS=--num-train 20 --num-val 3",
        ],
        cwd=home, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = (home / "output/compare/report.md").read_text()
    assert "# Comparison of frozenbn, bn, frozenbn_gn_heads, gn\n" in report
    assert "Shown beside, and not equal: scratch_gn." in report
    assert (home / "output/compare/ap.png").exists()


@pytest.mark.slow
def test_the_papers_experiments_run_one_after_the_other(home: Path) -> None:
    short = ["--epochs", "1", "--seeds", "0", "--ims-per-gpu"]
    swept = run(command("batch_size_sweep.py"), home, *short, "64", "32", "--norms", "BN", "GN")
    assert swept.returncode == 0, swept.stderr
    assert (home / "output/sweep/error_by_batch.png").exists()
    gap = run(command("train_test_gap.py"), home, "--batch-sizes", "2", "32")
    assert gap.returncode == 0, gap.stderr
    assert "batches of 2" in gap.stdout and (home / "output/gap/gap.png").exists()
    groups = [*short, "128", "--num-groups", "2", "--channels-per-group", "1"]
    ablated = run(command("group_ablation.py"), home, *groups)
    assert ablated.returncode == 0, ablated.stderr
    few = ["--epochs", "1", "--ims-per-gpu", "350", "--norms", "GN"]
    features = run(command("feature_distribution.py", "digits"), home, *few)
    assert features.returncode == 0, features.stderr
    assert (home / "output/features/features.png").exists()
    diagram = run(command("norm_diagram.py"), home)
    assert diagram.returncode == 0, diagram.stderr
    for split in ("train", "val"):
        for name in ("some", "others"):
            (home / "path/to/imagenet" / split / name).mkdir(parents=True)
            for image in [*(home / "mine/images").iterdir()][:4]:
                (home / "path/to/imagenet" / split / name / image.name).symlink_to(image)
    trained = run(
        command("train_classifier.py").replace("--amp", ""),
        home, "--num-gpus", "1", "--epochs", "1", "--ims-per-gpu", "2", "--size", "32",
        "--num-workers", "0", "--network", "resnet18",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert (home / "output/R-50-GN/backbone.yaml").exists()


@pytest.mark.slow
def test_norms_are_converted_in_what_compare_has_left(home: Path) -> None:
    classifier = home / "datasets/classifiers/R-18-BN"
    flags = f"{classifier} --network resnet18 --norm BN --data mine --epochs 1 --ims-per-gpu 4"
    trained = run(f".venv/bin/python tools/train_classifier.py {flags} --size 32 --lr 0.01", home)
    assert trained.returncode == 0, trained.stderr
    converted = run(command("convert_classifier_to_gn.py"), home, "--calibration-pictures", "4")
    assert converted.returncode == 0, converted.stderr
    assert (home / "output/converted_classifier/report.md").exists()

    config = ["--config-file", "configs/compare/frozenbn.yaml", *folder_flags(home / "mine")]
    run_of_compare = "output/compare/runs/frozenbn-2ims-seed0"
    flags = shlex.join([*config, "OUTPUT_DIR", run_of_compare, *TINY])
    trained = run(f".venv/bin/python tools/train_net.py {flags}", home)
    assert trained.returncode == 0, trained.stderr
    convert = command("convert_bn_to_gn.py").replace("--fine-tune 100", "--fine-tune 1")
    assert convert.count("--fine-tune 1 ") == 1 and run_of_compare in convert
    convert = convert.replace("--fine-tune", "--calibration-images 2 --fine-tune")
    converted = run(convert, home)
    assert converted.returncode == 0, converted.stderr
    assert "calibrated" in (home / "output/converted/report.md").read_text()


def test_weights_of_timm_are_converted(home: Path) -> None:
    weights = timm.create_model("resnet50_gn", pretrained=False).state_dict()
    safetensors.torch.save_file(weights, home / "resnet50_gn.safetensors")
    done = run(command("convert_weights.py"), home)
    assert done.returncode == 0, done.stderr
    assert (home / "weights/r50_gn.yaml").exists()


def test_demo(home: Path, call_main: Callable) -> None:
    images = home / "datasets" / "shapes" / "images"
    flags = folder_flags(home / "datasets" / "shapes")[:3]
    config = ["--config-file", ROOT / "configs/small/quickstart.yaml"]
    call_main(
        "tools/train_net.py", *config, *flags, "OUTPUT_DIR", home / "output/quickstart", *TINY
    )
    # The README's pictures are of the full set; the tiny one has the first few.
    demo = command("demo.py").replace("00100*", "00000*")
    done = run(demo, home)
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in (home / "output" / "demo").iterdir()}
    assert drawn == {path.name for path in images.iterdir()}
    assert isinstance(json.loads((home / "output" / "demo.json").read_text()), list)


def test_every_file_that_the_readme_names_exists() -> None:
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_lines_for_an_existing_project_are_the_tested_ones() -> None:
    block, *_ = PYTHON_BLOCKS
    tested = (ROOT / "tests" / "modeling" / "test_existing_project.py").read_text()
    for line in re.findall(r"^(?:cfg|gn_det).*", block, re.MULTILINE):
        assert line.replace('"theirs.yaml"', 'str(tmp_path / "theirs.yaml")').strip() in tested


def test_the_lines_for_any_model_run(capsys: pytest.CaptureFixture[str]) -> None:
    _, block, *_ = PYTHON_BLOCKS
    exec(block, {"gn_det": gn_det, "model": zoo.build("COCO-InstanceSegmentation/" + MASK_RCNN)})
    assert "67 in all" in capsys.readouterr().out


def test_the_audit_of_a_config_is_printed(home: Path) -> None:
    done = run(command("audit_norms.py"), home)
    assert done.returncode == 0 and "67 in all" in done.stdout, done.stderr


def test_the_table_of_sites_is_the_codes() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \|.*\|(.*)\|$", README, re.MULTILINE)
    assert [site for site, _ in rows] == list(SITES)
    assert tuple(site for site, default in rows if "yes" in default) == DEFAULT_SITES


def test_the_lines_of_the_operator_run() -> None:
    _, _, block, _ = PYTHON_BLOCKS
    x, shortcut = torch.randn(2, 1, 64, 5, 5)
    names = {"x": x, "shortcut": shortcut, "weight": torch.ones(64), "bias": torch.zeros(64)}
    exec(block, names)
    expected = F.relu(F.group_norm(x, 32) + shortcut)
    assert torch.allclose(names["y"], expected, atol=1e-5)


def test_the_lines_for_converting_any_model_run(capsys: pytest.CaptureFixture[str]) -> None:
    *_, block = PYTHON_BLOCKS
    model = torchvision.models.resnet18(weights=None).eval()
    exec(block, {"gn_det": gn_det, "model": model, "batches": [torch.rand(2, 3, 64, 64)]})
    assert "calibrated" in capsys.readouterr().out
    assert sum(isinstance(m, gn_det.FusedGroupNorm) for m in model.modules()) == 20


def test_the_benchmark_prints_the_readmes_table(home: Path) -> None:
    done = run(command("benchmark_group_norm.py"), home)
    assert done.returncode == 0, done.stderr

    def cells(text: str) -> set[tuple[str, ...]]:
        rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
        return {tuple(cell.strip() for cell in row.split("|")) for row in rows}

    printed = {row[1:6] for row in cells(done.stdout)}
    table = README[README.index("|                       | forward") :].split("\n\n")[0]
    rows = [row for row in cells(table) if "R+" in row[1]]
    assert len(rows) == 4
    for _, *counts, saved in rows:
        assert (*counts, saved.removesuffix(" B")) in printed


def test_an_editable_install_works_without_detectron2(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    # Without gn_det's one requirement: PyTorch is some gigabytes.
    pip = [python, "-m", "pip", "install", "--no-deps", "--quiet", "-e", str(ROOT)]
    subprocess.run(pip, check=True)
    code = "import gn_det; print(gn_det.__version__)"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"
