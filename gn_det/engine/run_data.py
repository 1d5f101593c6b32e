"""The data sets of a run, checked before it starts: those of --train/--val and of the config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig

from gn_det.data.coco import declared_categories, fingerprint, flip_pairs, keypoint_names
from gn_det.data.datasets import (
    CheckedFolder,
    CocoFolder,
    check_objects,
    check_registered,
    read_folder,
)
from gn_det.data.proposals import check_config_proposals, check_proposals
from gn_det.engine.command import RunOptions
from gn_det.engine.evaluation import check_evaluator
from gn_det.errors import InputError
from gn_det.text import printable, shortened

__all__ = ["RunData", "check_config_data", "check_data", "set_data", "wrapped_model"]

_CUSTOM = {"train": "custom_train", "val": "custom_val"}
_DEFAULT_NUM_CLASSES = 80  # of Detectron2's configs


@dataclass
class RunData:
    """What a run trains and evaluates on.

    Attributes:
        train: names of the training sets.
        test: names of the sets to evaluate on.
        folders: COCO-format folders to register, some of the above.
        categories: (category id, name) by class index, from the folders; empty without folders.
        keypoints: names of the keypoints of all categories, where the model learns such.
        has_rle_masks: whether objects (not only crowds) have RLE segmentations, which Detectron2
            reads as bitmasks only.
        fingerprints: by name, what tells the sets from others; of those that are JSON.
        checked: by name, the folders of which something has to be said, or a copy written.
        copies: the folder for the copies, see :meth:`place_copies`.
    """

    train: list[str]
    test: list[str]
    folders: list[CocoFolder]
    categories: list[tuple[int, str]] = field(default_factory=list)
    keypoints: list[str] = field(default_factory=list)
    has_rle_masks: bool = False
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    checked: dict[str, CheckedFolder] = field(default_factory=dict)
    copies: Path = Path()

    def place_copies(self, copies: Path) -> None:
        """Let normalised copies stand for the folders that need them; nothing is written yet.

        Args:
            copies: the folder for them, and for tables of what was found.
        """
        self.copies = copies.resolve()  # as the paths of the folders are
        for index, folder in enumerate(self.folders):
            checked = self.checked.get(folder.name)
            if checked is not None and checked.needs_copy:
                self.folders[index] = checked.copy_in(self.copies)

    def write_copies(self, *, write: bool = True) -> None:
        """Say what was found in the folders, and write the copies that have their place.

        Args:
            write: whether this machine writes them, or another one of the run that shares the
                folder.
        """
        for folder in self.folders:
            checked = self.checked.pop(folder.name, None)
            if checked is not None:
                if write:
                    checked.write(self.copies)
                _say(checked, folder)


def _say(checked: CheckedFolder, place: CocoFolder) -> None:
    file, table = checked.folder.json_file, checked.findings.table()
    if checked.bad_images:
        print(printable(f"{file}: {_describe(checked)}; the run continues without these"))
    if checked.needs_copy:
        print(printable(f"{file} stays as it is; the run uses {place.json_file}"))
    if table:
        images, annotations = (len(checked.dataset[key]) for key in ("images", "annotations"))
        used = f"{images} images and {annotations} annotations are left"
        print(f"\nFound in {printable(file)}, of which {used}:\n\n{table}\n")


def check_data(
    options: RunOptions,
    train: Sequence[str],
    test: Sequence[str],
    *,
    folders: Sequence[Sequence[str]] = (),
    categories: Sequence[Sequence[int | str]] = (),
    masks: bool = True,
    keypoints: bool = False,
    value_range: Sequence[float] = (),
) -> RunData:
    """Settle and check what a run trains and evaluates on.

    Args:
        options: the folders given on the command line, and whether the run trains.
        train: names in the config, replaced by --train.
        test: names in the config, replaced by --val (by none where there is only --train).
        folders: DATASETS.COCO_FOLDERS of the config: [name, JSON file, folder of the images].
        categories: DATASETS.CATEGORIES of the config, which the folders must declare; --train
            replaces them.
        masks, keypoints: whether the model learns such.
        value_range: see :func:`gn_det.data.pictures.read_picture`.

    Raises:
        InputError: data that a run would fail on, or silently learn nothing from.
    """
    by_name = _folders_by_name(options, folders)
    if options.train:
        train, test = [_CUSTOM["train"]], []
    if options.val:
        test = [_CUSTOM["val"]]
    if not (test if options.eval_only else train):
        flag = "--val" if options.eval_only else "--train"
        raise InputError(
            f"no data set is given: add {flag} JSON IMAGES_DIR, or name one in the config"
        )
    data = RunData(
        list(train),
        list(test),
        [by_name[name] for name in [*train, *test] if name in by_name],
        [] if options.train else [(number, name) for number, name in categories],
    )
    if options.train and options.eval_only:  # the model has the classes of what it was trained on
        data.categories = declared_categories(by_name[_CUSTOM["train"]].json_file)
    read = partial(
        read_folder,
        masks=masks,
        keypoints=keypoints,
        crowds_as_objects=options.crowds_as_objects,
        strict=options.refuse_bad_annotations,
        value_range=value_range,
    )
    for name in [*([] if options.eval_only else train), *test]:
        if name not in by_name:
            _check_registered(data, name, value_range)
            continue
        folder = by_name[name]
        checked = read(folder, known=data.categories)
        if checked.undecided:
            others = [other for other in data.folders if other.name != name]
            as_stored = _drawn_as_stored(read, others)
            checked = read(folder, known=data.categories, as_stored=as_stored)
        _take_folder(data, folder, checked, options.skip_bad_images, keypoints=keypoints)
    return data


def _folders_by_name(
    options: RunOptions, folders: Sequence[Sequence[str]]
) -> dict[str, CocoFolder]:
    """Those of the config, and those given on the command line under names of their own."""
    if options.val and not options.train and not options.eval_only:
        raise InputError("--val goes with --train")
    by_name = {name: CocoFolder(name, *paths) for name, *paths in folders}
    for split, given in (("train", options.train), ("val", options.val)):
        if given:
            paths = [str(Path(path).resolve()) for path in given]
            by_name[_CUSTOM[split]] = CocoFolder(_CUSTOM[split], *paths)
    return by_name


def _check_registered(data: RunData, name: str, value_range: Sequence[float]) -> None:
    """Check a set that code has registered."""
    dataset, bad = check_registered(name, value_range)
    if bad:
        raise InputError(
            f"{name}: {len(bad)} of {len(dataset['images'])} images cannot be used: "
            f"{_named(bad, 5)}; mend them, or hand the set over as --train"
        )
    if dataset:
        data.fingerprints[name] = fingerprint(dataset)
    if name in data.test:
        check_evaluator(name)


def _take_folder(
    data: RunData,
    folder: CocoFolder,
    checked: CheckedFolder,
    skip_bad_images: bool,
    *,
    keypoints: bool,
) -> None:
    """Add to a run's data what was found in a folder, or refuse it."""
    name, dataset = folder.name, checked.dataset
    check_objects(checked, training=name in data.train, keypoints=keypoints)
    data.categories = sorted((c["id"], c["name"]) for c in dataset["categories"])
    if keypoints:
        _settle_keypoints(data, dataset, folder)
    if checked.bad_images and not (skip_bad_images and _has_objects_left(checked)):
        advice = "; --skip-bad-images leaves them out" if _has_objects_left(checked) else ""
        raise InputError(f"{folder.json_file}: {_describe(checked)}{advice}")
    if name in data.train:
        data.has_rle_masks |= any(
            isinstance(a.get("segmentation"), dict) and not a.get("iscrowd")
            for a in dataset["annotations"]
        )
    data.fingerprints[name] = fingerprint(checked.used)
    if checked.needs_copy or checked.findings.table():
        data.checked[name] = checked


