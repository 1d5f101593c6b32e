"""Running a Detectron2 detector on given boxes, so that two models look at the same regions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from detectron2.structures import Boxes, Instances

__all__ = ["DetectorBatch", "run_on_boxes"]


class DetectorBatch(NamedTuple):
    """Images, and the boxes that RoI heads look at, whatever the model finds.

    A batch for :func:`gn_det.convert_bn` with :func:`gn_det.run_on_boxes`.

    Attributes:
        inputs: Detectron2's, one for each image.
        proposals: for box heads; None for models without RoI heads.
        objects: the true boxes and classes, for mask and keypoint heads.

    Example::

        inputs = [{"image": torch.zeros(3, 64, 96, dtype=torch.uint8)}]
        batch = gn_det.DetectorBatch.of(model.eval(), inputs)
    """

    inputs: list[dict[str, Any]]
    proposals: list[Instances] | None
    objects: list[tuple[Boxes, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, inputs: list[dict[str, Any]]) -> DetectorBatch:
        """The batch of some images, with the boxes that a model proposes.

        Args:
            model: with BN, in eval mode; box heads are going to look at its proposals.
            inputs: Detectron2's; those with "instances" have true boxes and classes.
        """
        from detectron2.structures import Boxes

        nothing = (Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64))
        objects = [
            (x["instances"].gt_boxes, x["instances"].gt_classes) if "instances" in x else nothing
            for x in inputs
        ]
        if not hasattr(model, "roi_heads"):
            return cls(inputs, None, objects)
        if model.proposal_generator is None:
            return cls(inputs, [x["proposals"].to(model.device) for x in inputs], objects)
        images = model.preprocess_image(inputs)
        proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
        return cls(inputs, proposals, objects)


def run_on_boxes(model: nn.Module, batch: DetectorBatch) -> None:
    """Run every part of a Detectron2 detector in eval mode, its RoI heads on the boxes of a batch.

    It is the ``call`` with which :func:`gn_det.convert_bn` converts a detector whose RoI heads have
    BN: both models look at the same boxes. Later stages of a cascade go on from the boxes of the
    stage before, one for each proposal.

    Args:
        model: a Detectron2 meta-architecture with or without RoI heads.
        batch: see :class:`gn_det.DetectorBatch`.

    Example::

        inputs = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}]
        batches = [gn_det.DetectorBatch.of(model.eval(), inputs)]
        print(gn_det.convert_bn(model, batches, gn_det.run_on_boxes))
    """
    detector: Any = model
    if batch.proposals is None:
        detector(batch.inputs)
        return
    from detectron2.structures import Instances

    images = detector.preprocess_image(batch.inputs)
    features = detector.backbone(images.tensor)
    if detector.proposal_generator is not None:
        detector.proposal_generator(images, features)
    if hasattr(detector, "sem_seg_head"):
        detector.sem_seg_head(features)
    with _box_head_alone(detector.roi_heads):
        detector.roi_heads(images, features, batch.proposals)
    objects = [
        Instances(size, pred_boxes=boxes, pred_classes=classes).to(detector.device)
        for size, (boxes, classes) in zip(images.image_sizes, batch.objects, strict=True)
    ]
    detector.roi_heads.forward_with_given_boxes(features, objects)


@contextmanager
def _box_head_alone(roi_heads: nn.Module) -> Iterator[None]:
    """Without the heads that go on from the boxes that the model found."""
    heads = [name for name in ("mask_on", "keypoint_on") if getattr(roi_heads, name, False)]
    try:
        for name in heads:
            setattr(roi_heads, name, False)
        yield
    finally:
        for name in heads:
            setattr(roi_heads, name, True)
