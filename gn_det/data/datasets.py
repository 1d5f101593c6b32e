"""Data sets by name: checked before a run, COCO-format folders registered with Detectron2."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from gn_det.data.bad_images import dark_images, find_bad_images
from gn_det.data.coco import (
    Findings,
    check_finite,
    flip_pairs,
    keypoint_names,
    normalise_images,
    normalise_objects,
    read_coco,
    scale_objects,
    settle_sizes,
)
from gn_det.data.coco.categories import Known
from gn_det.data.coco.sizes import BadImages
from gn_det.errors import InputError
from gn_det.files import whole_file, write_atomically
from gn_det.text import nearest

__all__ = [
    "CheckedFolder",
    "CocoFolder",
    "check_objects",
    "check_registered",
    "read_folder",
    "register_folders",
]


@dataclass(frozen=True)
class CocoFolder:
    """A COCO-format data set: the name to register, the JSON, the folder of the images."""

    name: str
    json_file: str
    image_root: str


@dataclass
class CheckedFolder:
    """A folder that has been read, normalised and checked.

    Attributes:
        folder: what was checked.
        dataset: its JSON, normalised.
        findings: what was found on the way.
        bad_images: (image, what is wrong) for each that cannot be used.
        as_stored: whether objects were drawn on stored pictures, which a tag turns; None where no
            object tells.
        undecided: whether there are such pictures, and nothing tells.
    """

    folder: CocoFolder
    dataset: dict[str, Any]
    findings: Findings
    bad_images: BadImages
    as_stored: bool | None
    undecided: bool

    @property
    def needs_copy(self) -> bool:
        """Whether a run cannot use the file as it is."""
        return self.findings.changed or bool(self.bad_images)

    @property
    def used(self) -> dict[str, Any]:
        """The data set without the bad images."""
        if not self.bad_images:
            return self.dataset
        bad_ids = {image["id"] for image, _ in self.bad_images}
        return {
            **self.dataset,
            "images": [i for i in self.dataset["images"] if i["id"] not in bad_ids],
            "annotations": [a for a in self.dataset["annotations"] if a["image_id"] not in bad_ids],
        }

    def copy_in(self, output: Path) -> CocoFolder:
        """The folder with its JSON at output/NAME.json, which :meth:`write` writes."""
        name = re.sub(r"[^\w.-]", "_", self.folder.name)
        return replace(self.folder, json_file=str(output / f"{name}.json"))

    def write(self, output: Path) -> None:
        """Write the normalised JSON, without the bad images, to output/NAME.json.

        The table of what was found stands beside it, in NAME.txt.

        Raises:
            InputError: it cannot be written, or has a number that is infinite.
        """
        copy = Path(self.copy_in(output).json_file)
        output.mkdir(parents=True, exist_ok=True)
        if self.needs_copy:
            with whole_file(copy) as file:
                try:
                    file.writelines(_json_parts(self.used))
                except ValueError:  # of json, for what a file writes as 1e999
                    check_finite(self.used, self.folder.json_file)
                    raise
        # A resumed run reads the copy, and the table tells how that came about.
        is_copy = Path(self.folder.json_file) == copy
        if self.findings.table() and not (is_copy and copy.with_suffix(".txt").exists()):
            text = f"{self.folder.json_file}\n\n{self.findings.table()}\n"
            write_atomically(copy.with_suffix(".txt"), text)


def _json_parts(dataset: dict[str, Any], most: int = 1000) -> Iterator[bytes]:
    """A data set as JSON, a part at a time, since the whole text takes as much memory again."""
    dumps = partial(json.dumps, allow_nan=False)
    for key, value in dataset.items():
        yield f"{', ' if key != next(iter(dataset)) else '{'}{json.dumps(key)}: ".encode()
        if isinstance(value, list):
            parts = (dumps(value[i : i + most])[1:-1] for i in range(0, len(value), most))
            yield b"["
            for number, part in enumerate(parts):
                yield f"{', ' if number else ''}{part}".encode()
            yield b"]"
        else:
            yield dumps(value).encode()
    yield b"}\n"


def read_folder(
    folder: CocoFolder,
    *,
    masks: bool,
    keypoints: bool = False,
    known: Known = (),
    crowds_as_objects: bool = False,
    strict: bool = False,
    value_range: Sequence[float] = (),
    as_stored: bool | None = None,
) -> CheckedFolder:
    """Read a folder, normalise its annotations, and look for bad images.

    Args:
        folder: what to read.
        masks, keypoints: whether the model learns such.
        known: (id, name) of the categories of a model or another split; () for none.
        crowds_as_objects: whether crowds become objects.
        strict: whether annotations that would be dropped are refused.
        value_range: see :func:`gn_det.data.pictures.read_picture`.
        as_stored: what another split of the set said, see :class:`CheckedFolder`.

    Raises:
        InputError: see :func:`gn_det.data.coco.read_coco`, ``normalise_images`` and
            ``normalise_objects``; or there are no images.
    """
    findings = Findings(folder.json_file, strict=strict)
    dataset = read_coco(folder.json_file, findings=findings)
    normalise_images(dataset, folder.image_root, findings)
    settled = settle_sizes(dataset, folder.image_root, findings, value_range, as_stored)
    bad = settled.bad_images
    dataset = normalise_objects(
        dataset,
        findings,
        masks=masks,
        keypoints=keypoints,
        crowds_as_objects=crowds_as_objects,
        known=known,
    )
    if not dataset["images"]:
        raise InputError(f"{folder.json_file} has no images")
    scale_objects(dataset, settled.file_sizes, findings, masks=masks)
    if not value_range:
        bad_ids = {image["id"] for image, _ in bad}
        sound = [image for image in dataset["images"] if image["id"] not in bad_ids]
        for image in dark_images(sound, folder.image_root):
            what = (
                "images of more than 8 bits are nearly black: set INPUT.VALUE_RANGE, as (0, 4095)"
            )
            findings.add("warned", what, f"image {image['id']}", image["file_name"])
    return CheckedFolder(folder, dataset, findings, bad, settled.as_stored, settled.undecided)


def check_objects(checked: CheckedFolder, *, training: bool, keypoints: bool) -> None:
    """Refuse a split in which there is nothing to train or to evaluate on, and warn of crowds.

    Args:
        checked: what :func:`read_folder` returned; its findings are told of crowds.
        training: whether it is a training split, or one to evaluate on.
        keypoints: whether the model learns such.

    Raises:
        InputError: there are no objects, or crowds alone, or no visible keypoint.
    """
    dataset, findings = checked.dataset, checked.findings
    total = len(dataset["annotations"])
    crowds = sum(a.get("iscrowd") == 1 for a in dataset["annotations"])
    use = "learnt" if training else "evaluated"
    flag = "--crowds-as-objects takes them as objects"
    if not total:
        lost = findings.sentence("dropped", "warned")
        raise InputError(
            f"{findings.json_file} has no annotated object to "
            + ("train on" if training else "evaluate on; without --val, a run trains all the same")
            + (f"; found were {lost}" if lost else "")
        )
    if crowds == total:
        raise InputError(
            f"{findings.json_file}: all {total} objects are crowds, and none will be {use}; {flag}"
        )
    if crowds:
        what = f"{crowds} of {total} objects are crowds and will not be {use}; {flag}"
        first = next(a["id"] for a in dataset["annotations"] if a.get("iscrowd") == 1)
        findings.add("warned", what, f"annotation {first}", count=crowds)
    if keypoints and not any(a.get("num_keypoints") for a in dataset["annotations"]):
        raise InputError(f"{findings.json_file} has no visible keypoint to {use[:-1]} from")


def check_registered(
    name: str, value_range: Sequence[float] = ()
) -> tuple[dict[str, Any], BadImages]:
    """Check the images of a data set that Detectron2 or the user's project registered.

    Returns:
        The parsed JSON and (image, what is wrong) for each unusable image; nothing for a data set
        that is not COCO's JSON.

    Raises:
        InputError: the name is not registered, or its JSON cannot be read.
    """
    if name not in DatasetCatalog:
        raise InputError(
            f"data set {name!r} is not registered{nearest(name, list(DatasetCatalog))}"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco":
        return {}, []
    if not os.path.exists(metadata.json_file):
        raise InputError(
            f"data set {name!r} needs {metadata.json_file}; Detectron2 looks below the folder "
            "in the environment variable DETECTRON2_DATASETS (default ./datasets)"
        )
    dataset = read_coco(metadata.json_file, sections=["images"])
    kinds = {"id": int, "file_name": str, "height": (int, float), "width": (int, float)}
    for index, image in enumerate(dataset["images"]):
        for key, kind in kinds.items():
            if not isinstance(image.get(key), kind):
                raise InputError(
                    f"{metadata.json_file}: images[{index}] has {image.get(key)!r} for {key!r}; "
                    "hand the set over as --train or --val, which mends what can be mended"
                )
    return dataset, find_bad_images(dataset["images"], metadata.image_root, value_range)


def register_folders(folders: Sequence[CocoFolder]) -> None:
    """Register folders with Detectron2; one that is registered already stays.

    Raises:
        InputError: its name stands for another JSON.
    """
    for folder in folders:
        if folder.name not in DatasetCatalog:
            DatasetCatalog.register(folder.name, partial(_load, folder))
            MetadataCatalog.get(folder.name).set(
                json_file=folder.json_file, image_root=folder.image_root, evaluator_type="coco"
            )
        elif MetadataCatalog.get(folder.name).get("json_file") != folder.json_file:
            raise InputError(f"data set {folder.name!r} is registered with another JSON already")


def _load(folder: CocoFolder) -> list[dict[str, Any]]:
    """Detectron2's dicts, and in the metadata the keypoints that mirroring exchanges."""
    dicts = load_coco_json(folder.json_file, folder.image_root, folder.name)
    if any("keypoints" in annotation for d in dicts for annotation in d["annotations"]):
        names = keypoint_names(read_coco(folder.json_file, ["categories"])["categories"])
        metadata = MetadataCatalog.get(folder.name)
        metadata.set(keypoint_names=names, keypoint_flip_map=flip_pairs(names))
    return dicts
