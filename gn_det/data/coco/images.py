"""The pictures of a COCO-format data set: ids, file names, sizes where the JSON has none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gn_det.data.coco.file_names import can_be_named, find_files, leaves_folder
from gn_det.data.coco.findings import Findings, shown
from gn_det.data.coco.values import whole_number
from gn_det.data.pictures import PictureError, picture_size
from gn_det.files import check_folder
from gn_det.text import shortened

__all__ = ["normalise_images"]

_LONGEST_SIDE = 200_000  # pixels; drawing polygons takes memory in proportion


def normalise_images(dataset: dict[str, Any], image_root: str | Path, findings: Findings) -> None:
    """Give pictures whole ids, the names that their files have, and whole sizes, in place.

    Each picture is then there once. One whose size is neither in the JSON nor in a file that can be
    read has None for it.

    Args:
        dataset: what :func:`gn_det.data.coco.read_coco` returned.
        image_root: the folder that the file_name of its images is relative to.
        findings: told of everything that is mended or refused.

    Raises:
        InputError: image_root is no folder, or in one line everything that is refused.
    """
    check_folder(image_root, "images")
    by_id: dict[int, dict[str, Any]] = {}
    for index, image in enumerate(dataset["images"]):
        _mend_missing_name(image, findings)
        place = f"image {shown(image['id'])}" if "id" in image else f"images[{index}]"
        number, name = whole_number(image.get("id")), image.get("file_name")
        if number is None:
            what = "image ids are no whole numbers (number the images, and image_id alike)"
            findings.add("refused", what, f"images[{index}]", image.get("id"))
        elif not isinstance(name, str) or not name.strip():
            findings.add("refused", "images have no file_name", place, name)
        elif number in by_id:
            _repeated(by_id[number], image, place, findings)
        else:
            by_id[number] = image
            if type(image["id"]) is not int:
                findings.add("mended", "image ids written as text or 1.0", place)
                image["id"] = number
    kept = list(by_id.values())
    _mend_names(kept, image_root, findings)
    findings.check()
    for image in tqdm(kept, desc="sizes of the images", unit="image", delay=2):
        _mend_size(image, image_root, findings)
    dataset["images"] = kept
    _merge_same_files(dataset, findings)


def _merge_same_files(dataset: dict[str, Any], findings: Findings) -> None:
    """Give a file that is there under several ids one of them, and its objects too, in place.

    Else the objects under one id would be background under another.
    """
    first_of: dict[str, int] = {}
    stands_for: dict[int, int] = {}
    for image in dataset["images"]:
        first = first_of.setdefault(os.path.normpath(image["file_name"]), image["id"])
        if first != image["id"]:
            stands_for[image["id"]] = first
            what = "files have two image ids: all their objects are of the first"
            findings.add("mended", what, f"image {image['id']}", image["file_name"], first)
    if stands_for:
        dataset["images"] = [i for i in dataset["images"] if i["id"] not in stands_for]
        for annotation in dataset["annotations"]:
            number = whole_number(annotation.get("image_id"))
            if number in stands_for:
                annotation["image_id"] = stands_for[number]


def _mend_missing_name(image: dict[str, Any], findings: Findings) -> None:
    """Take the name from LVIS's coco_url, with its folder."""
    url = image.get("coco_url")
    if image.get("file_name") is None and isinstance(url, str) and url.strip():
        image["file_name"] = "/".join(url.partition("?")[0].split("/")[-2:])
        what = "images have no file_name: that of their coco_url"
        findings.add("mended", what, f"image {shown(image.get('id'))}", image["file_name"])


def _repeated(first: dict[str, Any], image: dict[str, Any], place: str, findings: Findings) -> None:
    names = first["file_name"], image["file_name"]
    if names[0] == names[1]:
        findings.add("mended", "images are listed twice", place, names[0])
    else:
        what = "image ids have two files"
        findings.add("refused", what, place, *names)


def _mend_names(images: list[dict[str, Any]], root: str | Path, findings: Findings) -> None:
    found, several = find_files([image["file_name"] for image in images], root)
    for image in images:
        name = image["file_name"]
        place = f"image {image['id']}"
        if name in found:
            image["file_name"], form = found[name]
            what = f"file names are mended: {form}"
            findings.add(
                "mended", what, place, text=f"{shown(name)} is {shown(image['file_name'])}"
            )
        elif name in several:
            what = f"file names could be several files below {root}: name a folder that has one"
            findings.add("refused", what, place, name, shortened(several[name], 3))
        elif not can_be_named(name):
            findings.add("refused", "file names are none that a file can have", place, name)
        elif leaves_folder(name, root) and (not os.path.isabs(name) or os.path.exists(name)):
            what = f"file names leave the folder {root}"
            findings.add("refused", what, place, name)


def _mend_size(image: dict[str, Any], root: str | Path, findings: Findings) -> None:
    place = f"image {image['id']}"
    written = image.get("width"), image.get("height")
    size = tuple(map(whole_number, written))
    if None in size or min(size) < 1 or max(size) > _LONGEST_SIDE:
        try:
            size = picture_size(Path(root) / image["file_name"])
        except PictureError:
            image["width"] = image["height"] = None
            return
        what = "images without a possible width and height: those of the files"
        findings.add("mended", what, place, *written, f"{size[0]}x{size[1]}")
    elif not type(written[0]) is type(written[1]) is int:
        findings.add("mended", "widths and heights written as text or 160.0", place, *written)
    image["width"], image["height"] = size
