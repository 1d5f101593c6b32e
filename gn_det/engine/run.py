"""What is checked before a run begins: settings, processes, weights, data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from gn_det.checkpoint import check_weights_exist
from gn_det.checkpoint.checkpointer import last_checkpoint
from gn_det.config.combinations import check_complete_config
from gn_det.data.datasets import register_folders
from gn_det.engine.command import RunOptions
from gn_det.engine.folders import written_folder
from gn_det.engine.launch import check_processes
from gn_det.engine.run_data import RunData, check_config_data, set_data, wrapped_model
from gn_det.errors import InputError

__all__ = ["check_run", "check_start"]


class _Start(NamedTuple):
    """What a config says of the beginning of its run, YAML or LazyConfig."""

    device: str
    ims_per_batch: int
    amp: bool
    weights: str
    freeze_at: int
    from_timm: bool  # whether a backbone of timm brings weights of its own


def check_run(
    cfg: CfgNode | DictConfig, options: RunOptions, folder: Path, data: RunData | None = None
) -> RunData:
    """Check all that a run needs, and set and register its data sets; nothing is in its folder yet.

    In this order: settings that have to fit each other, GPUs and processes, weights, frozen layers,
    annotations and images. Weights that have an address are downloaded.

    Args:
        cfg: a config with the schedule of the run; its data sets are set.
        options: of the command line.
        folder: the run's.
        data: what another run on the same data sets began with; they are not checked again.

    Returns:
        What the run trains and evaluates on. ``write_copies()`` has to follow, which writes the
        normalised JSON files to ``datasets/`` in the folder.

    Raises:
        InputError: something that the run would fail on, or silently learn nothing from.
    """
    if not isinstance(cfg, DictConfig):
        check_complete_config(cfg)
    start = _start_of(cfg)
    check_processes(start.device, options, start.ims_per_batch, amp=start.amp)
    if not (options.resume and last_checkpoint(folder)):
        check_weights_exist(start.weights)
        if not options.eval_only and not start.from_timm:
            check_start(start.weights, start.freeze_at)
    if data is None:
        data = check_config_data(cfg, options)
        data.place_copies(written_folder(folder, options) / "datasets")
    set_data(cfg, data)
    if not isinstance(cfg, DictConfig) and options.skip_bad_images:
        cfg.DATALOADER.SKIP_BAD_IMAGES = True
    register_folders(data.folders)
    return data


def _start_of(cfg: CfgNode | DictConfig) -> _Start:
    if isinstance(cfg, DictConfig):
        model = wrapped_model(cfg.model)
        stages = ("backbone.freeze_at", "backbone.bottom_up.freeze_at")
        of_timm = ("backbone.weights", "backbone.bottom_up.weights")
        return _Start(
            cfg.train.device,
            cfg.dataloader.train.total_batch_size,
            cfg.train.amp.enabled,
            cfg.train.init_checkpoint,
            max(OmegaConf.select(model, s, default=0) for s in stages),
            any(OmegaConf.select(model, weights, default="") for weights in of_timm),
        )
    return _Start(
        cfg.MODEL.DEVICE,
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.AMP.ENABLED,
        cfg.MODEL.WEIGHTS,
        cfg.MODEL.BACKBONE.FREEZE_AT,
        bool(cfg.MODEL.TIMM.WEIGHTS),
    )


def check_start(weights: str, freeze_at: int) -> None:
    """Refuse a start from scratch with layers frozen at their random values.

    Detectron's GN R-50-FPN from scratch reached 39.5 box AP in 3x, and 36.2 with two stages frozen.

    Args:
        weights: file or URL to start from; empty for none.
        freeze_at: stages of the backbone that do not train, the stem being the first.

    Raises:
        InputError: there are no weights, and a stage is frozen.
    """
    if not weights and freeze_at > 0:
        raise InputError(
            f"without MODEL.WEIGHTS, MODEL.BACKBONE.FREEZE_AT {freeze_at} freezes random weights; "
            "set it to 0 to train from scratch, or name the weights to start from "
            "(for a LazyConfig, freeze_at of the ResNet and train.init_checkpoint)"
        )
