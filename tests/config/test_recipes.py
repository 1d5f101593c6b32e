"""The COCO recipes: what each builds, its schedule, and the page that lists them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import pytest
from detectron2.config import CfgNode
from support.models import audited
from support.programs import ROOT

from gn_det.config import load_config
from gn_det.engine.schedule import resolve_schedule

FOLDER = ROOT / "configs" / "coco"
# Base-COCO and the schedules are parts of recipes.
NAMES = sorted(path.stem for path in FOLDER.glob("*_R_*.yaml"))
PAGE = (ROOT / "configs" / "README.md").read_text()

# Backbone, FPN, box head, mask head, RetinaNet's towers.
R50, FPN, BOX, MASK, TOWERS = 53, 8, 4, 4, 8
R101 = R50 + 3 * 17


@functools.cache
def loaded(name: str) -> CfgNode:
    return load_config(FOLDER / f"{name}.yaml", ["MODEL.DEVICE", "meta"])


def config(name: str) -> CfgNode:
    return loaded(name).clone()


def num_norms(name: str) -> int:
    """The GN layers that the name promises."""
    body = R101 if "R_101" in name else R50
    if "frozenbn" in name:
        return FPN + BOX + MASK if "gn_heads" in name else 0
    if name.startswith("retinanet"):
        return body + 6 + TOWERS
    if "C4" in name:
        return body
    return body + FPN + (3 * BOX if name.startswith("cascade") else BOX) + MASK


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_the_norms_that_its_name_says(name: str) -> None:
    found = audited(config(name))
    assert found.num_norms == num_norms(name)
    assert all(row.form.startswith("WS+") == ("_ws_" in name) for row in found.rows)
    without_convolutions = any("NUM_CONV" in left.reason for left in found.left_alone)
    assert without_convolutions == ("2fc" in name or "C4" in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_schedule_that_its_name_says(name: str) -> None:
    cfg = config(name)
    times = int(re.search(r"_(\d)x$", name).group(1))
    assert cfg.SOLVER.MAX_ITER == times * 90_000
    # As Detectron2 has it: the last 60k and 20k of long schedules, 2/3 and 8/9 of 1x and 2x.
    last = cfg.SOLVER.MAX_ITER
    expected = (last - 60_000, last - 20_000) if times > 1 else (60_000, 80_000)
    assert cfg.SOLVER.STEPS == expected
    assert cfg.SOLVER.IMS_PER_BATCH == 16 and cfg.SOLVER.IMS_PER_GPU == 2
    assert cfg.SOLVER.BASE_LR == (0.01 if "retinanet" in name else 0.02)
    assert cfg.SOLVER.WEIGHT_DECAY_NORM == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_starts_from_the_weights_of_its_norm(name: str) -> None:
    cfg = config(name)
    depth = re.search(r"R_(\d+)", name).group(1)
    if name.startswith("scratch"):
        assert cfg.MODEL.WEIGHTS == "" and cfg.MODEL.BACKBONE.FREEZE_AT == 0
        assert min(cfg.MODEL.PIXEL_STD) > 57
    elif "frozenbn" in name:
        assert cfg.MODEL.WEIGHTS.endswith(f"MSRA/R-{depth}.pkl")
        assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    else:
        assert cfg.MODEL.WEIGHTS.endswith(f"FAIR/R-{depth}-GN")
        assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1 and cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]


def test_frozen_bn_and_gn_differ_in_the_norm_alone() -> None:
    control, gn = config("mask_rcnn_R_50_FPN_frozenbn_2x"), config("mask_rcnn_R_50_FPN_gn_2x")
    # The classifier, and where it has its stride.
    gn.MODEL.META_ARCHITECTURE = control.MODEL.META_ARCHITECTURE
    gn.MODEL.WEIGHTS = control.MODEL.WEIGHTS
    gn.MODEL.RESNETS.STRIDE_IN_1X1 = control.MODEL.RESNETS.STRIDE_IN_1X1
    assert gn == control


def rows() -> Iterator[list[str]]:
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"`\w+`", cells[0]):
            yield cells


def test_the_page_lists_every_recipe_once() -> None:
    listed = [cells[0].strip("`") for cells in rows()]
    assert sorted(listed) == NAMES


def test_a_result_of_ours_is_written_as_the_published_ones_are() -> None:
    for name, *_, ours in rows():
        ap = r"\d\d\.\d" if "mask" not in name else r"\d\d\.\d/\d\d\.\d"
        assert re.fullmatch(rf"({ap}(, .+)?)?", ours), f"{name}: {ours}"


def test_every_published_number_of_the_page_has_its_source() -> None:
    for name, _, published, _ in rows():
        numbers = re.findall(r"\d\d\.\d/\d\d\.\d", published)
        assert len(re.findall(r"\d\d\.\d/\d\d\.\d \[[1-5]\]", published)) == len(numbers), name
    assert all(f"[{source}] " in PAGE.split("Sources:")[1] for source in range(1, 6))


def test_the_pages_schedules_are_the_resolved_ones() -> None:
    found = re.findall(
        r"^\| ([\d ×machines]+) \| (\d+) \| ([\d.]+) \| (\d+) \| (\d+) \|", PAGE, re.M
    )
    assert len(found) == 5
    for name, images, lr, warmup, iterations in found:
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        cfg = config("mask_rcnn_R_50_FPN_gn_1x")
        cfg.SOLVER.IMS_PER_GPU = numbers[-1]
        world_size = numbers[0] * (numbers[1] if len(numbers) == 3 else 1)
        solver = resolve_schedule(cfg, world_size).SOLVER
        assert solver.IMS_PER_BATCH == int(images)
        assert solver.BASE_LR == pytest.approx(float(lr))
        assert (solver.WARMUP_ITERS, solver.MAX_ITER) == (int(warmup), int(iterations))
