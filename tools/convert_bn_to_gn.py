"""Convert the BN layers of a trained detector to GN, their γ, β fitted on training pictures.

Convolutions stay. OUTPUT_DIR gets the weights, a config that trains or evaluates them with
train_net.py, and a report: the error of each norm, and where there are held-out pictures AP with
BN, with γ, β copied, fitted, and fine-tuned.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from gn_det.checkpoint import Checkpointer
from gn_det.config import dump_config, load_config
from gn_det.data.datasets import register_folders
from gn_det.engine.command import run_command
from gn_det.engine.run import holds_run, run_folder, set_up_process, with_null
from gn_det.engine.run_data import check_config_data, set_data
from gn_det.engine.schedule import resolve_schedule
from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError
from gn_det.injection.convert_bn import bn_sites
from gn_det.studies.conversion.detector import calibration_batches, config_with_gn, run_on_boxes
from gn_det.studies.conversion.report import conversion_report, plot_conversion, stage_table
from gn_det.studies.conversion.stages import Conversion, convert_in_stages
from gn_det.utils import whole_file, write_atomically
from gn_det.version import __version__

FINE_TUNED = "fine_tuned"  # folder of that run

# What stands for a model: the first of these that its evaluation has.
METRICS = {
    "mask AP": ("segm", "AP"),
    "box AP": ("bbox", "AP"),
    "PQ": ("panoptic_seg", "PQ"),
    "mIoU": ("sem_seg", "mIoU"),
    "AR@1000": ("box_proposals", "AR@1000"),
}


def main() -> None:
    args = parse_arguments()
    cfg = resolve_schedule(load_config(args.config_file, args.opts), world_size=1)
    weights = Path(cfg.OUTPUT_DIR).resolve() / "model_gn.pth"
    if weights.exists() or (weights.parent / FINE_TUNED).exists() or holds_run(weights.parent):
        raise InputError(
            f"{cfg.OUTPUT_DIR} holds a run or a conversion; name another OUTPUT_DIR to keep it"
        )
    with run_folder(cfg.OUTPUT_DIR, args) as folder:
        data = check_config_data(args, cfg)
        if len(data.test) > 1:
            raise InputError(
                f"the report is of one held-out set, and DATASETS.TEST has {data.test}"
            )
        data.leave_out_bad_images(folder)
        set_data(cfg, data)
        register_folders(data.folders)
        cfg.SEED = set_up_process(folder, cfg.SEED, cfg.CUDNN_BENCHMARK)
        model = build_model(cfg).eval()
        groups = {"num_groups": cfg.MODEL.GN.NUM_GROUPS}
        if cfg.MODEL.GN.CHANNELS_PER_GROUP > 0:
            groups = {"channels_per_group": cfg.MODEL.GN.CHANNELS_PER_GROUP}
        gn_cfg = config_with_gn(cfg, bn_sites(model, **groups))
        gn_cfg.MODEL.WEIGHTS, gn_cfg.OUTPUT_DIR = str(weights), str(folder / "run")
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)

    evaluation = Evaluation(cfg, folder)

    def keep(model: nn.Module, conversion: Conversion) -> None:
        with whole_file(weights) as file:
            torch.save({"model": model.state_dict()}, file)
        write_atomically(folder / "config.yaml", dump_config(gn_cfg))
        write_report(folder, cfg, gn_cfg, args, conversion, evaluation)

    def fine_tune(model: nn.Module) -> None:
        model.load_state_dict(fine_tuned(gn_cfg, args.fine_tune, folder / FINE_TUNED))

    conversion = convert_in_stages(
        model,
        calibration_batches(cfg, model, args.calibration_images),
        run_on_boxes,
        evaluate=evaluation if data.test else None,
        keep=keep,
        fine_tune=fine_tune if args.fine_tune else None,
        **groups,
    )
    write_report(folder, cfg, gn_cfg, args, conversion, evaluation)
    print(f"\n{conversion.calibration}\n")
    if conversion.metric:
        print(f"{stage_table(evaluation.metric, conversion.metric, 'simple')}\n")
    print(f"The weights are {weights}, the report is {folder / 'report.md'}.")


class Evaluation:
    """Evaluates models on the held-out set.

    Attributes:
        metric: the name of what a call returned.
        results: everything that the evaluations found, in their order.
    """

    def __init__(self, cfg: CfgNode, folder: Path) -> None:
        self.cfg = cfg.clone()
        self.folder = folder
        self.metric = ""
        self.results: list[dict[str, Any]] = []

    def __call__(self, model: nn.Module) -> float:
        # What is predicted at each stage stays.
        self.cfg.OUTPUT_DIR = str(self.folder / "evaluation" / str(len(self.results)))
        results = Trainer.test(self.cfg, model.eval())
        self.results.append(results)
        for self.metric, (task, name) in METRICS.items():
            if name in results.get(task, {}):
                return results[task][name]
        raise InputError(f"the evaluation has none of {', '.join(METRICS)}, but {[*results]}")


def fine_tuned(gn_cfg: CfgNode, iterations: int, folder: Path) -> dict[str, torch.Tensor]:
    """Weights after the schedule of a config in so many iterations, from MODEL.WEIGHTS."""
    cfg = gn_cfg.clone()
    scale = iterations / cfg.SOLVER.MAX_ITER
    steps = sorted({round(scale * step) for step in cfg.SOLVER.STEPS})
    cfg.SOLVER.STEPS = tuple(step for step in steps if 0 < step < iterations)
    cfg.SOLVER.WARMUP_ITERS = round(scale * cfg.SOLVER.WARMUP_ITERS)
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = iterations
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = (), 0
    cfg.OUTPUT_DIR = str(folder)
    folder.mkdir()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    write_atomically(folder / "config.yaml", dump_config(cfg))
    trainer.train()
    return trainer.model.state_dict()


def write_report(
    folder: Path,
    cfg: CfgNode,
    gn_cfg: CfgNode,
    args: argparse.Namespace,
    conversion: Conversion,
    evaluation: Evaluation,
) -> None:
    """Write report.md, report.json and conversion.png."""
    calibration, values = conversion.calibration, conversion.metric
    how = (
        f"γ, β were fitted on {args.calibration_images} training pictures (seed {cfg.SEED}) to the "
        f"BN layers of {cfg.MODEL.WEIGHTS}. [config.yaml](config.yaml) loads the weights, "
        f"model_gn.pth: as the config of the model with BN, but for MODEL.META_ARCHITECTURE "
        f"{gn_cfg.MODEL.META_ARCHITECTURE}, MODEL.GN.SITES {gn_cfg.MODEL.GN.SITES} and "
        "MODEL.WEIGHTS. Layers that FREEZE_AT froze are frozen there, too."
    )
    if values:
        how += " What was predicted at each stage is in evaluation/0, evaluation/1, ..."
    if args.fine_tune:
        how += f" Fine-tuning takes {args.fine_tune} iterations, in {FINE_TUNED}/."
    source = Path(args.config_file).name
    plot_conversion(calibration, folder / "conversion.png", evaluation.metric, values)
    write_atomically(
        folder / "report.md",
        conversion_report(source, how, calibration, evaluation.metric, values),
    )
    content = {
        "gn_det": __version__,
        "config": str(args.config_file),
        "weights": cfg.MODEL.WEIGHTS,
        "seed": cfg.SEED,
        "calibration_images": args.calibration_images,
        "fine_tune": args.fine_tune,
        "metric": evaluation.metric,
        "stages": with_null(values),
        "results": with_null(dict(zip(values, evaluation.results, strict=True))),
        "calibration": asdict(calibration),
    }
    write_atomically(folder / "report.json", json.dumps(content, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Config overrides, KEY VALUE ..., come last: MODEL.WEIGHTS is what is converted, "
        "MODEL.GN.NUM_GROUPS or CHANNELS_PER_GROUP what it is converted to.",
    )
    parser.add_argument("--config-file", required=True, help="of the model with BN")
    for flag, split in (("--train", "training"), ("--val", "held-out")):
        parser.add_argument(
            flag, nargs=2, metavar=("JSON", "IMAGES_DIR"), help=f"{split} split in COCO format"
        )
    parser.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="go on without images of --train and --val that are missing or broken",
    )
    parser.add_argument(
        "--calibration-images", type=int, default=64, help="to fit γ, β on; default: %(default)s"
    )
    parser.add_argument(
        "--fine-tune",
        type=int,
        default=0,
        metavar="ITERATIONS",
        help="then train the config's schedule in so many iterations",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    parser.set_defaults(resume=False, eval_only=False)
    args = parser.parse_args()
    if args.calibration_images < 1 or args.fine_tune < 0:
        parser.error("--calibration-images takes a number of at least 1, --fine-tune of at least 0")
    return args


if __name__ == "__main__":
    run_command(main)
