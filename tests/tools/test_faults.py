"""Every user's fault, in every program: status 2, one line that says it, and nothing left behind.

A row is what is typed and what is said. Names in braces are of the files that `world` makes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.programs import ROOT, folder_flags, run_forked

SHORT = {
    "TRAIN": "tools/train_net.py --config-file {quickstart}",
    "DATA": "tools/train_net.py --config-file {quickstart} {data} OUTPUT_DIR {out}",
    "LAZY": "tools/lazyconfig_train_net.py --config-file {lazy} {data} train.output_dir={out}",
    "COMPARE": "tools/compare.py --output {out} {data} --recipes",
    "CONVERT": "tools/convert_bn_to_gn.py --output {out}",
    "WEIGHTS": "tools/convert_weights.py --output {out}.pth",
    "LEARN": "tools/train_classifier.py --network resnet10 --norm GN --output {out}",
    "SWEEP": "tools/batch_size_sweep.py --network resnet10 --data digits --output {out}",
    "GROUPS": "tools/group_ablation.py --network resnet10 --data digits --output {out}",
    "FEATURES": "tools/feature_distribution.py --output {out}",
    "ACCUMULATE": "tools/measure_accumulation.py --output {out} --config-file",
    "PLAN": "tools/plan_memory.py --config-file {quickstart}",
    "DEMO": "demo/demo.py --output {out} --config-file {quickstart}",
    "AUDIT": "tools/audit_norms.py --config-file",
    "GAP": "tools/train_test_gap.py --output {out}",
    "BENCH": "tools/benchmark_group_norm.py",
    "SHAPES": "tools/make_shapes.py",
    "REPORT": "tools/report_run.py",
    "DIAGRAM": "tools/norm_diagram.py --output",
}
FAULTS = [
    # Configs.
    ("AUDIT gone.yaml", "gone.yaml is no file, and no config of Detectron2's model zoo"),
    ("AUDIT {folder}", "folder is no file, and no config of Detectron2's model zoo"),
    ("AUDIT {pipe}", "pipe is no file, and no config of Detectron2's model zoo"),
    ("AUDIT {binary}", "binary is no YAML: 'utf-8' codec can't decode byte 0x80 in position"),
    ("AUDIT {loop}", "_BASE_ leads back to its beginning"),
    ("AUDIT {unknown_key}", "unknown.yaml: no config key SOLVER.BASE_LRR; did you mean"),
    ("AUDIT {not_a_map}", "list.yaml holds no config keys"),
    ("AUDIT {bad_python}", "bad.py is no Python: '(' was never closed in line 1"),
    ("AUDIT {quickstart} --sites bakbone", "no site 'bakbone'; did you mean backbone?; there"),
    ("tools/train_net.py --config-file gone.yaml {data} OUTPUT_DIR {out}", "config file gone.yaml"),
    (
        "tools/train_net.py {data} OUTPUT_DIR {out} MODEL.WEIGHTS gone.pth",
        "weights gone.pth do not",
    ),
    ("tools/lazyconfig_train_net.py --config-file gone.py {data}", "LazyConfig file gone.py"),
    ("tools/lazyconfig_train_net.py --config-file {quickstart} {data}", "LazyConfig file"),
    ("tools/train_net.py --config-file {lazy} {data} OUTPUT_DIR {out}", "is no YAML"),
    # Overrides.
    ("DATA SOLVER.BASE_LRR 1", "the overrides: no config key SOLVER.BASE_LRR; did you mean"),
    ("DATA SOLVER.BASE_LR", "the overrides are KEY VALUE pairs, and SOLVER.BASE_LR has no value"),
    ("DATA SOLVER.BASE_LR fast", "the overrides: SOLVER.BASE_LR is fast, of the type str, and"),
    ("DATA SOLVER.MAX_ITER 0 SEED -7", "SEED is -7, and has to be from -1 to 2147483647;"),
    ("DATA MODEL.DEVICE mps", "MODEL.DEVICE is 'mps', and has to be cpu, cuda or cuda:N"),
    ("DATA MODEL.DEVICE cuda", "device cuda is asked for, and PyTorch sees 0 GPUs; to use the"),
    ("DATA SOLVER.AMP.ENABLED True", "mixed precision needs a GPU; turn it off with"),
    ("DATA MODEL.RESNETS.NORM GroupNorm", "MODEL.RESNETS.NORM is 'GroupNorm', and has to be one"),
    ("DATA MODEL.BACKBONE.FREEZE_AT 2", "without MODEL.WEIGHTS, MODEL.BACKBONE.FREEZE_AT 2"),
    ("DATA MODEL.WEIGHTS gone.pth", "weights gone.pth do not exist"),
    ("DATA MODEL.WEIGHTS {page}", "weights.pth cannot be read as weights: it is no file that"),
    ("DATA MODEL.WEIGHTS {pipe}", "weights pipe are no file, but a folder, device, pipe or"),
    ("DATA MODEL.WEIGHTS ftp://nowhere/x.pth", "ftp://nowhere/x.pth: addresses begin with"),
    ("DATA MODEL.WEIGHTS https://nowhere.invalid/../x.pth", "https://nowhere.invalid/../x.pth:"),
    ("DATA MODEL.WEIGHTS http://127.0.0.1:9/x.pth", "weights http://127.0.0.1:9/x.pth:"),
    ("DATA MODEL.WEIGHTS http://127.0.0.1:9/y.pkl", "cannot be fetched"),
    ("LAZY train.max_iterr=5", "no config key train.max_iterr; did you mean train.max_iter?"),
    ("LAZY train.max_iter", "override 'train.max_iter' is not of the form key=value"),
    ("LAZY train.max_iter=0", "train.max_iter is 0, and has to be a whole number from 1"),
    ("LAZY train.device=cuda", "device cuda is asked for, and PyTorch sees 0 GPUs; to use the"),
    ("LAZY train.init_checkpoint=gone.pth", "weights gone.pth do not exist"),
    # Flags.
    ("DATA --num-gpus 0", "--num-gpus stands after the config overrides; flags come first"),
    ("TRAIN --num-gpus 0 {data} OUTPUT_DIR {out}", "--num-gpus and --num-machines must be at"),
    ("TRAIN --num-gpus 3 {data} OUTPUT_DIR {out}", "2 images per step do not divide among 3"),
    ("TRAIN --num-machines 2 {data} OUTPUT_DIR {out}", "--num-machines 2: name the place where"),
    ("TRAIN --val {empty} {images} OUTPUT_DIR {out}", "--val goes with --train"),
    ("TRAIN --train {empty} OUTPUT_DIR {out}", "the overrides are KEY VALUE pairs, and out has"),
    ("TRAIN OUTPUT_DIR {out} DATASETS.TRAIN ()", "no data set is given: add --train JSON"),
    ("TRAIN OUTPUT_DIR {out} DATASETS.TRAIN \"('balloons',)\"", "data set 'balloons' is not"),
    ("TRAIN OUTPUT_DIR {out} DATASETS.TRAIN \"('coco_2017_train',)\"", "needs datasets"),
    # Data.
    ("DATA MODEL.META_ARCHITECTURE PanopticFPN", "learns semantic segmentation, which --train"),
    ("DATA MODEL.META_ARCHITECTURE GNPanopticFPN", "GNPanopticFPN learns semantic segmentation"),
    ("DATA MODEL.META_ARCHITECTURE GNSemanticSegmentor", "learns semantic segmentation, which"),
    ("TRAIN --train gone.json {images} OUTPUT_DIR {out}", "annotation file gone.json does not"),
    ("TRAIN --train {train} {folder}/gone OUTPUT_DIR {out}", "folder/gone is not a folder of"),
    ("TRAIN --train {folder} {images} OUTPUT_DIR {out}", "annotation file folder is no file,"),
    ("TRAIN --train {pipe} {images} OUTPUT_DIR {out}", "annotation file pipe is no file, but a"),
    ("TRAIN --train {socket} {images} OUTPUT_DIR {out}", "annotation file socket is no file,"),
    ("TRAIN --train /dev/zero {images} OUTPUT_DIR {out}", "annotation file /dev/zero is no"),
    ("TRAIN --train {binary} {images} OUTPUT_DIR {out}", "binary is not JSON: Expecting value"),
    ("TRAIN --train {not_a_map} {images} OUTPUT_DIR {out}", "list.yaml is not in COCO format:"),
    ("TRAIN --train {empty} {images} OUTPUT_DIR {out}", "empty.json is refused: 1 no category"),
    ("TRAIN --train {train} {folder} OUTPUT_DIR {out}", "6 of 6 images are missing in folder:"),
    ("LEARN --data {folder}", "folder/train is no classification set: it needs a folder of"),
    ("LEARN --data nowhere", "nowhere/train is no classification set: it needs a folder of"),
    ("ACCUMULATE {quickstart} --train gone.json {images}", "annotation file gone.json does not"),
    # Folders.
    ("TRAIN {data} OUTPUT_DIR {binary}", "folder binary cannot be written: File exists"),
    ("TRAIN {data} OUTPUT_DIR /proc/run", "folder /proc/run cannot be written: No such file or"),
    ("TRAIN {data} OUTPUT_DIR ''", "OUTPUT_DIR is '', and has to be not empty"),
    ("TRAIN {data} OUTPUT_DIR {run}", "run holds a run already; --resume continues it, another"),
    ("TRAIN --eval-only {data} OUTPUT_DIR {out}", "there are no weights to load: set"),
    ("COMPARE {quickstart} --seeds 0 --ims-per-gpu 0", "--ims-per-gpu 0: at least 1"),
    ("COMPARE gone.yaml", "config file gone.yaml does not exist"),
    ("COMPARE {quickstart} {quickstart}", "two recipes are called quickstart, and would share"),
    ("tools/compare.py --output {run} {data} --recipes {quickstart}", "run holds a run itself"),
    ("SHAPES --output {run}", "run exists and is not the shapes set of {'num_train': 1000,"),
    ("SHAPES --output {out} --num-train 0", "num_train and num_val must be at least 1, seed at"),
    ("SHAPES --output {out} --num-train -3", "num_train and num_val must be at least 1, seed at"),
    ("SHAPES --output {out} --seed -1", "num_train and num_val must be at least 1, seed at"),
    ("SHAPES --output {binary}", "binary exists and is not the shapes set of {'num_train':"),
    ("DIAGRAM {binary}", "--output binary: a PNG file is written, so its name has to end in"),
    ("DIAGRAM {out}.webm", "--output out.webm: a PNG file is written, so its name has to end in"),
    ("DIAGRAM {binary}/x.png", "folder binary cannot be written: File exists"),
    ("REPORT {out}", "out has no results.json: the run there is not finished, or had nothing to"),
    ("REPORT {folder}", "folder has no results.json: the run there is not finished, or had"),
    ("REPORT {binary}", "binary has no results.json: the run there is not finished, or had"),
    # Programs of weights.
    ("CONVERT", "one of the arguments --config-file --backbone --classifier is required"),
    ("CONVERT --config-file {quickstart} {data}", "there are no weights to convert: set"),
    ("CONVERT --classifier {folder}", "folder has no finished classifier of"),
    ("CONVERT --classifier gone", "gone has no finished classifier of tools/train_classifier.py"),
    ("CONVERT --config-file {bn} {data} MODEL.WEIGHTS ''", "there are no weights to convert:"),
    (
        "CONVERT --config-file {bn} {data} --calibration-images 0",
        "--calibration-images 0: at least",
    ),
    ("WEIGHTS gone.pth", "weights gone.pth do not exist"),
    ("WEIGHTS {page}", "weights.pth cannot be read as weights: it is no file that torch.save"),
    ("WEIGHTS {binary}", "binary cannot be read as weights: it is no file that torch.save wrote"),
    ("WEIGHTS {tensorless}", "tensorless.pth holds no weights under 'model' nor at its top, but"),
    ("WEIGHTS {pipe}", "weights pipe are no file, but a folder, device, pipe or socket"),
    ("WEIGHTS {tensorless} --layout detectron", "Detectron's layout is one of .pkl files, and"),
    # Classifiers and measurements.
    ("LEARN --data digits --lr -1", "epochs 100, ims_per_gpu 32, lr -1.0 and seed 0: the first"),
    ("LEARN --data digits --epochs 0", "epochs 0, ims_per_gpu 32, lr 0.1 and seed 0: the first"),
    ("LEARN --data digits --ims-per-gpu 0", "epochs 100, ims_per_gpu 0, lr 0.1 and seed 0: the"),
    ("LEARN --data digits --device cuda", "device cuda is asked for, and PyTorch sees 0 GPUs;"),
    ("LEARN --data digits --device tpu", "device 'tpu' is no device of PyTorch's"),
    ("LEARN --data digits --amp", "mixed precision needs a GPU; leave --amp out"),
    ("LEARN --data digits --num-gpus 0", "--num-gpus and --num-machines must be at least 1"),
    ("LEARN --data digits --norm XN", "argument --norm: invalid choice: 'XN' (choose from"),
    ("SWEEP --ims-per-gpu 0", "epochs 100, ims_per_gpu 0, lr 0.1 and seed 0: the first two are"),
    ("SWEEP --device cuda", "device cuda is asked for, and PyTorch sees 0 GPUs; to use the CPU,"),
    ("SWEEP --jobs 0", "--jobs 0: at least 1"),
    ("GROUPS --norm BN", "unrecognized arguments: --norm BN"),
    ("GROUPS --device cuda", "device cuda is asked for, and PyTorch sees 0 GPUs; to use the"),
    ("GAP {folder}", "folder has no finished classifier of tools/train_classifier.py"),
    ("GAP gone", "gone has no finished classifier of tools/train_classifier.py"),
    ("FEATURES", "say what to learn: --data digits, generated or a folder, or --recipes"),
    ("FEATURES --data digits --network resnet10 --records 0", "--records 0: at least 1"),
    ("FEATURES --recipes {quickstart} {data} --module gone", "GNGeneralizedRCNN has no module"),
    ("FEATURES --recipes {quickstart} --module backbone", "no data set is given: add --train"),
    ("FEATURES --data digits --network resnet10 --norms GN --module gone", "has no module 'gone'"),
    ("AUDIT {quickstart} --format xml", "argument --format: invalid choice: 'xml' (choose from"),
    ("COMPARE {quickstart} --seeds -1", "--seeds -1: at least 0"),
    ("COMPARE {quickstart} --jobs 0", "--jobs 0: at least 1"),
    ("PLAN --gpu-memory 8GiB --output {out}.txt", "--output out.txt: a PNG file is written, so"),
    (
        "tools/batch_size_sweep.py --network resnet10 --data digits --output {run}",
        "run holds a run itself",
    ),
    ("FEATURES --data digits --train {train} {images}", "--train, --val, their flags and config"),
    ("PLAN --gpu-memory much", "--gpu-memory much: give a number and a unit, one of GiB, MiB,"),
    ("PLAN --gpu-memory -3GiB", "argument --gpu-memory: expected one argument"),
    ("PLAN --gpu-memory 8GiB --ims-per-gpu 0", "--ims-per-gpu 0: at least 1"),
    ("PLAN --gpu-memory 8GiB --sizes 800", "--sizes 800: give HEIGHTxWIDTH, such as 800x1333"),
    ("PLAN --gpu-memory 8GiB --output {binary}", "--output binary: a PNG file is written, so"),
    ("BENCH --ims-per-gpu 0", "--ims-per-gpu 0: at least 1"),
    ("BENCH --form GN+Sigmoid", "argument --form: invalid choice: 'GN+Sigmoid' (choose from"),
    # The demo.
    ("DEMO --input {images}", "configs/small/quickstart.yaml names no weights; give them with"),
    ("DEMO --input {images} --weights gone.pth", "weights gone.pth do not exist"),
    ("DEMO --input gone.jpg --weights {tensorless}", "--input gone.jpg: no such file, or no"),
    ("DEMO --input {pipe} --weights {tensorless}", "--input pipe is no file, but a folder,"),
    ("DEMO --input {images} --weights {page}", "weights.pth cannot be read as weights: it is no"),
    ("DEMO --input {images} --weights x --confidence-threshold 7", "is not in 0 to 1"),
    ("DEMO --input {images} --weights {tensorless} --json {binary}", "tensorless.pth holds no"),
    (
        "DEMO --input {images} --weights {tensorless} --opts MODEL.DEVICE cuda",
        "device cuda is asked",
    ),
]


@pytest.fixture(scope="module")
def world(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the rows name: a data set, and files that are not what they should be."""
    root = tmp_path_factory.mktemp("world")
    files = {
        "page": ("weights.pth", "<!DOCTYPE html><html>Not found</html>"),
        "loop": ("loop.yaml", "_BASE_: loop.yaml\n"),
        "unknown_key": ("unknown.yaml", "SOLVER:\n  BASE_LRR: 1\n"),
        "not_a_map": ("list.yaml", "[1, 2]"),
        "bad_python": ("bad.py", "model = (\n"),
        "empty": ("empty.json", '{"images": [], "annotations": [], "categories": []}'),
    }
    for name, text in files.values():
        (root / name).write_text(text)
    (root / "binary").write_bytes(bytes(range(256)))
    torch.save({"epoch": 3}, root / "tensorless.pth")
    (root / "folder").mkdir()
    (root / "run").mkdir()
    (root / "run/last_checkpoint").write_text("model_final.pth")
    (root / "run/metrics.json").write_text(json.dumps({"iteration": 1}) + "\n")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
        yield {
            **{name: str(root / file) for name, (file, _) in files.items()},
            **{name: str(root / name) for name in ("binary", "folder", "run", "pipe", "socket")},
            "tensorless": str(root / "tensorless.pth"),
            "out": str(root / "out"),
            "train": str(shapes / "train.json"),
            "images": str(shapes / "images"),
            "data": shlex.join(folder_flags(shapes)),
            "quickstart": str(ROOT / "configs/small/quickstart.yaml"),
            "bn": str(ROOT / "configs/compare/bn.yaml"),
            "lazy": str(ROOT / "configs/small/quickstart.py"),
        }


def contents(folder: Path) -> dict[str, bytes | None]:
    """What lies in a folder: files with their bytes, other entries with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(("typed", "said"), FAULTS, ids=[typed for typed, _ in FAULTS])
def test_a_fault_is_one_line_with_status_2_and_leaves_nothing(
    typed: str, said: str, world: dict[str, str], tmp_path: Path
) -> None:
    words = typed.split(" ", 1)
    command = " ".join([SHORT.get(words[0], words[0]), *words[1:]])
    program, *arguments = shlex.split(command.format(**world))
    root = Path(world["folder"]).parent
    before = contents(root)
    status = run_forked(program, arguments, tmp_path / "said.txt")
    printed = (tmp_path / "said.txt").read_text()
    lines = [line for line in printed.splitlines() if re.search(r"(^|: )error: ", line)]
    assert status == 2, printed
    assert "Traceback" not in printed
    assert len(lines) == 1 and printed.rstrip().endswith(lines[0]), printed
    assert said in lines[0].replace(f"{root}/", "").replace(f"{Path.cwd()}/", ""), lines[0]
    assert contents(root) == before