def check_config_data(cfg: CfgNode | DictConfig, options: RunOptions) -> RunData:
    """:func:`check_data` of the data sets that a config names, and its files of proposals."""
    if isinstance(cfg, DictConfig):
        loaders = cfg.dataloader
        data = check_data(
            options,
            _names(loaders.train),
            _names(loaders.test),
            masks=loaders.train.mapper.get("use_instance_mask", False),
            value_range=loaders.train.mapper.get("value_range", ()),
        )
        if data.folders and loaders.train.mapper.get("use_keypoint", False):
            raise InputError("--train and --val have no keypoints for a LazyConfig; use a YAML one")
        target = wrapped_model(cfg.model).get("_target_", "")
        _check_has_instances(getattr(target, "__name__", str(target).rpartition(".")[2]), data)
        for loader in (loaders.test,) if options.eval_only else (loaders.train, loaders.test):
            check_proposals(loader.dataset.get("proposal_files") or [])
        return data
    data = check_data(
        options,
        cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        folders=cfg.DATASETS.COCO_FOLDERS,
        categories=cfg.DATASETS.CATEGORIES,
        masks=cfg.MODEL.MASK_ON,
        keypoints=cfg.MODEL.KEYPOINT_ON,
        value_range=cfg.INPUT.VALUE_RANGE,
    )
    _check_sigmas(cfg, data)
    _check_has_instances(cfg.MODEL.META_ARCHITECTURE, data)
    if not options.eval_only:
        check_config_proposals(cfg, "TRAIN", data.train)
    check_config_proposals(cfg, "TEST", data.test)
    return data


