"""configs/mmdet, read by mmengine, with stand-ins for mmdetection's base configs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from support.programs import ROOT
from torch import nn

FOLDER = ROOT / "configs/mmdet"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.py"))
BASES = {
    "models/mask-rcnn_r50_fpn.py": """
model = dict(
    type="MaskRCNN",
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
                           bgr_to_rgb=True, pad_mask=True),
    backbone=dict(type="ResNet", depth=50, norm_cfg=dict(type="BN", requires_grad=True),
                  norm_eval=True, style="pytorch",
                  init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50")),
    neck=dict(type="FPN", out_channels=256),
    roi_head=dict(bbox_head=dict(type="Shared2FCBBoxHead", fc_out_channels=1024),
                  mask_head=dict(type="FCNMaskHead", num_convs=4)),
)
""",
    "datasets/coco_instance.py": "train_dataloader = dict(batch_size=2, num_workers=2)\n",
    "schedules/schedule_2x.py": """
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=24)
optim_wrapper = dict(type="OptimWrapper",
                     optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4))
auto_scale_lr = dict(enable=False, base_batch_size=16)
param_scheduler = [dict(type="LinearLR", by_epoch=False, begin=0, end=500)]
""",
    "default_runtime.py": "default_scope = 'mmdet'\n",
}


@pytest.fixture(autouse=True, scope="module")
def mmdetection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("packages")
    package = folder / "mmdet"
    for name, text in BASES.items():
        file = package / ".mim/configs/_base_" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (package / ".mim/model-index.yml").write_text("Import: []\n")
    (package / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    sys.modules.pop("mmdet", None)  # mmengine imports the scope's package


def read(name: str) -> Config:
    return Config.fromfile(FOLDER / name, import_custom_modules=False)


def norm_of(part: Config) -> str | None:
    return part.norm_cfg.type if "norm_cfg" in part else None


def test_each_variant_has_a_config_for_1_and_for_2_images() -> None:
    expected = {
        f"mask-rcnn_r50_fpn_{variant}{images}_2x_coco.py"
        for variant in ("gn", "gn-heads", "frozenbn", "gn-ws")
        for images in ("", "_1img")
    }
    assert set(CONFIGS) == expected
    listed = re.findall(r"\]\((mask-rcnn[^)]+)\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_all_differ_in_norms_and_weights_alone(name: str) -> None:
    config = read(name)
    model = config.model
    variant = re.search(r"fpn_(.+?)(_1img)?_2x", name)[1]
    assert config.train_dataloader.batch_size == (1 if "1img" in name else 2)
    assert config.train_dataloader.num_workers == 2
    assert config.auto_scale_lr == dict(enable=True, base_batch_size=16)
    assert config.optim_wrapper.type == "AmpOptimWrapper"
    assert config.optim_wrapper.optimizer.lr == 0.02

    heads = [model.neck, model.roi_head.bbox_head, model.roi_head.mask_head]
    of_heads = None if variant == "frozenbn" else "GN"
    assert [norm_of(part) for part in heads] == [of_heads] * 3
    of_backbone = "GN" if variant in ("gn", "gn-ws") else "BN"
    assert norm_of(model.backbone) == of_backbone
    assert model.backbone.norm_cfg.requires_grad is (of_backbone == "GN")
    assert model.roi_head.bbox_head.type == "Shared4Conv1FCBBoxHead"

    if variant == "frozenbn":
        assert model.type == "MaskRCNN" and "custom_imports" not in config
    else:
        assert (model.type, model.model, model.sites) == ("InjectGN", "MaskRCNN", "GN")
        assert config.custom_imports["imports"] == ["gn_det.mmcv_plugin"]
    parts = [model.backbone, *heads]
    assert all(("conv_cfg" in part) == (variant == "gn-ws") for part in parts)
    rgb = variant == "gn-ws"
    assert model.data_preprocessor.bgr_to_rgb is rgb
    assert (model.data_preprocessor.std == [1.0, 1.0, 1.0]) is not rgb
    assert model.data_preprocessor.pad_mask


@pytest.mark.parametrize("name", CONFIGS)
def test_gamma_and_beta_do_not_decay(name: str) -> None:
    model = nn.Sequential(ConvModule(3, 64, 1, norm_cfg=dict(type="GN", num_groups=32)))
    settings = read(name).optim_wrapper
    settings.type = "OptimWrapper"  # that of AMP wants a GPU
    settings.pop("loss_scale")
    wrapper = build_optim_wrapper(model, settings)
    decays = {p: group["weight_decay"] for group in wrapper.param_groups for p in group["params"]}
    assert [decays[p] for p in model.parameters()] == [1e-4, 0.0, 0.0]


@pytest.mark.parametrize(("images", "steps"), [(1, 8000), (2, 4000), (16, 500)])
def test_the_warm_up_takes_as_many_images_as_mmdetections(images: int, steps: int) -> None:
    model = nn.Linear(1, 1)
    optimizer = build_optim_wrapper(model, dict(optimizer=dict(type="SGD", lr=0.02)))
    settings = dict(read(CONFIGS[0]).param_scheduler[0])
    settings.pop("convert_to_iter_based")
    scheduler = PARAM_SCHEDULERS.get(settings.pop("type")).build_iter_from_epoch(
        optimizer, epoch_length=-(-117266 // images), **settings
    )
    assert scheduler.end == pytest.approx(steps, abs=1)
