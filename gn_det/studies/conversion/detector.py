"""Converting a detector: its GN config, images to calibrate on, its evaluation and fine-tuning."""

from __future__ import annotations

import logging
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import Tensor, nn

from gn_det.checkpoint import Checkpointer
from gn_det.config import dump_config
from gn_det.data.train_loader import build_train_loader
from gn_det.engine.evaluation import ap_of
from gn_det.engine.schedule import rescale_schedule
from gn_det.engine.trainer import evaluate, train
from gn_det.errors import InputError
from gn_det.files import make_folder, write_atomically
from gn_det.injection import DetectorBatch, run_on_boxes
from gn_det.injection.convert_bn import bn_sites, has_bn
from gn_det.modeling.with_gn import groups_from_config
from gn_det.studies.conversion.pictures import TrainingPictures, held_out_pictures
from gn_det.studies.conversion.report import images_shown, write_report
from gn_det.studies.conversion.stages import (
    CHECKPOINT,
    FINE_TUNED,
    WEIGHTS,
    Conversion,
    ToDistill,
    convert_in_stages,
    write_weights,
)
from gn_det.text import markdown

__all__ = ["calibration_batches", "config_with_gn", "convert_detector"]


# What stands for a model: the first of these that its evaluation has.
_METRICS = {
    "mask AP": ("segm", "AP"),
    "box AP": ("bbox", "AP"),
    "PQ": ("panoptic_seg", "PQ"),
    "mIoU": ("sem_seg", "mIoU"),
    "AR@1000": ("box_proposals", "AR@1000"),
}


def convert_detector(
    cfg: CfgNode,
    title: str,
    folder: Path,
    calibration_images: int,
    distill: int = 0,
    fine_tune: int = 0,
) -> tuple[Conversion, str]:
    """Convert the BN layers of a config's trained detector to GN.

    The folder gets ``model_gn.pth``, ``config.yaml``, which loads and trains it, the report, what
    each stage predicted, and the run of fine-tuning.

    Args:
        cfg: of the model with BN, whose weights are MODEL.WEIGHTS, with the data sets of the run
            and a SEED that is not negative.
        title: of the report.
        folder: to write to.
        calibration_images: how many training images γ, β are fitted on.
        distill: steps in which the backbone learns the features of that with BN; 0 for none.
        fine_tune: iterations of the config's schedule; 0 for none.

    Returns:
        What was found, and the name of the metric.

    Raises:
        InputError: a model that cannot be converted, or more than one held-out set.
    """
    if len(cfg.DATASETS.TEST) > 1:
        raise InputError(
            f"the report is of one held-out set, and DATASETS.TEST has {cfg.DATASETS.TEST}"
        )
    model = build_model(cfg).eval()
    groups = groups_from_config(cfg)
    gn_cfg = config_with_gn(cfg, bn_sites(model, **groups))
    gn_cfg.MODEL.WEIGHTS = str((folder / WEIGHTS).resolve())
    gn_cfg.OUTPUT_DIR = str(folder / "run")
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    evaluation = _Evaluation(cfg, folder)

    total = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)
    fitted = images_shown(calibration_images, total)

    def report(conversion: Conversion) -> None:
        how = (
            f"γ, β were fitted on {fitted} (seed {cfg.SEED}) to the BN layers of "
            f"{markdown(cfg.MODEL.WEIGHTS)}. [config.yaml](config.yaml) loads the weights, "
            f"{WEIGHTS}. It is the config of the model with BN, except for "
            f"MODEL.META_ARCHITECTURE {gn_cfg.MODEL.META_ARCHITECTURE}, MODEL.GN.SITES "
            f"{gn_cfg.MODEL.GN.SITES} and MODEL.WEIGHTS. Layers that FREEZE_AT froze stay frozen."
        )
        if conversion.metric:
            how += " The predictions of each stage are in evaluation/0, evaluation/1, ..."
        if conversion.losses:
            how += (
                f" Then the backbone learnt the features of that with BN, in {distill} steps of "
                f"{cfg.SOLVER.IMS_PER_BATCH} training images; convolutions learnt as well."
            )
        if fine_tune:
            how += f" Fine-tuning takes {fine_tune} iterations, in {FINE_TUNED}/."
        settings = {
            "config": title,
            "weights": cfg.MODEL.WEIGHTS,
            "seed": cfg.SEED,
            "calibration_images": calibration_images,
            "distill": distill,
            "fine_tune": fine_tune,
            "results": dict(zip(conversion.metric, evaluation.results, strict=True)),
        }
        write_report(folder, title, how, conversion, evaluation.metric, settings)

    def keep(model: nn.Module, conversion: Conversion) -> None:
        write_weights(model, folder)
        write_atomically(folder / "config.yaml", dump_config(gn_cfg))
        report(conversion)

    def fine_tuned(model: nn.Module) -> None:
        model.load_state_dict(_fine_tuned(gn_cfg, fine_tune, folder / FINE_TUNED))

    conversion = convert_in_stages(
        model,
        calibration_batches(cfg, model, calibration_images),
        run_on_boxes,
        evaluate=evaluation if cfg.DATASETS.TEST else None,
        keep=keep,
        to_distill=_to_distill(cfg, model, folder, distill),
        fine_tune=fine_tuned if fine_tune else None,
        **groups,
    )
    report(conversion)
    return conversion, evaluation.metric


