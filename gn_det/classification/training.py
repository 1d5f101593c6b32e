"""Training classifiers of any norm, as the Group Normalization paper trains its own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.solver import WarmupParamScheduler
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch.utils.data import DataLoader, Dataset

from gn_det.amp import amp_dtype
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.backbone_file import write_backbone
from gn_det.classification.crops import ObjectCrops
from gn_det.classification.datasets import data_settings, load_images
from gn_det.classification.epoch_errors import EpochErrors
from gn_det.classification.networks import (
    PIXEL_MEAN,
    PIXEL_STD,
    Classifier,
    build_classifier,
    check_network,
    stacked,
)
from gn_det.config.differences import check_same
from gn_det.data.train_loader import TrainLoader, set_up_worker
from gn_det.engine.loop import fit
from gn_det.engine.step import AccumulatingTrainer
from gn_det.engine.termination import TerminationHook
from gn_det.engine.trainer import wrap_ddp
from gn_det.engine.writers import build_writers
from gn_det.errors import InputError
from gn_det.files import read_json, write_atomically, write_json

__all__ = [
    "SCHEDULES",
    "ClassifierRecipe",
    "error_rate",
    "finished_results",
    "read_classifier",
    "train_classifier",
    "write_backbone_of",
]

SCHEDULES: dict[str, ParamScheduler] = {
    "steps": MultiStepParamScheduler([1, 0.1, 0.01, 0.001], 100, [30, 60, 90]),
    "cosine": WarmupParamScheduler(
        CosineParamScheduler(1, 0), warmup_factor=0.01, warmup_length=0.1
    ),
}
_RECIPE = "recipe.json"
_RESULTS = "results.json"
_LAST_EPOCHS = 5


@dataclass(frozen=True)
class ClassifierRecipe:
    """What a classifier's training depends on; the defaults are Wu & He 2018, section 4.1.

    SGD with momentum 0.9, and a weight decay of 1e-4 on all parameters, γ and β as well.

    Attributes:
        data, size, max_objects: for :func:`gn_det.classification.datasets.load_images`.
        network, norm, num_groups, channels_per_group: for
            :func:`gn_det.classification.networks.build_classifier`.
        epochs: passes over the training images.
        ims_per_gpu: images a process has in a step.
        lr: at 32 of them, in proportion for others.
        schedule: of the learning rate: "steps" divides it by 10 after 30%, 60% and 90% of the
            epochs; "cosine" warms up in a tenth of them and ends at 0.
        amp: whether in mixed precision.
        seed: non-negative.
    """

    data: str
    network: str = "resnet50"
    norm: str = "GN"
    num_groups: int | None = None
    channels_per_group: int | None = None
    size: int | None = None
    max_objects: int | None = None
    epochs: int = 100
    ims_per_gpu: int = 32
    lr: float = 0.1
    schedule: str = "steps"
    amp: bool = False
    seed: int = 0

    def check(self, device: str) -> None:
        """Refuse what cannot be trained on a device.

        Raises:
            InputError: numbers out of their range, a network or norm that there is not, mixed
                precision on the CPU.
        """
        fits = self.epochs >= 1 and self.ims_per_gpu >= 1 and 0 <= self.seed < 2**31
        if not fits or not 0 < self.lr < math.inf:
            raise InputError(
                f"epochs {self.epochs}, ims_per_gpu {self.ims_per_gpu}, lr {self.lr} and seed "
                f"{self.seed}: the first two are at least 1, lr is finite and above 0, and the "
                f"seed from 0 to {2**31 - 1}"
            )
        if self.amp and torch.device(device).type == "cpu":
            raise InputError("mixed precision needs a GPU; leave --amp out")
        check_network(self.network, self.norm, self.num_groups, self.channels_per_group)

    def build(self, num_classes: int) -> Classifier:
        """The classifier, at its random start."""
        return build_classifier(
            self.network, self.norm, num_classes, self.num_groups, self.channels_per_group
        )


def train_classifier(
    recipe: ClassifierRecipe,
    output_dir: Path,
    device: str = "cpu",
    *,
    weights: str = "",
    resume: bool = False,
    num_workers: int = 0,
    quiet: bool = False,
    more_hooks: Sequence[HookBase] = (),
) -> dict[str, Any]:
    """Train a classifier in this process, one of several perhaps, and write what comes of it.

    output_dir gets ``recipe.json``, checkpoints, ``metrics.json`` with ``error/train`` and
    ``error/val`` in percent after each epoch, ``backbone.pth`` and ``backbone.yaml`` for detectors,
    and ``results.json``.

    Args:
        recipe: what to train.
        output_dir: a folder that exists.
        device: "cpu" or "cuda".
        weights: a classifier's to start from; by default from scratch.
        resume: whether to go on from the last checkpoint, where there is one.
        num_workers: loading processes.
        quiet: whether to write nothing but metrics.json of the metrics.
        more_hooks: besides Detectron2's usual.

    Returns:
        What ``results.json`` has, on the main process: ``val_error``, the median of the last five
        epochs (as in the paper), ``train_error`` of the last, in percent, and both by epoch. Those
        of a finished run, where one is resumed.

    Raises:
        InputError: bad data, too few images for a step, a loss that is not finite, or a folder
            with another recipe, other images or another number of processes.
    """
    recipe.check(device)
    train, val = load_images(recipe.data, recipe.size, recipe.max_objects)
    ims_per_step = recipe.ims_per_gpu * comm.get_world_size()
    steps = len(train) // ims_per_step
    if steps == 0:
        raise InputError(f"{len(train)} images do not make a step of {ims_per_step}")
    circumstances = {"ims_per_step": ims_per_step, **data_settings(train, val)}
    finished = finished_results(recipe, output_dir, **circumstances)
    if resume and finished:
        return finished
    if comm.is_main_process():
        _write_found(output_dir, {"train": train, "val": val})
    torch.manual_seed(recipe.seed)
    classifier = recipe.build(len(train.classes)).to(device)
    trainer = _trainer(recipe, classifier, train, device, num_workers)
    checkpointer = Checkpointer(trainer.model, str(output_dir), trainer=trainer)
    termination = TerminationHook(checkpointer)

    def evaluate() -> float:
        if comm.get_world_size() > 1:  # BN's averages are each process's own since the last step
            for buffer in classifier.buffers():
                dist.broadcast(buffer, 0)
        return termination.evaluating(lambda: error_rate(classifier, val, num_workers=num_workers))

    errors = EpochErrors(steps, evaluate)
    max_iter = steps * recipe.epochs
    writers: list[EventWriter] = []
    if comm.is_main_process():
        settings = {**asdict(recipe), **circumstances}
        write_json(output_dir / _RECIPE, settings)
        if quiet:
            writers = [JSONWriter(str(output_dir / "metrics.json"))]
        else:
            writers = build_writers(str(output_dir), max_iter)
    fit(
        trainer,
        checkpointer,
        SCHEDULES[recipe.schedule],
        max_iter,
        weights=weights,
        resume=resume,
        checkpoint_period=steps,
        max_to_keep=1,
        writers=writers,
        log_period=min(20, steps),  # of what an epoch has measured, each writing takes the last
        more_hooks=[errors, *more_hooks],
        termination=termination,
    )
    if not comm.is_main_process():
        return {}
    return _write_outcome(recipe, output_dir, classifier, errors)


def _write_found(output_dir: Path, splits: Mapping[str, Dataset]) -> None:
    """What was found in the data, where there was something."""
    for split, images in splits.items():
        if isinstance(images, ObjectCrops) and images.found:
            file = output_dir / "datasets" / f"{split}.txt"
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, images.found + "\n")


def _trainer(
    recipe: ClassifierRecipe, classifier: Classifier, train: Dataset, device: str, num_workers: int
) -> AccumulatingTrainer:
    optimizer = torch.optim.SGD(
        classifier.parameters(),
        lr=recipe.lr * recipe.ims_per_gpu / 32,
        momentum=0.9,
        weight_decay=1e-4,
    )
    loader = TrainLoader(
        train,
        _as_it_is,
        TrainingSampler(len(train), seed=recipe.seed),
        [0] * len(train),
        recipe.ims_per_gpu,
        recipe.seed,
        num_workers,
        collate_fn=list,
    )
    model = wrap_ddp(classifier, device)
    return AccumulatingTrainer(model, loader, optimizer, 1, amp_dtype(recipe.amp), recipe.seed)


@torch.no_grad()
def error_rate(
    classifier: Classifier, images: Dataset, batch_size: int = 100, num_workers: int = 0
) -> float:
    """Top-1 error in percent, over all processes.

    Args:
        classifier: evaluated in eval mode, and left in the mode that it was in.
        images: as :mod:`gn_det.classification.datasets` has them.
        batch_size: of the evaluation.
        num_workers: loading processes.
    """
    wrong = total = 0
    loader = DataLoader(
        images,
        batch_size,
        sampler=InferenceSampler(len(images)),
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=set_up_worker,
    )
    with inference_context(classifier):
        for samples in loader:
            batch, labels = stacked(samples)
            wrong += (classifier.scores(batch).argmax(1).cpu() != labels).sum().item()
            total += len(labels)
    counts = comm.all_gather((wrong, total))
    return 100 * sum(w for w, _ in counts) / sum(t for _, t in counts)


def finished_results(
    recipe: ClassifierRecipe, folder: Path, **circumstances: Any
) -> dict[str, Any] | None:
    """``results.json`` of the run in a folder, which has to have this recipe; None before its end.

    Args:
        recipe: what is asked for.
        folder: of the run.
        circumstances: what else has to be as it was, by its name in ``recipe.json``.

    Raises:
        InputError: there is a run that began with others, naming the settings that differ.
    """
    file, results = folder / _RECIPE, folder / _RESULTS
    if not file.exists():
        return None
    there = read_json(file, dict)
    # Runs that are older than a circumstance do not have it.
    known = {key: value for key, value in circumstances.items() if key in there}
    check_same(folder, there, {**asdict(recipe), **known})
    return read_json(results, dict) if results.exists() else None


def read_classifier(folder: Path) -> tuple[ClassifierRecipe, Classifier]:
    """A trained classifier and its recipe, from the folder of :func:`train_classifier`.

    Raises:
        InputError: there is no finished classifier.
    """
    try:
        settings = read_json(folder / _RECIPE, dict)
        results = read_json(folder / _RESULTS, dict)
        settings.setdefault("max_objects", None)  # of classifiers that are older than it
        recipe = ClassifierRecipe(**{f.name: settings[f.name] for f in fields(ClassifierRecipe)})
    except (OSError, KeyError) as error:
        raise InputError(
            f"{folder} has no finished classifier of tools/train_classifier.py"
        ) from error
    classifier = recipe.build(results["num_classes"])
    Checkpointer(classifier).load(str(folder / "model_final.pth"))
    return recipe, classifier


def _as_it_is(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def write_backbone_of(file: Path, recipe: ClassifierRecipe, classifier: Classifier) -> None:
    """Write a classifier's backbone and the config fragment that a detector shares with it."""
    weights = {
        key: value
        for key, value in classifier.backbone.state_dict().items()
        if not key.startswith("linear.")
    }
    write_backbone(file, weights, _detector_config(recipe))


