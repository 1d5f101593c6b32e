"""Why two batches of one image do not give the gradient of one batch of both, cause by cause."""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.evaluation.evaluator import inference_context
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from tqdm import tqdm

from gn_det.data.mapper import PictureMapper
from gn_det.data.train_loader import build_train_loader
from gn_det.engine.step import AccumulatingTrainer
from gn_det.errors import InputError

__all__ = ["accumulation_rows", "is_padded", "padding_rows", "training_pairs"]

# Two images with their instances, as Detectron2's mapper makes them.
Pair: TypeAlias = list[dict[str, Any]]

_CANDIDATES = 32  # batches among which pairs are looked for
_PARTS = {
    "backbone": "backbone.",
    "RPN": "proposal_generator.",
    "box head": "roi_heads.box",
    "mask head": "roi_heads.mask",
}


def training_pairs(
    cfg: CfgNode, size_divisibility: int, most: int = 7
) -> tuple[list[Pair], list[Pair]]:
    """Some of the batches of two images that a training begins with, and the same unpadded.

    Those of images of different sizes, which are padded, come first.

    Args:
        cfg: with a SEED that is not negative and registered DATASETS.TRAIN.
        size_divisibility: that of the backbone, to a multiple of which batches are padded, too.
        most: how many; small data sets may have fewer.

    Returns:
        The pairs as training has them; the same images, mirrored alike, resized to one square.

    Raises:
        InputError: no two images of the data set come into one batch.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0

    def batches(*resizing: T.Augmentation) -> list[Pair]:
        augmentations = PictureMapper.from_config(cfg, is_train=True)["augmentations"]
        mapper = PictureMapper(cfg, is_train=True, augmentations=[*augmentations, *resizing])
        return list(itertools.islice(build_train_loader(cfg, mapper=mapper), _CANDIDATES))

    pairs = batches()
    numbers = [n for n, (a, b) in enumerate(pairs) if a["file_name"] != b["file_name"]]
    if not numbers:
        raise InputError(
            f"{', '.join(cfg.DATASETS.TRAIN)} has no two images with objects that come into one "
            "batch; with DATALOADER.ASPECT_RATIO_GROUPING both are upright, or both are not"
        )
    numbers = sorted(numbers, key=lambda n: not is_padded(pairs[n]))[:most]
    pairs = [pairs[n] for n in numbers]
    side = max(min(image["image"].shape[-2:]) for image in itertools.chain(*pairs))
    divisor = max(size_divisibility, 1)
    side = -(-side // divisor) * divisor
    resized = batches(T.Resize((side, side)))
    return pairs, [resized[n] for n in numbers]


def is_padded(pair: Pair) -> bool:
    """Whether the images of a pair differ in size."""
    return pair[0]["image"].shape != pair[1]["image"].shape


def accumulation_rows(
    model: nn.Module, pairs: Sequence[Pair], resized: Sequence[Pair]
) -> list[dict[str, Any]]:
    """Relative differences of gradients while one cause after the other is taken away.

    They are ‖g_accumulated − g_batch‖ / ‖g_batch‖ in the median over the pairs: g_batch is that of
    a step of one batch of both images, g_accumulated that of a step of two batches of one.
    ``sampled anew`` is the same for two steps of the very same batch that sample other anchors and
    proposals.

    Args:
        model: an R-CNN of Detectron2's; it stays as it is.
        pairs: as training has them.
        resized: the same without padding.

    Returns:
        A row for each stage, and each keeps what those before it have changed: as it trains; with
        all anchors and proposals in the losses; with the resized images; with losses that are
        means over images; in float64.

    Raises:
        InputError: the model samples no proposals.
    """
    if not getattr(model, "proposal_generator", None) or not hasattr(model, "roi_heads"):
        raise InputError(f"{type(model).__name__} has no RPN with ROI heads that sample proposals")
    height, width = resized[0][0]["image"].shape[-2:]
    model = copy.deepcopy(model)
    rows = [_row("nothing, as it trains", model, pairs)]
    _keep_all(model, max(_number_of_anchors(model, pair) for pair in pairs))
    rows.append(_row("all anchors and proposals kept", model, pairs))
    rows.append(_row(f"and all images {height}×{width}, none padded", model, resized))
    _take_losses_by_image(model.roi_heads)
    rows.append(_row("and losses that are means over images", model, resized))
    _propose_in_float32(model.proposal_generator)
    rows.append(_row("and float64", model.double(), resized))
    return rows


def padding_rows(model: nn.Module, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """How what a model makes of an image changes with the images beside it in a batch.

    Args:
        model: an R-CNN of Detectron2's.
        pairs: from which the images are.

    Returns:
        A row for the images that are padded in their pair, which is one of another size, unless
        there are none; a row for every image beside itself, which pads nothing. ``padding`` is
        the padded share of the image's place in the batch, ``features`` is ‖f_batch − f_alone‖ /
        ‖f_alone‖ of all maps of the backbone, ``top left`` the same of the quarter of the maps
        that lies farthest from the padding, all three in the median over the images. ``scores``
        are differences of the detection scores of equal rank.
    """
    batches = {
        "another size": [
            batch
            for pair in pairs
            for batch in (pair, pair[::-1])
            if _padded_shape(model, batch) != _padded_shape(model, batch[:1])
        ],
        "itself": [[image, image] for image in itertools.chain(*pairs)],
    }
    with inference_context(model), torch.no_grad():
        return [
            {"beside": beside, **_summary([_changes(model, batch) for batch in of_kind])}
            for beside, of_kind in batches.items()
            if of_kind
        ]


def _keep_all(model: nn.Module, anchors: int) -> None:
    """Leave nothing to sample.

    That is what BATCH_SIZE_PER_IMAGE and POSITIVE_FRACTION of MODEL.RPN and MODEL.ROI_HEADS do,
    where they allow for as many as there are, and for all of these to be positive.
    """
    model.proposal_generator.batch_size_per_image = anchors  # its losses are divided by this
    model.roi_heads.batch_size_per_image = sys.maxsize
    model.proposal_generator.positive_fraction = model.roi_heads.positive_fraction = 1.0


@torch.no_grad()
def _number_of_anchors(model: nn.Module, batch: Sequence[dict[str, Any]]) -> int:
    rpn = model.proposal_generator
    features = model.backbone(model.preprocess_image(batch).tensor)
    return sum(map(len, rpn.anchor_generator([features[name] for name in rpn.in_features])))


def _take_losses_by_image(roi_heads: nn.Module) -> None:
    """Make the losses of ROI heads means over the images of a batch, as those of RPN are."""
    forward = roi_heads.forward

    def mean_over_images(
        images: Any, features: dict[str, Tensor], proposals: list, targets: list
    ) -> tuple[list, dict[str, Tensor]]:
        losses = [
            forward(
                images,
                {name: feature[i : i + 1] for name, feature in features.items()},
                proposals[i : i + 1],
                targets[i : i + 1],
            )[1]
            for i in range(len(proposals))
        ]
        return [], {name: sum(one[name] for one in losses) / len(losses) for name in losses[0]}

    roi_heads.forward = mean_over_images


def _propose_in_float32(rpn: nn.Module) -> None:
    """Let a float64 RPN choose its proposals, which have no gradient, with Detectron2's NMS."""
    predict_proposals = rpn.predict_proposals

    def in_float32(anchors: list, logits: list, deltas: list, sizes: list) -> list:
        return predict_proposals(
            anchors, [x.float() for x in logits], [x.float() for x in deltas], sizes
        )

    rpn.predict_proposals = in_float32


