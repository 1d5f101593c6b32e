"""What tells one COCO data set from another: counts, and a digest of what is learnt from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

__all__ = ["fingerprint"]

_LEARNT_FROM = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": (
        "id", "image_id", "category_id", "bbox", "iscrowd", "segmentation", "keypoints",
    ),
    "categories": ("id", "name"),
}  # fmt: skip


def fingerprint(dataset: dict[str, Any]) -> dict[str, Any]:
    """Count and digest a data set, whatever the order of its entries.

    Args:
        dataset: a parsed JSON in COCO format.

    Returns:
        The numbers of images, annotations and categories, and ``digest``, a SHA-256 of their ids,
        names, sizes, boxes, masks and keypoints.
    """
    whole = hashlib.sha256()
    for section, keys in _LEARNT_FROM.items():
        whole.update(section.encode())
        entries = ([entry.get(key) for key in keys] for entry in dataset.get(section, []))
        # Sorted as digests, since the texts would take the memory of the data set again.
        whole.update(
            b"".join(sorted(hashlib.sha256(json.dumps(e).encode()).digest() for e in entries))
        )
    counts = {section: len(dataset.get(section, [])) for section in _LEARNT_FROM}
    return {**counts, "digest": whole.hexdigest()}
