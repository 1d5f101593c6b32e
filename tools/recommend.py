"""Say which recipe fits a data set and a machine, by the measurements of tools/compare.py.

It names the row of the table of measurements that the answer rests on. Where no measured data set
is near yours, it says so and recommends nothing.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from gn_det.engine.command import at_least, run_command
from gn_det.engine.schedule import rescale_schedule

import torch
from detectron2.config import CfgNode

from gn_det.config import load_config
from gn_det.data.coco import read_coco
from gn_det.data.datasets import CocoFolder, read_folder
from gn_det.data.facts import DataFacts, facts_of
from gn_det.errors import InputError
from gn_det.modeling.with_gn import puts_gn_into_the_backbone
from gn_det.studies.conversion.backbone import source_of
from gn_det.studies.memory.plan import GpuMemory
from gn_det.studies.memory.step import GN_DET, count_step
from gn_det.studies.recommendation.measured import MEASURED, Row, read_rows
from gn_det.studies.recommendation.nearest import best_row, far_in, nearest_rows
from gn_det.text import table

RECIPES = Path("configs/compare/photos")
COUNTED = "gn_everywhere.yaml"  # GN keeps the most for the backward pass
LITE0 = "weights/lite0.pth"
IMAGES_TRIED = (1, 2, 4, 8, 16)


def main() -> None:
    args = parse_arguments()
    json_file = args.data / "train.json"
    annotations = read_coco(json_file)["annotations"]
    masks = any(annotation.get("segmentation") for annotation in annotations)
    folder = CocoFolder("train", str(json_file), str(args.data / "images"))
    facts = facts_of(read_folder(folder, masks=masks).used)
    rows = [row for file in [MEASURED, *args.measured] for row in read_rows(file)]
    print(f"{facts_table(json_file, facts)}\n")
    near = nearest_rows(facts, rows)
    if not near:
        raise InputError(f"{MEASURED} and --measured have no rows")
    if far := far_in(facts, near[0]):
        print(f"{rows_table(near)}\n\n{no_recommendation(near[0], far)}")
        return
    fitting = images_that_fit(args.gpu_memory)
    row = best_row(near, fitting)
    print(f"{rows_table(near, row)}\n")
    if row is None:
        print(f"No recommendation: not one image of {RECIPES / COUNTED} fits.")
        return
    print(recommendation(row, near, args.data, masks, fitting, args.num_gpus))


def images_that_fit(gpu_memory: str | None) -> int:
    """Images per step, of the largest size of the recipes, with GN; by the planner on a GPU."""
    card = card_of(gpu_memory)
    if card is None:
        print("No GPU: how many images fit is left to the machine's memory.")
        return max(IMAGES_TRIED)
    cfg = load_config(RECIPES / COUNTED)
    size = (max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN)
    fitting = 0
    for number in IMAGES_TRIED:
        if card.fits(count_step(cfg, GN_DET, number, size)):
            fitting = number
    print(
        f"On {card.num_bytes / 2**30:.1f} GiB, {fitting} images of {size[0]}x{size[1]} fit with GN."
    )
    return fitting


def card_of(gpu_memory: str | None) -> GpuMemory | None:
    """--gpu-memory, or the memory of this machine's GPU; None where there is none."""
    if gpu_memory is not None:
        return GpuMemory.parse(gpu_memory)
    if torch.cuda.is_available():
        return GpuMemory(torch.cuda.get_device_properties(0).total_memory)
    return None


def facts_table(json_file: Path, facts: DataFacts) -> str:
    """What the data set is like."""
    rows = [
        ("pictures with objects", str(facts.pictures)),
        ("classes", str(facts.classes)),
        ("objects per picture", f"{facts.objects_per_picture:.1f}"),
        ("median size of an object", f"{facts.object_size:.2f} of its picture"),
    ]
    return table(rows, [str(json_file), ""], disable_numparse=True)


def rows_table(rows: list[Row], recommended: Row | None = None) -> str:
    """The measured rows, the best first, and a mark at one of them."""
    cells = [
        [
            ">" if row is recommended else "",
            f"{row.data}, {row.pictures} pictures",
            row.recipe,
            row.weights,
            row.ims_per_batch,
            row.steps,
            f"{row.lr:g}",
            shown(row.box_ap, row.box_deviation, row.seeds),
            "" if row.mask_ap is None else shown(row.mask_ap, row.mask_deviation, row.seeds),
            row.seeds,
            row.commit,
        ]
        for row in sorted(rows, key=lambda row: (-row.images, -row.ap))
    ]
    headers = [
        *("", "measured on", "recipe", "weights", "images per step", "steps", "learning rate"),
        *("box AP", "mask AP", "seeds", "commit"),
    ]
    return table(cells, headers, disable_numparse=True)


def shown(mean: float, deviation: float | None, seeds: int) -> str:
    return f"{mean:.1f} ± {deviation:.1f}" if seeds > 1 else f"{mean:.1f}"


def no_recommendation(nearest: Row, far: dict[str, tuple[float, float]]) -> str:
    """That no measured set is near, and in what the nearest differs."""
    differing = "; ".join(
        f"{key.replace('_', ' ')} {own:.3g}, and there {measured:.3g}"
        for key, (own, measured) in far.items()
    )
    return (
        f"No recommendation: no measured data set is near yours. The nearest is {nearest.data} "
        f"({nearest.pictures} pictures), and differs in: {differing}. Measure your own: "
        "make compare-photos DATA=folder, then name its measured.csv with --measured."
    )


