"""Whether a run goes on: its checkpoint, and the config and the data that it began with."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig

from gn_det.checkpoint.checkpointer import last_checkpoint
from gn_det.config import load_config
from gn_det.config.differences import differences, format_differences
from gn_det.engine.command import RunOptions
from gn_det.engine.run_data import RunData
from gn_det.errors import InputError
from gn_det.files import read_json, write_json
from gn_det.text import reason_of, table

__all__ = ["begin_or_resume", "keep_data"]

# What of a run may change on the way: the solver (but for the images of a step), the evaluation,
# and how the same is computed.
_MAY_CHANGE = re.compile(
    r"SOLVER\.(?!IMS_PER_BATCH|IMS_PER_GPU|ACCUMULATE_STEPS|REFERENCE_WORLD_SIZE).*"
    r"|TEST\..*|.*_TEST|DATASETS\.TEST|DATALOADER\.(NUM_WORKERS|SKIP_BAD_IMAGES)"
    r"|MODEL\.DEVICE|MODEL\.CHANNELS_LAST|MODEL\.GN\.RECOMPUTE"
    r"|MODEL\.BACKBONE\.COMPILE|CUDNN_BENCHMARK|FLOAT32_PRECISION|VIS_PERIOD"
    r"|VERSION"
    r"|optimizer\.(?!_target_).*|lr_multiplier(\..*)?|dataloader\.(test|evaluator)\..*"
    r"|dataloader\.train\.num_workers"
    r"|train\.(?!output_dir|init_checkpoint|seed|ims_per_gpu|accumulate_steps).*"
)
# The seed and the data have checks of their own, which know what a difference means.
_CHECKED_APART = re.compile(r"SEED|train\.seed|train\.output_dir|DATASETS\.COCO_FOLDERS")


def begin_or_resume(
    cfg: CfgNode | DictConfig, folder: Path, data: RunData, options: RunOptions
) -> None:
    """Keep what a run begins with, or check that one which is resumed goes on with the same.

    What may change on the way (learning rate, schedule, weight decay, clipping, periods, the
    evaluation, workers, devices) takes effect from the next step on, and is printed. The data are
    kept in ``run.json`` as their counts and a digest of what is learnt from.

    Args:
        cfg: as it trains.
        folder: of the run.
        data: what it trains on.
        options: processes, and whether a run that is there goes on. An evaluation keeps nothing.

    Raises:
        InputError: the checkpoint is missing or damaged, or the model, the batches, the seed or the
            data are others; with each difference.
    """
    if options.eval_only or options.machine_rank:
        return
    began = {
        "processes": options.world_size,
        "data": {n: f for n, f in data.fingerprints.items() if n in data.train},
    }
    checkpoint = last_checkpoint(folder) if options.resume else None
    if checkpoint is None:
        write_json(folder / "run.json", began)
        return
    if not (folder / "last_checkpoint").exists():
        print(f"{folder / 'last_checkpoint'} is missing: the run goes on from {checkpoint.name}")
    _check_settings(cfg, folder / "config.yaml")
    _check_began(began, folder / "run.json")


def _lazy_settings(text: str) -> dict[str, Any]:
    """The dump of a LazyConfig as nested dicts and lists of text; its tags run nothing.

    Raises:
        InputError: it is no YAML, or no mapping.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError("no config keys")
    return _plain(root)


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value) for value in node.value]
    return node.value


def _check_settings(cfg: CfgNode | DictConfig, file: Path) -> None:
    if not file.exists():
        print(f"{file} is missing: whether the run began with another config cannot be told")
        return
    configs: dict[str, Mapping[str, Any]]
    if isinstance(cfg, DictConfig):
        try:
            there = _lazy_settings(file.read_text(encoding="utf-8"))
        except (InputError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is not the config of a run: {reason_of(error)}") from error
        configs = {"the run": there, "the config": _lazy_settings(_dump(cfg))}
    else:
        configs = {"the run": load_config(file), "the config": cfg}
    found = {
        key: values for key, values in differences(configs).items()
        if not _CHECKED_APART.fullmatch(key)
    }  # fmt: skip
    fixed = {key: values for key, values in found.items() if not _MAY_CHANGE.fullmatch(key)}
    if fixed:
        raise InputError(
            f"{file.parent} cannot be resumed with another model, other data or another batch: "
            f"{format_differences(fixed)}. Take the run's values, or another output folder"
        )
    if found:
        rows = [[key, *map(_cell, values.values())] for key, values in found.items()]
        headers = ["from the next step on", "was", "is"]
        print(f"\n{table(rows, headers, disable_numparse=True)}\n")


def _dump(cfg: DictConfig) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        LazyConfig.save(cfg, str(file))
        return file.read_text(encoding="utf-8")


def _cell(value: Any) -> str:
    return "not there" if value is None else str(value)


def _check_began(began: dict[str, Any], file: Path) -> None:
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        data, processes = dict(there["data"]), int(there["processes"])
    except FileNotFoundError:
        print(f"{file} is missing: whether the run began with other data cannot be told")
        return
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file} is damaged ({reason_of(error)}); remove it to resume without a check that the "
            "data are the same"
        ) from error
    _check_same_data(data, began["data"])
    if processes != began["processes"]:
        print(
            f"The run began with {processes} processes and goes on with {began['processes']}: "
            "its batches will be other ones than without the change"
        )


def keep_data(folder: Path, data: RunData) -> None:
    """Write what tells the data of a study from others, or check that they are the same.

    Args:
        folder: of the study, with it in ``data.json``.
        data: what its runs train and evaluate on.

    Raises:
        InputError: they are others, or the file is damaged.
    """
    file = folder / "data.json"
    if file.exists():
        _check_same_data(read_json(file, dict), data.fingerprints)
    else:
        write_json(file, data.fingerprints)


def _check_same_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, found in now.items():
        if then.get(name) != found:
            raise InputError(
                f"the set {name} is another than the run began with: {_describe(then.get(name))} "
                f"then, {_describe(found)} now. Take the data as they were, or another output "
                "folder"
            )


def _describe(fingerprint: dict[str, Any] | None) -> str:
    if not isinstance(fingerprint, dict):
        return "no such set"
    counts = (f"{fingerprint.get(key)} {key}" for key in ("images", "annotations", "categories"))
    return f"{', '.join(counts)} ({str(fingerprint.get('digest'))[:12]})"
