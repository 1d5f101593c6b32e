"""Detectron2's DatasetMapper over the one reader of pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from gn_det.data.pictures import read_picture
from gn_det.data.resize import for_thin_pictures

__all__ = ["PictureMapper"]


class PictureMapper(DatasetMapper):
    """From a dict of Detectron2's catalog to what its models take.

    Args:
        value_range: see :func:`gn_det.data.pictures.read_picture`; INPUT.VALUE_RANGE.
        kwargs: of DatasetMapper.

    Raises:
        PictureError: from a call, where the picture cannot be read.
    """

    @configurable
    def __init__(self, *, value_range: Sequence[float] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.augmentations = T.AugmentationList(for_thin_pictures(self.augmentations.augs))
        self.value_range = tuple(value_range)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        given = super().from_config(cfg, is_train)
        return {**given, "value_range": cfg.INPUT.VALUE_RANGE}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        sample = copy.deepcopy(dataset_dict)
        size = (sample["width"], sample["height"]) if "width" in sample else None
        image = read_picture(sample["file_name"], self.image_format, self.value_range, size)
        utils.check_image_size(sample, image)
        segmentation = None
        if "sem_seg_file_name" in sample:
            segmentation = utils.read_image(sample.pop("sem_seg_file_name"), "L").squeeze(2)
        augmented = T.AugInput(image, sem_seg=segmentation)
        transforms = self.augmentations(augmented)
        height_and_width = augmented.image.shape[:2]
        # Tensors travel between processes in shared memory, arrays by copy.
        sample["image"] = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if augmented.sem_seg is not None:
            sample["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(
                sample, height_and_width, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            sample.pop("annotations", None)
            return sample
        if "annotations" in sample:
            self._transform_annotations(sample, transforms, height_and_width)
        return sample