def recommendation(
    row: Row, near: list[Row], data: Path, masks: bool, fitting: int, num_gpus: int
) -> str:
    """Recipe, weights, learning rate and steps, and the command that trains."""
    images = "1 image" if row.ims_per_batch == 1 else f"{row.ims_per_batch} images"
    cfg = load_config(row.config, shlex.split(row.overrides))
    lines = [
        f"Recommended: {row.recipe} ({norm_of(cfg)}), from the weights {row.weights}, "
        f"{row.steps} steps of {images} at a learning rate of {row.lr:g}: {row.ap:.1f} AP (mean of "
        f"box and mask) on {row.data}, the highest of the longest trainings that fit.",
    ]
    if not masks and row.mask_ap is not None:
        lines.append(
            "That was measured with masks. Your data have none, and the command trains none."
        )
    if row.note:
        lines.append(row.note)
    if row.seeds == 1:
        lines.append("It rests on one seed, so that a difference of a few AP says nothing.")
    others = [o for o in near if o != row and o.images == row.images]
    close = [o for o in others if o.ims_at_a_time <= fitting and row.ap - o.ap < 1]
    if close:
        names = ", ".join(f"{o.recipe} at {o.ims_per_batch} a step" for o in close)
        lines.append(f"Within 1 AP of it: {names}.")
    if num_gpus > 1:
        lines.append(
            f"That is taken as steps of one GPU. On {num_gpus} the same pictures are seen in "
            f"1/{num_gpus} of the steps, and the learning rate rises in proportion."
        )
    if source_of(cfg.MODEL.TIMM.WEIGHTS)[1]:
        lines.append("The last command trains, and the one before makes its weights.")
    return "\n".join([*lines, "", command(row, cfg, data, masks, num_gpus)])


def norm_of(cfg: CfgNode) -> str:
    """The norm of the backbone of a recipe, in words."""
    gn = cfg.MODEL.GN
    groups = "1 group" if gn.NUM_GROUPS == 1 else f"{gn.NUM_GROUPS} groups"
    if gn.CHANNELS_PER_GROUP:
        groups = f"{gn.CHANNELS_PER_GROUP} channels a group"
    if not puts_gn_into_the_backbone(cfg):
        norm = cfg.MODEL.TIMM.NORM if cfg.MODEL.TIMM.NAME else cfg.MODEL.RESNETS.NORM
        return {"FrozenBN": "frozen BN", "BN": "BN that trains"}.get(norm, norm)
    if cfg.MODEL.GN.HAND_OVER_STEPS:
        return f"frozen BN that becomes GN of {groups}"
    return f"GN of {groups}"


def command(row: Row, cfg: CfgNode, data: Path, masks: bool, num_gpus: int) -> str:
    """That trains the row's recipe with its schedule on the data, after one for its weights."""
    scale = row.ims_per_batch / cfg.SOLVER.IMS_PER_BATCH  # of the reference
    steps = round(row.steps * scale)
    settings: dict[str, object] = {
        "SOLVER.IMS_PER_GPU": row.ims_per_batch // cfg.SOLVER.ACCUMULATE_STEPS,
        "SOLVER.BASE_LR": f"{row.lr / scale:g}",
        "SOLVER.MAX_ITER": steps,
    }
    if steps != cfg.SOLVER.MAX_ITER:
        run = rescale_schedule(cfg, steps)
        settings["SOLVER.WARMUP_ITERS"] = run.SOLVER.WARMUP_ITERS
        if min(cfg.SOLVER.STEPS, default=cfg.SOLVER.MAX_ITER) < cfg.SOLVER.MAX_ITER:
            settings["SOLVER.STEPS"] = run.SOLVER.STEPS
        if run.MODEL.GN.HAND_OVER_STEPS:
            settings["MODEL.GN.HAND_OVER_STEPS"] = run.MODEL.GN.HAND_OVER_STEPS
    config = shlex.quote(row.config)
    gpus = f"--num-gpus {num_gpus} " if num_gpus > 1 else ""
    splits = {
        split: shlex.join([f"--{split}", f"{data}/{split}.json", f"{data}/images"])
        for split in ("train", "val")
        if (data / f"{split}.json").exists()
    }
    boxes_alone = [] if masks else ["MODEL.MASK_ON", "False"]
    given = shlex.join([*shlex.split(row.overrides), *boxes_alone])
    source, stage = source_of(cfg.MODEL.TIMM.WEIGHTS)
    first = ""
    if source == LITE0 and not Path(LITE0).exists():
        first = f"make {LITE0}\n\n"
    if stage:
        made = Path("output/recommended_weights") / f"{data.absolute().name}-{row.recipe}"
        settings["MODEL.TIMM.WEIGHTS"] = made / f"{stage}.pth"
        first += (
            f".venv/bin/python tools/convert_bn_to_gn.py --backbone {config} {splits['train']} "
            f"--output {shlex.quote(str(made))} {given}".rstrip()
            + "\n\n"
        )
    overrides = shlex.join(str(word) for pair in settings.items() for word in pair)
    overrides = f"{given} {overrides}".lstrip()
    return (
        f"{first}.venv/bin/python tools/train_net.py --config-file {config} "
        f"{' '.join(splits.values())} {gpus}OUTPUT_DIR output/recommended {overrides}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train.json, in COCO format")
    parser.add_argument(
        "--gpu-memory", help="memory of the GPU, such as 8GiB (default: that of this machine's GPU)"
    )
    parser.add_argument(
        "--num-gpus",
        "--gpus",
        **at_least(1),
        default=1,
        help="GPUs to train on, default: %(default)s",
    )
    parser.add_argument(
        "--measured",
        nargs="+",
        type=Path,
        default=[],
        metavar="CSV",
        help="more rows: measured.csv of comparisons",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
