"""COCO-format data as people have it: reading, normalising and checking, and saying what was found.

A file is read (:mod:`.read`), and its pictures, categories and annotations are brought into the
form that pycocotools and Detectron2 read (:func:`normalise_images`, :func:`settle_sizes`,
:func:`normalise_objects`, :func:`scale_objects`). :class:`Findings` counts what was mended,
dropped, suspicious or refused on the way.
"""

from gn_det.data.coco.findings import Findings
from gn_det.data.coco.fingerprint import fingerprint
from gn_det.data.coco.images import normalise_images
from gn_det.data.coco.keypoints import flip_pairs, keypoint_names
from gn_det.data.coco.normalise import declared_categories, normalise_objects
from gn_det.data.coco.read import check_finite, read_coco
from gn_det.data.coco.scale import scale_objects
from gn_det.data.coco.sizes import settle_sizes

__all__ = [
    "Findings",
    "check_finite",
    "declared_categories",
    "fingerprint",
    "flip_pairs",
    "keypoint_names",
    "normalise_images",
    "normalise_objects",
    "read_coco",
    "scale_objects",
    "settle_sizes",
]