def _row(changed: str, model: nn.Module, pairs: Sequence[Pair]) -> dict[str, Any]:
    columns: dict[str, list[float]] = defaultdict(list)
    for number, pair in enumerate(tqdm(pairs, desc=changed, unit="pair", delay=2)):
        batch = _gradients(model, [pair], 3 * number)
        accumulated = _gradients(model, [[image] for image in pair], 3 * number + 1)
        again = _gradients(model, [pair], 3 * number + 2)
        columns["accumulated"].append(_relative_difference(accumulated, batch))
        columns["sampled anew"].append(_relative_difference(again, batch))
        for part, prefix in _PARTS.items():
            if any(name.startswith(prefix) for name in batch):
                columns[part].append(_relative_difference(accumulated, batch, prefix))
    medians = {name: statistics.median(values) for name, values in columns.items()}
    return {"changed": changed, **medians}


def _gradients(
    model: nn.Module, batches: list[list[dict[str, Any]]], seed: int
) -> dict[str, Tensor]:
    """Gradients of a training step of some batches, by parameter; the weights stay."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = AccumulatingTrainer(model, batches, optimizer, len(batches), seed=seed)
    trainer.iter = 0
    with EventStorage():
        trainer.run_step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _relative_difference(
    ours: dict[str, Tensor], reference: dict[str, Tensor], prefix: str = ""
) -> float:
    """‖ours − reference‖ / ‖reference‖ of the tensors whose names begin with prefix."""
    names = [name for name in reference if name.startswith(prefix)]
    a, b = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (ours, reference))
    return ((a - b).norm() / b.norm()).item()


def _summary(changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    medians = {
        name: statistics.median(change[name] for change in changes)
        for name in ("padding", "features", "top left")
    }
    scores = torch.cat([change["scores"] for change in changes])
    return {
        "images": len(changes),
        **medians,
        "scores, median": scores.median().item() if len(scores) else None,
        "scores, largest": scores.max().item() if len(scores) else None,
    }


def _padded_shape(model: nn.Module, batch: Pair) -> torch.Size:
    return model.preprocess_image(batch).tensor.shape[-2:]


def _changes(model: nn.Module, batch: Pair) -> dict[str, Any]:
    """What changes for the first image of a batch; see padding_rows."""
    alone, scores_alone = _features_and_scores(model, batch[:1])
    beside, scores_beside = _features_and_scores(model, batch)
    beside = {
        name: feature[:, :, : alone[name].shape[-2], : alone[name].shape[-1]]
        for name, feature in beside.items()
    }
    ranks = min(len(scores_alone), len(scores_beside))
    height, width = batch[0]["image"].shape[-2:]
    return {
        "padding": 1 - height * width / _padded_shape(model, batch).numel(),
        "features": _relative_difference(beside, alone),
        "top left": _relative_difference(_top_left(beside), _top_left(alone)),
        "scores": (scores_beside[:ranks] - scores_alone[:ranks]).abs(),
    }


def _features_and_scores(
    model: nn.Module, batch: Sequence[dict[str, Any]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Maps of the backbone and detection scores, both of the first image of a batch."""
    features = model.backbone(model.preprocess_image(batch).tensor)
    detections = model.inference(batch, do_postprocess=False)[0]
    return {name: feature[:1] for name, feature in features.items()}, detections.scores


def _top_left(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: feature[..., : -(-feature.shape[-2] // 2), : -(-feature.shape[-1] // 2)]
        for name, feature in features.items()
    }
