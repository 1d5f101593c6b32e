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
    # The fewest channels of a group; with 1, layers of up to 32 channels get instance norm.
    cfg.MODEL.GN.MIN_CHANNELS_PER_GROUP = 1
    # Whether the convolutions before GN also standardize their weight.
    cfg.MODEL.GN.WEIGHT_STANDARDIZATION = False
    # Compute norms and ReLUs again in the backward pass: GN in the activation memory of frozen BN.
    cfg.MODEL.GN.RECOMPUTE = False
    # Steps at the beginning of a training in which GN takes over from the frozen BN that it
    # replaces, gradually; 0 for GN from the first step.
    cfg.MODEL.GN.HAND_OVER_STEPS = 0

    cfg.MODEL.TIMM = CfgNode()
    # The model of timm that the backbones build_timm_... are, such as "resnet50.a1_in1k".
    cfg.MODEL.TIMM.NAME = ""
    # Which of its feature maps, by their place in timm's feature_info; [] for strides 4 to 32.
    cfg.MODEL.TIMM.OUT_INDICES = []
    # What it starts from where MODEL.WEIGHTS is empty: "timm" for the weights that timm downloads,
    # or a file with the model's state dict; "" for a random start.
    cfg.MODEL.TIMM.WEIGHTS = ""
    # What its BN layers become: "FrozenBN", "BN" or "GN".
    cfg.MODEL.TIMM.NORM = "FrozenBN"

    # Convolutions and their features in channels_last order, as tensor cores take them.
    cfg.MODEL.CHANNELS_LAST = False

    # Run the backbone through torch.compile.
    cfg.MODEL.BACKBONE.COMPILE = False

    # Images on each GPU at a time, from which the schedule follows: the other SOLVER keys are then
    # those of a reference with IMS_PER_BATCH images per step. 0 takes all as they stand.
    cfg.SOLVER.IMS_PER_GPU = 0
    # Batches whose gradients make one step.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Learning rate of the backbone (below an FPN) over SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0

    # [low, high] that become 0 and 255 in pictures of more than 8 bits; [] for the range of their
    # type, 0 to 65535 or, of floats, 0 to 1.
    cfg.INPUT.VALUE_RANGE = []
    # Whether training goes on without pictures that break after the check; --skip-bad-images.
    cfg.DATALOADER.SKIP_BAD_IMAGES = False

    # COCO-format folders to register, each [name, JSON file, folder of the images].
    cfg.DATASETS.COCO_FOLDERS = []
    # [category id in the JSON, name] by class index: what a prediction's class means.
    cfg.DATASETS.CATEGORIES = []