def _write_outcome(
    recipe: ClassifierRecipe, output_dir: Path, classifier: Classifier, errors: EpochErrors
) -> dict[str, Any]:
    results = {
        "val_error": statistics.median(errors.val[-_LAST_EPOCHS:]),
        "train_error": errors.train[-1],
        "val_errors": errors.val,
        "train_errors": errors.train,
        "num_classes": classifier.backbone.linear.out_features,
    }
    backbone = output_dir / "backbone.pth"
    backbone.unlink(missing_ok=True)  # of this run, killed before its results were written
    backbone.with_suffix(".yaml").unlink(missing_ok=True)
    write_backbone_of(backbone, recipe, classifier)
    write_json(output_dir / _RESULTS, results)
    return results


def _detector_config(recipe: ClassifierRecipe) -> dict[str, Any]:
    """What a detector has to share with the classifier."""
    config: dict[str, Any] = {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": list(PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(PIXEL_STD),
    }
    if recipe.network in ("resnet18", "resnet34", "resnet50", "resnet101"):
        depth = int(recipe.network.removeprefix("resnet"))
        config |= {
            "MODEL.RESNETS.DEPTH": depth,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
        }
    # With other groups, the weights fit and compute something else.
    num_groups = {"LN": 1, "GN": recipe.num_groups}.get(recipe.norm)
    channels_per_group = {"IN": 1, "GN": recipe.channels_per_group}.get(recipe.norm)
    if num_groups is not None:
        config["MODEL.GN.NUM_GROUPS"] = num_groups
    if channels_per_group is not None:
        config["MODEL.GN.CHANNELS_PER_GROUP"] = channels_per_group
    return config
