"""The config keys that gn_det adds to Detectron2's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__all__ = ["add_gn_config"]


def add_gn_config(cfg: CfgNode) -> None:
    """Add gn_det's keys to a Detectron2 config, and register gn_det's models and components.

    Call it right after get_cfg(), before config files are merged. The keys and their defaults are
    in this function's source, ``gn_det/config/defaults.py``.

    Args:
        cfg: what ``detectron2.config.get_cfg()`` returns. It is modified in place.

    Example::

        from detectron2.config import get_cfg

        cfg = get_cfg()
        gn_det.add_gn_config(cfg)
        cfg.MODEL.META_ARCHITECTURE = "GNGeneralizedRCNN"
        cfg.MODEL.GN.SITES = ["default", "rpn"]
    """
    from detectron2.config import CfgNode

    from gn_det import modeling  # noqa: F401  (importing it registers)

    cfg.MODEL.GN = CfgNode()
    # Where the meta-architectures GN... put GN: names of parts (see gn_det.inject), "default" for
    # those that Detectron2's NORM keys reach, "ALL".
    cfg.MODEL.GN.SITES = ["default"]
    # The registered builder that build_gn_backbone gives GN to.
    cfg.MODEL.GN.BACKBONE = ""
    # Groups of every GN layer; where the channels are no multiple of it, the largest divisor below.
    cfg.MODEL.GN.NUM_GROUPS = 32
    # The other way to say it, if above 0: channels in each group, or the largest divisor below.
    cfg.MODEL.GN.CHANNELS_PER_GROUP = 0
    # Whether the convolutions before GN also standardize their weight.
    cfg.MODEL.GN.WEIGHT_STANDARDIZATION = False
    # Compute norms and ReLUs again in the backward pass: GN in the activation memory of frozen BN.
    cfg.MODEL.GN.RECOMPUTE = False

    # Convolutions and their features in channels_last order, as tensor cores take them.
    cfg.MODEL.CHANNELS_LAST = False

    # Run the backbone through torch.compile.
    cfg.MODEL.BACKBONE.COMPILE = False

    # Images on each GPU at a time, from which the schedule follows: the other SOLVER keys are then
    # those of a reference with IMS_PER_BATCH images per step. 0 takes all as they stand.
    cfg.SOLVER.IMS_PER_GPU = 0
    # Batches whose gradients make one step.
    cfg.SOLVER.ACCUMULATE_STEPS = 1

    # [low, high] that become 0 and 255 in pictures of more than 8 bits; [] for the range of their
    # type, 0 to 65535 or, of floats, 0 to 1.
    cfg.INPUT.VALUE_RANGE = []
    # Whether training goes on without pictures that break after the check; --skip-bad-images.
    cfg.DATALOADER.SKIP_BAD_IMAGES = False

    # COCO-format folders to register, each [name, JSON file, folder of the images].
    cfg.DATASETS.COCO_FOLDERS = []
    # [category id in the JSON, name] by class index: what a prediction's class means.
    cfg.DATASETS.CATEGORIES = []
