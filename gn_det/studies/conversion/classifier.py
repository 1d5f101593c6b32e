"""Converting a classifier of tools/train_classifier.py, and its backbone for detectors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gn_det.classification.datasets import load_images
from gn_det.classification.networks import Classifier
from gn_det.classification.training import (
    error_rate,
    read_classifier,
    train_classifier,
    write_backbone_of,
)
from gn_det.data.seeding import seed_generators
from gn_det.errors import InputError
from gn_det.files import make_folder
from gn_det.studies.conversion.report import write_report
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

__all__ = ["METRIC", "convert_classifier"]

METRIC = "validation error (%)"


def convert_classifier(
    source: Path,
    folder: Path,
    calibration_images: int,
    distill: int = 0,
    fine_tune: int = 0,
    *,
    lr: float,
    device: str,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
) -> Conversion:
    """Convert the BN layers of a trained classifier to GN.

    The folder gets ``model_gn.pth``, ``backbone.pth`` and ``backbone.yaml`` for detectors, the
    report, and the run of fine-tuning.

    Args:
        source: folder of the classifier with BN.
        folder: to write to.
        calibration_images: how many training images γ, β are fitted on.
        distill: steps of 32 images in which the network learns the features of that with BN; 0
            for none.
        fine_tune: epochs; 0 for none.
        lr: of fine-tuning, at 32 images a process.
        device: "cpu" or "cuda".
        num_groups, channels_per_group: see :func:`gn_det.inject`.

    Raises:
        InputError: there is no finished classifier with BN, or too few training images.
    """
    recipe, classifier = read_classifier(source)
    groups = {"num_groups": num_groups, "channels_per_group": channels_per_group}
    gn_recipe = replace(recipe, norm="GN", **groups, epochs=fine_tune, lr=lr, schedule="cosine")
    images, held_out = load_images(recipe.data, recipe.size, recipe.max_objects)
    batches = _calibration_batches(images, calibration_images, recipe.seed)

    def report(conversion: Conversion) -> None:
        how = (
            f"γ, β were fitted on {calibration_images} training images of "
            f"{markdown(recipe.data)} (seed {recipe.seed}) to the BN layers of {markdown(source)}. "
            "The error is that of the held-out images. [backbone.yaml](backbone.yaml) is for "
            "detectors that start from these weights."
        )
        if conversion.losses:
            how += (
                f" Then the network learnt the features of that with BN, in {distill} steps of 32 "
                "training images; convolutions learnt as well."
            )
        if fine_tune:
            how += (
                f" Fine-tuning takes {fine_tune} epochs at a learning rate of {lr:g}; "
                f"[{FINE_TUNED}/backbone.yaml]({FINE_TUNED}/backbone.yaml) is for detectors that "
                "start from its result."
            )
        settings = {
            "classifier": str(source),
            "recipe": asdict(recipe),
            "calibration_images": calibration_images,
            "distill": distill,
            "fine_tune": fine_tune,
            "lr": lr,
        }
        title = f"{recipe.network} on {recipe.data}"
        write_report(folder, title, how, conversion, METRIC, settings)

    def keep(model: Classifier, conversion: Conversion) -> None:
        write_weights(model, folder)
        for file in (folder / "backbone.pth", folder / "backbone.yaml"):
            file.unlink(missing_ok=True)  # of the calibrated model, before it was distilled
        write_backbone_of(folder / "backbone.pth", gn_recipe, model)
        report(conversion)

    def fine_tuned(model: Classifier) -> None:
        run = folder / FINE_TUNED
        make_folder(run)
        train_classifier(gn_recipe, run, device, weights=str(folder / WEIGHTS), resume=True)
        model.load_state_dict(read_classifier(run)[1].state_dict())

    conversion = convert_in_stages(
        classifier.to(device),
        batches,
        Classifier.scores,
        evaluate=lambda model: error_rate(model, held_out),
        keep=keep,
        to_distill=_to_distill(images, held_out, recipe.seed, distill, folder / CHECKPOINT),
        fine_tune=fine_tuned if fine_tune else None,
        **groups,
    )
    report(conversion)
    return conversion


def _to_distill(
    images: Dataset, held_out: Dataset, seed: int, steps: int, checkpoint: Path
) -> ToDistill | None:
    """Training images for all stages and the scores, and up to 64 held-out ones for the error."""
    if not steps:
        return None
    chosen = range(min(64, len(held_out)))
    others = [*torch.stack([held_out[index]["image"] for index in chosen]).split(32)]
    return ToDistill(_TrainingImages(images, seed, steps), others, _features, steps, checkpoint)


class _TrainingImages(Sequence):
    """Batches of 32 training images, augmented as in training, each by the seed and its number."""

    def __init__(self, images: Dataset, seed: int, number: int) -> None:
        self.images, self.seed, self.number = images, seed, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, number: int) -> Tensor:
        seed_generators(self.seed, number)
        chosen = torch.randperm(len(self.images))[:32].tolist()
        return torch.stack([self.images[index]["image"] for index in chosen])


def _features(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """The stages of a ResNet, and the scores of any network."""
    found: dict[str, Tensor] = {}
    stages = {name: part for name, part in model.backbone.named_children() if "res" in name}
    with ExitStack() as hooks:
        for name, part in stages.items():
            hooks.enter_context(
                part.register_forward_hook(lambda _, args, y, name=name: found.update({name: y}))
            )
        scores = model.scores(images)
    return {**found, "linear": scores}


def _calibration_batches(images: Dataset, number: int, seed: int) -> list[Tensor]:
    """Training images, augmented as in training, 32 at a time; they depend on the seed alone."""
    if not 1 <= number <= len(images):
        raise InputError(f"--calibration-images {number}: from 1 to {len(images)}")
    seed_generators(seed)
    chosen = torch.randperm(len(images))[:number].tolist()
    return [*torch.stack([images[index]["image"] for index in chosen]).split(32)]