def _to_distill(cfg: CfgNode, model: nn.Module, folder: Path, steps: int) -> ToDistill | None:
    """Training pictures for the backbone, and held-out ones for its error."""
    if not steps:
        return None
    backbone = getattr(model, "backbone", None)
    if backbone is None or not hasattr(model, "preprocess_image") or not has_bn(backbone):
        logging.getLogger(__name__).info(
            f"no distillation: {type(model).__name__} has no backbone with BN whose features could "
            "be compared"
        )
        return None
    return ToDistill(
        TrainingPictures(cfg), held_out_pictures(cfg), _features, steps, folder / CHECKPOINT
    )


def _features(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    return model.backbone(model.preprocess_image(inputs).tensor)


class _Evaluation:
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
        self.cfg.OUTPUT_DIR = str(self.folder / "evaluation" / str(len(self.results)))
        results = evaluate(self.cfg, model.eval())
        self.results.append(results)
        for self.metric, (task, name) in _METRICS.items():
            if name in results.get(task, {}):
                return ap_of(results[task][name])
        raise InputError(f"the evaluation has none of {', '.join(_METRICS)}, but {[*results]}")


def _fine_tuned(gn_cfg: CfgNode, iterations: int, folder: Path) -> dict[str, Tensor]:
    """Weights after the schedule of a config in so many iterations, from MODEL.WEIGHTS."""
    cfg = rescale_schedule(gn_cfg, iterations)
    cfg.SOLVER.CHECKPOINT_PERIOD = max(1, iterations // 4)
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = (), 0
    cfg.OUTPUT_DIR = str(folder)
    make_folder(folder)
    write_atomically(folder / "config.yaml", dump_config(cfg))
    model, _ = train(cfg, resume=True)
    return model.state_dict()


def config_with_gn(cfg: CfgNode, sites: list[str]) -> CfgNode:
    """The config whose model has GN at these sites, and everything else as in cfg.

    MODEL.META_ARCHITECTURE becomes gn_det's form of it, with the sites added to MODEL.GN.SITES; GN
    that the model has already stays.

    Args:
        cfg: of a model with BN at the sites; not changed.
        sites: keys of gn_det.injection.sites.SITES.

    Raises:
        InputError: gn_det has no form of that meta-architecture, or the config asks for Weight
            Standardization, under which the convolutions would compute something else.
    """
    if cfg.MODEL.GN.WEIGHT_STANDARDIZATION:
        raise InputError(
            "MODEL.GN.WEIGHT_STANDARDIZATION would change what the convolutions before BN compute; "
            "set it to False"
        )
    cfg = cfg.clone()
    cfg.defrost()
    name = cfg.MODEL.META_ARCHITECTURE
    there = []
    if name.startswith("GN"):
        there = [site for site in cfg.MODEL.GN.SITES if site not in sites]
    elif f"GN{name}" in META_ARCH_REGISTRY:
        cfg.MODEL.META_ARCHITECTURE = f"GN{name}"
    else:
        raise InputError(
            f"there is no GN form of MODEL.META_ARCHITECTURE {name} that a config could name; call "
            "gn_det.convert_bn in your program"
        )
    cfg.MODEL.GN.SITES = [*there, *sites]
    return cfg


def calibration_batches(cfg: CfgNode, model: nn.Module, num_images: int) -> list[DetectorBatch]:
    """The first training images, as the mapper gives them; they depend on SEED alone.

    Args:
        cfg: with a SEED that is not negative.
        model: with BN, in eval mode; box heads are going to look at its proposals.
        num_images: in all, SOLVER.IMS_PER_BATCH at a time.
    """
    batches = []
    with closing(build_train_loader(cfg)) as loader:
        for inputs in islice(loader, -(-num_images // cfg.SOLVER.IMS_PER_BATCH)):
            inputs = inputs[: num_images - sum(len(batch.inputs) for batch in batches)]
            batches.append(DetectorBatch.of(model, inputs))
    return batches
