"""The data sets of a run, checked before it starts: those of --train/--val and of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig

from gn_det.data.datasets import CocoFolder, check_folder, check_registered, without_images
from gn_det.data.proposals import check_config_proposals, check_proposals
from gn_det.engine.command import RunOptions
from gn_det.engine.evaluation import check_evaluator
from gn_det.errors import InputError
from gn_det.utils import printable, some

__all__ = ["RunData", "check_config_data", "check_data", "set_data", "wrapped_model"]

_CUSTOM = {"train": "custom_train", "val": "custom_val"}


@dataclass
class RunData:
    """What a run trains and evaluates on.

    Attributes:
        train: names of the training sets.
        test: names of the sets to evaluate on.
        folders: COCO-format folders to register, some of the above.
        categories: (category id, name) by class index, from the folders; empty without folders.
        bad_images: (the parsed JSON, [(image, what is wrong)]) by the name of a folder, where the
            run goes on without them.
        has_rle_masks: whether objects (not only crowds) have RLE segmentations, which Detectron2
            reads as bitmasks only.
    """

    train: list[str]
    test: list[str]
    folders: list[CocoFolder]
    categories: list[tuple[int, str]] = field(default_factory=list)
    has_rle_masks: bool = False
    bad_images: dict[str, tuple[dict, list]] = field(default_factory=dict)

    def leave_out_bad_images(self, output_dir: Path) -> None:
        """Replace the folders that have bad images by copies of their JSON without them."""
        for index, folder in enumerate(self.folders):
            if folder.name in self.bad_images:
                dataset, bad = self.bad_images[folder.name]
                without = _describe(bad, dataset)
                print(printable(f"{folder.json_file}: continuing without {without}"))
                images = [image for image, _ in bad]
                self.folders[index] = without_images(
                    folder, dataset, images, output_dir / "datasets"
                )


def check_data(
    options: RunOptions,
    train: Sequence[str],
    test: Sequence[str],
    *,
    folders: Sequence[Sequence[str]] = (),
    categories: Sequence[Sequence[int | str]] = (),
    masks: bool = True,
) -> RunData:
    """Settle and check what a run trains and evaluates on.

    Args:
        options: the folders given on the command line, and whether the run trains.
        train: names in the config, replaced by --train.
        test: names in the config, replaced by --val (by none where there is only --train).
        folders: DATASETS.COCO_FOLDERS of the config: [name, JSON file, folder of the images].
        categories: DATASETS.CATEGORIES of the config, which the folders must declare; --train
            replaces them.
        masks: whether the model learns masks.

    Raises:
        InputError: data that a run would fail on, or silently learn nothing from.
    """
    if options.val and not options.train and not options.eval_only:
        raise InputError("--val goes with --train")
    by_name = {name: CocoFolder(name, *paths) for name, *paths in folders}
    for split, given in (("train", options.train), ("val", options.val)):
        if given:
            paths = [str(Path(path).resolve()) for path in given]
            by_name[_CUSTOM[split]] = CocoFolder(_CUSTOM[split], *paths)
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
    for name in [*([] if options.eval_only else train), *test]:
        if name not in by_name:
            _refuse(*check_registered(name), name, "; mend them, or hand the set over as --train")
            if name in test:
                check_evaluator(name)
            continue
        dataset, bad = check_folder(by_name[name], masks=masks, training=name in train)
        _settle_categories(data, dataset, by_name[name])
        if name in train:
            data.has_rle_masks |= any(
                isinstance(a.get("segmentation"), dict) and not a.get("iscrowd")
                for a in dataset["annotations"]
            )
        if bad and options.skip_bad_images and _has_objects_without(bad, dataset):
            data.bad_images[name] = dataset, bad
        else:
            _refuse(dataset, bad, by_name[name].json_file, "; --skip-bad-images leaves them out")
    return data


def check_config_data(cfg: CfgNode | DictConfig, options: RunOptions) -> RunData:
    """:func:`check_data` of the data sets that a config names, and its files of proposals."""
    if isinstance(cfg, DictConfig):
        loaders = cfg.dataloader
        data = check_data(
            options,
            _names(loaders.train),
            _names(loaders.test),
            masks=loaders.train.mapper.get("use_instance_mask", False),
        )
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
    )
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
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(data.categories)
        cfg.MODEL.RETINANET.NUM_CLASSES = len(data.categories)
    if data.has_rle_masks and cfg.INPUT.MASK_FORMAT != "bitmask":
        print("Some objects have RLE masks: INPUT.MASK_FORMAT is now bitmask.")
        cfg.INPUT.MASK_FORMAT = "bitmask"


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


def _settle_categories(data: RunData, dataset: dict[str, Any], folder: CocoFolder) -> None:
    categories = sorted((c["id"], c["name"]) for c in dataset["categories"])
    if data.categories and categories != data.categories:
        raise InputError(
            f"{folder.json_file} declares the categories {categories}, "
            f"the model knows {data.categories}"
        )
    data.categories = categories


def _has_objects_without(bad: list[tuple[dict, str]], dataset: dict[str, Any]) -> bool:
    bad_ids = {image["id"] for image, _ in bad}
    return any(
        not a.get("iscrowd") and a["image_id"] not in bad_ids for a in dataset["annotations"]
    )


def _refuse(dataset: dict[str, Any], bad: list, name: str, advice: str) -> None:
    if bad:
        raise InputError(f"{name}: {_describe(bad, dataset)} cannot be used{advice}")


def _describe(bad: list[tuple[dict, str]], dataset: dict[str, Any], most: int = 5) -> str:
    named = some((f"{image['file_name']} ({problem})" for image, problem in bad), most)
    return f"{len(bad)} of {len(dataset['images'])} images: {named}"