def set_data(cfg: CfgNode | DictConfig, data: RunData) -> None:
    """Set the data sets of a run in its config, and what follows from COCO-format folders."""
    if isinstance(cfg, DictConfig):
        _set_lazy_data(cfg, data)
        return
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(data.train), tuple(data.test)
    cfg.DATASETS.COCO_FOLDERS = [[f.name, f.json_file, f.image_root] for f in data.folders]
    if data.categories:
        cfg.DATASETS.CATEGORIES = [list(category) for category in data.categories]
        for part in ("ROI_HEADS", "RETINANET"):
            _set_num_classes(cfg, part, len(data.categories))
    if data.keypoints:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(data.keypoints)
    if data.has_rle_masks and cfg.INPUT.MASK_FORMAT != "bitmask":
        print("Some objects have RLE masks: INPUT.MASK_FORMAT is now bitmask.")
        cfg.INPUT.MASK_FORMAT = "bitmask"


def _set_num_classes(cfg: CfgNode, part: str, number: int) -> None:
    given = cfg.MODEL[part].NUM_CLASSES
    if given not in (_DEFAULT_NUM_CLASSES, number):
        print(f"MODEL.{part}.NUM_CLASSES is {given}, and is now {number}, as the data have.")
    cfg.MODEL[part].NUM_CLASSES = number


def _set_lazy_data(cfg: DictConfig, data: RunData) -> None:
    for loader, names in ((cfg.dataloader.train, data.train), (cfg.dataloader.test, data.test)):
        loader.dataset.names = names[0] if len(names) == 1 else names
    if data.categories:
        model = wrapped_model(cfg.model)
        for part in (model, model.get("roi_heads", {})):
            if "num_classes" in part:
                part.num_classes = len(data.categories)
    if data.has_rle_masks:
        cfg.dataloader.train.mapper.instance_mask_format = "bitmask"


def wrapped_model(model: DictConfig) -> DictConfig:
    """The model itself in a LazyConfig that hands it to functions, such as gn_det.inject."""
    while "model" in model:
        model = model.model
    return model


def _names(loader: DictConfig) -> list[str]:
    names = loader.dataset.names
    return [names] if isinstance(names, str) else list(names)


def _settle_keypoints(data: RunData, dataset: dict[str, Any], folder: CocoFolder) -> None:
    names = keypoint_names(dataset["categories"])
    if data.keypoints and names != data.keypoints:
        raise InputError(
            f"{folder.json_file} lists the keypoints {names}, the training set {data.keypoints}"
        )
    if not data.keypoints:
        pairs = shortened((f"{left} and {right}" for left, right in flip_pairs(names)), 9) or "none"
        print(f"Keypoints that change places in a mirrored image: {printable(pairs)}.")
    data.keypoints = names


def _drawn_as_stored(
    read: Callable[[CocoFolder], CheckedFolder], folders: Sequence[CocoFolder]
) -> bool | None:
    """What the first of other splits says whose objects tell how turned pictures were drawn."""
    for folder in folders:
        with suppress(InputError):  # which is told when its turn comes
            told = read(folder).as_stored
            if told is not None:
                return told
    return None


def _check_has_instances(architecture: str, data: RunData) -> None:
    if data.folders and architecture.removeprefix("GN") in ("SemanticSegmentor", "PanopticFPN"):
        raise InputError(
            f"{architecture} learns semantic segmentation, which --train and --val do not have; "
            "register a data set of your own, as Detectron2 describes"
        )


def _check_sigmas(cfg: CfgNode, data: RunData) -> None:
    """Refuse keypoints that are evaluated without a tolerance for each; COCO's 17 have theirs."""
    count, sigmas = len(data.keypoints), cfg.TEST.KEYPOINT_OKS_SIGMAS
    if data.keypoints and data.test and len(sigmas or [0] * 17) != count:
        raise InputError(
            f"the data have {count} keypoints, and TEST.KEYPOINT_OKS_SIGMAS {len(sigmas)} numbers: "
            "set one for each, such as 0.05, a tolerance in sides of the object"
        )


def _has_objects_left(checked: CheckedFolder) -> bool:
    bad_ids = {image["id"] for image, _ in checked.bad_images}
    return any(
        not a.get("iscrowd") for a in checked.dataset["annotations"] if a["image_id"] not in bad_ids
    )


def _describe(checked: CheckedFolder) -> str:
    """Which images of a folder are missing, where they were looked for, and which are broken."""
    total, bad = len(checked.dataset["images"]), checked.bad_images
    missing = [(image, problem) for image, problem in bad if problem == "missing"]
    broken = [(image, problem) for image, problem in bad if problem != "missing"]
    parts = []
    if missing:
        names = shortened((printable(image["file_name"]) for image, _ in missing), 3)
        parts.append(
            f"{len(missing)} of {total} images are missing in {checked.folder.image_root}: {names} "
            "(also tried: backslashes, leading folders, URL-quoting, another case, Unicode forms)"
        )
    if broken:
        parts.append(f"{len(broken)} of {total} images cannot be used: {_named(broken, 5)}")
    return "; ".join(parts)


def _named(bad: list[tuple[dict, str]], most: int) -> str:
    return shortened(
        (printable(f"{image['file_name']} ({problem})") for image, problem in bad), most
    )
