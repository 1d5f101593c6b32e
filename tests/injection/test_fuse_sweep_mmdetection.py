"""How many norms are fused over mmdetection's families of configs, in mmdetection itself.

mmdetection and the mmcv that it takes do not fit beside the mmcv of the other tests. They are
installed into a folder of pytest's cache once, and used by processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.programs import ROOT

PACKAGES = ["mmdet==3.3.0", "mmcv-lite==2.1.0", "terminaltables", "shapely", "six"]
# How pip says that it reaches no index, or that the index that it reaches has none of these.
NO_NETWORK = re.compile(r"from versions: none|ConnectionError|Connection refused|timed out")


@pytest.fixture(scope="module")
def environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """The environment of a process that imports mmdetection."""
    folder = Path(pytestconfig.cache.mkdir("mmdetection")) / f"python{sys.version_info[1]}"
    if not folder.exists():
        begun = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        done = subprocess.run([*pip, begun, *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(begun, ignore_errors=True)
            if NO_NETWORK.search(done.stderr):
                pytest.skip(f"no network to install mmdetection from: {done.stderr[-300:]}")
            pytest.fail(done.stderr)
        begun.rename(folder)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def swept(environment: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each family, from two processes beside each other."""
    names = subprocess.run(
        [sys.executable, "-m", "support.mmdetection", "--list"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "support.mmdetection", *names[start::2]],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for start in (0, 1)
    ]  # fmt: skip
    rows = []
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        rows += map(json.loads, output.splitlines())
    assert {row["family"] for row in rows} == {*names}
    return rows


def built(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from (row for row in rows if row.get("norms"))


@pytest.mark.slow
def test_nine_norms_of_ten_are_fused_over_mmdetections_families(
    swept: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*built(swept)]
    columns = ("norms", "ran", "followed", "fused")
    total = {column: sum(row[column] for row in rows) for column in columns}
    with capsys.disabled():
        print()
        for row in [*rows, {"family": f"{len(rows)} families", **total}]:
            left = row["norms"] - row["fused"]
            print(f"{row['family']:24}", *(f"{row[c]:6}" for c in columns), f"{left:6}")
    assert len(rows) >= 77
    assert total["ran"] >= 0.95 * total["norms"]
    assert total["fused"] >= 0.9 * total["followed"] > 0


@pytest.mark.slow
def test_a_step_in_training_has_the_same_bits_for_every_class_of_backbone_neck_and_head(
    swept: list[dict[str, Any]],
) -> None:
    compared = {row["family"]: row["equal"] for row in built(swept) if row["equal"] is not None}
    assert len(compared) >= 40
    assert [family for family, equal in compared.items() if not equal] == []


INIT_DETECTOR = """
import collections, sys
from support.mmdetection import import_mmdetection
import_mmdetection()
from mmdet.apis import init_detector
import gn_det
model = init_detector(sys.argv[1], device="cpu")
forms = collections.Counter()
for row in gn_det.audit(model).rows:
    forms[row.form] += len(row.modules)
print(type(model).__name__, sorted(forms.items()))
"""


@pytest.mark.slow
def test_init_detector_builds_a_config_of_ours(environment: dict[str, str]) -> None:
    config = ROOT / "configs/mmdet/mask-rcnn_r50_fpn_gn_1img_2x_coco.py"
    done = subprocess.run(
        [sys.executable, "-c", INIT_DETECTOR, config],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    forms = [("GN", 5), ("GN+GN+add+ReLU", 8), ("GN+ReLU", 41), ("GN+add", 3)]
    forms += [("GN+add+ReLU", 12)]
    assert done.stdout.splitlines()[-1:] == [f"MaskRCNN {forms}"], done.stderr


MASK_RCNN = """
import collections, json, warnings
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
import gn_det
from gn_det.engine.activation_memory import autocast, kept_for_backward
from support.mmdetection import build, families, import_mmdetection

class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches = collections.Counter()
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.launches[operator.name().partition(".")[0].rstrip("_")] += 1
        return operator(*args, **(kwargs or {}))

def image(*shape):
    return torch.empty(*shape, device="cuda")

def step(model):
    features = model.neck(model.backbone(image(1, 3, 256, 320)))
    return [
        features, model.rpn_head(features), model.roi_head.bbox_head(image(8, 256, 7, 7)),
        model.roi_head.mask_head(image(8, 256, 14, 14)),
    ]

warnings.simplefilter("ignore")
import_mmdetection()
kept, launches = {}, {}
for name in ("frozen BN", "BN", "GN", "GN, recomputed"):
    model = build(families()["mask_rcnn"].with_name("mask-rcnn_r50_fpn_1x_coco.py"))
    if name == "frozen BN":
        model = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
    elif name != "BN":
        gn_det.fuse(gn_det.inject(model, "ALL"))
    if name == "GN, recomputed":
        gn_det.recompute(model.backbone)
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        with Counted() as counted:
            step(model)
        launches[name] = counted.launches
        with autocast(True):
            x, weights = image(1, 3, 800, 1344), [*model.parameters()]
            parts = {"backbone": model.backbone}
            kept[name] = kept_for_backward(lambda: model.backbone(x), parts, weights)["backbone"]
print(json.dumps([launches, kept]))
"""


@pytest.mark.slow
def test_mask_rcnn_has_no_launches_for_its_residuals_and_keeps_what_frozen_bn_does(
    environment: dict[str, str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MASK_RCNN], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    launches, kept = json.loads(done.stdout.splitlines()[-1])
    unfused, fused = launches["BN"], launches["GN"]
    assert unfused["aten::relu"] == 61 and unfused["aten::add"] == 19
    # The two linear layers of the box head have no norm.
    assert fused["aten::relu"] == 2 and fused.get("aten::add", 0) == 0
    assert fused["gn_det::group_norm"] == 67
    assert kept["GN"] > 1.9 * kept["frozen BN"]
    assert kept["GN, recomputed"] <= kept["frozen BN"]
