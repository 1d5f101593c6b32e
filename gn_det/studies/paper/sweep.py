"""Training several classifiers, and going on with what was interrupted."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from tqdm import tqdm

from gn_det.classification.command import CPU
from gn_det.classification.datasets import data_settings, load_images
from gn_det.classification.training import ClassifierRecipe, finished_results, train_classifier
from gn_det.engine.command import at_least
from gn_det.engine.faults import fault_of
from gn_det.engine.folders import clear_half_written, study_folder
from gn_det.engine.launch import check_device
from gn_det.engine.termination import (
    catch_ending,
    end,
    end_with_parent,
    release_ending,
    starting_processes,
)
from gn_det.errors import InputError
from gn_det.files import make_folder
from gn_det.studies.paper.report import ClassifierResult

__all__ = ["add_sweep_arguments", "run_sweep"]


def _no_hooks(folder: Path) -> tuple[HookBase, ...]:
    """None besides the usual; a function with a name, since it goes to other processes."""
    return ()


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --output, --seeds and --jobs."""
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and report")
    parser.add_argument("--seeds", nargs="+", **at_least(0), default=[0, 1, 2])
    parser.add_argument(
        "--jobs", **at_least(1), default=1, help="runs at a time, which share PyTorch's threads"
    )


def run_sweep(
    recipes: Mapping[str, ClassifierRecipe],
    output: Path,
    *,
    device: str = "cpu",
    jobs: int = 1,
    num_workers: int = 0,
    hooks_of: Callable[[Path], Sequence[HookBase]] = _no_hooks,
) -> list[ClassifierResult]:
    """Train classifiers, each in a folder of ``output/runs``; finished ones are not trained again.

    Args:
        recipes: by the name of their run.
        output: folder of the runs, which one sweep at a time may use.
        device: "cpu" or "cuda".
        jobs: runs at a time, which share the threads that PyTorch has.
        num_workers: loading processes of each run.
        hooks_of: by the folder of a run, what hooks it has besides the usual.

    Returns:
        What each reached, or why it did not finish, as where its loss was not finite.

    Raises:
        InputError: bad data or recipes, another sweep is at work in the folder, or a process was
            killed.
    """
    check_device(device, CPU)
    first = next(iter(recipes.values()))
    print(json.dumps(asdict(first), indent=2))
    for recipe in recipes.values():
        recipe.check(device)
    train, val = load_images(first.data, first.size, first.max_objects)
    for name, recipe in recipes.items():
        if recipe.ims_per_gpu > len(train):
            raise InputError(
                f"{name}: {len(train)} images do not make a step of {recipe.ims_per_gpu}"
            )
    sizes = dict.fromkeys(recipe.ims_per_gpu for recipe in recipes.values())
    left_out = [f"{len(train) % n} at {n} per step" for n in sizes if len(train) % n]
    if left_out:
        print(f"Of {len(train)} images, an epoch leaves out {', '.join(left_out)}.")
    data = data_settings(train, val)
    outcomes: dict[str, dict[str, Any] | str] = {}
    threads = max(1, torch.get_num_threads() // jobs)
    with study_folder(output), tqdm(total=len(recipes), desc="classifiers", unit="run") as progress:
        waiting = []
        for name, recipe in recipes.items():
            finished = finished_results(
                recipe,
                output / "runs" / name,
                ims_per_step=recipe.ims_per_gpu,
                **data,
            )
            if finished:
                outcomes[name] = finished
                progress.update()
            else:
                waiting.append((name, recipe))
        # Fresh processes, as one that has used a GPU or many threads cannot be forked.
        with ProcessPoolExecutor(
            jobs, get_context("spawn"), end_with_parent, (os.getpid(), signal.SIGTERM)
        ) as pool:
            before = catch_ending(end)
            try:
                with starting_processes():
                    futures = {
                        pool.submit(
                            _train,
                            recipe,
                            output / "runs" / name,
                            device,
                            threads,
                            num_workers,
                            hooks_of,
                        ): name
                        for name, recipe in waiting
                    }
                for future in as_completed(futures):
                    name = futures[future]
                    outcomes[name] = future.result()
                    if isinstance(outcomes[name], str):
                        progress.write(f"{name} failed: {outcomes[name]}")
                    progress.update()
            except BrokenProcessPool as error:
                raise InputError(
                    "a process was killed, often for want of memory; with fewer --jobs this goes "
                    "on where it was interrupted"
                ) from error
            except BaseException:  # Ctrl-C: each saves a checkpoint
                pool.shutdown(wait=False, cancel_futures=True)
                for process in active_children():
                    process.terminate()
                raise
            finally:
                release_ending(before)
    return [_trained(recipe, outcomes[name]) for name, recipe in recipes.items()]


def _train(
    recipe: ClassifierRecipe,
    folder: Path,
    device: str,
    threads: int,
    num_workers: int,
    hooks_of: Callable[[Path], Sequence[HookBase]],
) -> dict[str, Any] | str:
    torch.set_num_threads(threads)
    logging.getLogger("detectron2").addHandler(logging.NullHandler())  # the outcome says it
    make_folder(folder)
    clear_half_written(folder)
    try:
        return train_classifier(
            recipe,
            folder,
            device,
            resume=True,
            num_workers=num_workers,
            quiet=True,
            more_hooks=hooks_of(folder),
        )
    except (InputError, OSError, RuntimeError) as error:
        fault = fault_of(error)
        if fault is None:
            raise
        return str(fault)
    except SystemExit as ended:  # by SIGTERM; the pool would keep the process for more
        os._exit(ended.code)


def _trained(recipe: ClassifierRecipe, outcome: dict[str, Any] | str) -> ClassifierResult:
    run = (
        recipe.norm,
        recipe.num_groups,
        recipe.channels_per_group,
        recipe.ims_per_gpu,
        recipe.seed,
    )
    if isinstance(outcome, str):
        return ClassifierResult(*run, failure=outcome)
    curves = {
        f"error/{split}": dict(enumerate(outcome[f"{split}_errors"], start=1))
        for split in ("train", "val")
    }
    return ClassifierResult(*run, outcome["val_error"], outcome["train_error"], curves=curves)
