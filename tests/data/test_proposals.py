"""Proposal files are read in a way that runs nothing before Detectron2 unpickles them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.build import load_proposals_into_dataset
from detectron2.data.datasets import register_coco_instances
from support.hostile import REFUSED, write_hostile
from support.programs import ROOT, TINY, folder_flags

from gn_det import InputError
from gn_det.config import load_config
from gn_det.data.proposals import check_proposals
from gn_det.data.train_loader import build_train_loader
from gn_det.engine.trainer import evaluate

CONFIG = ROOT / "configs/small/quickstart.yaml"


def proposals(ids: list[int]) -> dict[str, list]:
    boxes = np.array([[10, 10, 60, 60], [40, 40, 90, 90]], np.float32)
    return {
        "ids": ids,
        "boxes": [boxes for _ in ids],
        "objectness_logits": [np.array([0.5, 2], np.float32) for _ in ids],
    }


def write(file: Path, content: object) -> str:
    file.write_bytes(pickle.dumps(content, 2))
    return str(file)


@pytest.fixture
def files(shapes: Path, tmp_path: Path) -> dict[str, str]:
    """Proposals for the tiny shapes set, by split."""
    written = {}
    for split in ("train", "val"):
        images = json.loads((shapes / f"{split}.json").read_text())["images"]
        content = proposals([image["id"] for image in images])
        written[split] = write(tmp_path / f"{split}.pkl", content)
    return written


def options(train: str, test: str) -> list[str]:
    return [
        "MODEL.LOAD_PROPOSALS", "True",
        "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals",
        "DATASETS.PROPOSAL_FILES_TRAIN", f"('{train}',)",
        "DATASETS.PROPOSAL_FILES_TEST", f"('{test}',)",
    ]  # fmt: skip


def test_proposals_of_both_programs_are_good(files: dict[str, str], tmp_path: Path) -> None:
    content = proposals([1, 2])
    old = {"indexes": content["ids"], "boxes": content["boxes"]}
    old["scores"] = content["objectness_logits"]
    none = {"ids": [3], "boxes": [np.zeros((0, 4))], "objectness_logits": [np.zeros(0)]}
    for index, good in enumerate([content, old, {**content, "bbox_mode": 1}, none]):
        file = write(tmp_path / f"{index}.pkl", good)
        check_proposals([file])
        records = [{"image_id": image} for image in good.get("ids", [1, 2])]
        assert "proposal_boxes" in load_proposals_into_dataset(records, file)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("ids"), r"needs a list ids or indexes, and has \['boxes', 'obj"),
        (lambda p: p.update(boxes=3), "needs a list boxes, and has"),
        (lambda p: p["ids"].append(9), "3 ids, 2 arrays of boxes, 2 of scores"),
        (lambda p: p["boxes"].__setitem__(1, np.ones((3, 4))), r"image 2 has boxes \(3, 4\) and"),
        (lambda p: p.update(bbox_mode=17), "bbox_mode is 17, none of"),
    ],
)
def test_other_forms_are_told(tmp_path: Path, change: Callable, message: str) -> None:
    content = proposals([1, 2])
    change(content)
    with pytest.raises(InputError, match=f"holds no proposals: .*{message}"):
        check_proposals([write(tmp_path / "p.pkl", content)])


def test_files_that_are_no_proposals_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no proposals: it is no dict, but list"):
        check_proposals([write(tmp_path / "p.pkl", [1])])
    with pytest.raises(InputError, match=r"proposals .*nowhere\.pkl do not exist"):
        check_proposals([str(tmp_path / "nowhere.pkl")])
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(proposals([1]))[:-20])
    with pytest.raises(InputError, match=r"cut\.pkl cannot be read as a pickle"):
        check_proposals([str(tmp_path / "cut.pkl")])


def test_a_detector_trains_on_proposals(
    shapes: Path, files: dict[str, str], tmp_path: Path, call_main: Callable
) -> None:
    call_main(
        "tools/train_net.py", "--config-file", CONFIG, *folder_flags(shapes),
        *options(files["train"], files["val"]), "OUTPUT_DIR", tmp_path / "run", *TINY,
    )  # fmt: skip
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_net_refuses_hostile_proposals_before_anything_trains(
    split: str, shapes: Path, files: dict[str, str], tmp_path: Path, call_main: Callable
) -> None:
    mark = tmp_path / "mark"
    write_hostile(Path(files[split]), mark, proposals([1]))
    with pytest.raises(InputError, match=rf"{split}\.pkl {REFUSED}"):
        call_main(
            "tools/train_net.py", "--config-file", CONFIG, *folder_flags(shapes),
            *options(files["train"], files["val"]), "OUTPUT_DIR", tmp_path / "run", *TINY,
        )  # fmt: skip
    assert not mark.exists() and not (tmp_path / "run" / "last_checkpoint").exists()


def test_a_lazy_config_refuses_hostile_proposals(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    mark = tmp_path / "mark"
    write_hostile(tmp_path / "p.pkl", mark, proposals([1]))
    for split in ("train", "test"):
        with pytest.raises(InputError, match=rf"p\.pkl {REFUSED}"):
            call_main(
                "tools/lazyconfig_train_net.py",
                "--config-file", ROOT / "configs/small/quickstart.py", *folder_flags(shapes),
                f"train.output_dir={tmp_path / split}",
                f"+dataloader.{split}.dataset.proposal_files=[{tmp_path / 'p.pkl'}]",
            )  # fmt: skip
    assert not mark.exists()


def test_the_loaders_refuse_hostile_proposals_by_themselves(
    shapes: Path, files: dict[str, str], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    for split in ("train", "val"):
        write_hostile(Path(files[split]), mark, proposals([1]))
    register_coco_instances("custom_train", {}, str(shapes / "train.json"), str(shapes / "images"))
    names = ["DATASETS.TRAIN", "('custom_train',)", "DATASETS.TEST", "('custom_train',)"]
    cfg = load_config(CONFIG, [*options(files["train"], files["val"]), *names, "SEED", "0"])
    with pytest.raises(InputError, match=rf"train\.pkl {REFUSED}"):
        build_train_loader(cfg)
    with pytest.raises(InputError, match=rf"val\.pkl {REFUSED}"):
        evaluate(cfg, torch.nn.Identity())
    assert not mark.exists()


def test_sets_without_a_file_are_told(
    shapes: Path, files: dict[str, str], tmp_path: Path, call_main: Callable
) -> None:
    lacking = options(files["train"], files["val"])
    lacking[-1] = "()"
    message = r"a file for each data set, and \['custom_val'\] have .*PROPOSAL_FILES_TEST \[\]"
    with pytest.raises(InputError, match=message):
        call_main(
            "tools/train_net.py", "--config-file", CONFIG, *folder_flags(shapes), *lacking,
            "OUTPUT_DIR", tmp_path / "run",
        )  # fmt: skip
