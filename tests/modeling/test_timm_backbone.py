"""Backbones of timm: ten families, freezing, weights of files, input as the weights take it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import timm.layers
import torch
from detectron2.config import CfgNode, LazyCall, get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_model
from support.programs import ROOT
from torch import nn

import gn_det
from gn_det import InputError
from gn_det.config import load_config
from gn_det.config.constraints import check_complete_config
from gn_det.engine import trainer as engine
from gn_det.modeling import TimmBackbone, timm_backbone
from gn_det.modeling.timm_backbone import FrozenBatchNormAct2d, check_timm_input
from gn_det.modeling.timm_weights import write_converted

FAMILIES = {
    "ResNet": "resnet10t",
    "ResNet-D": "resnet18d",
    "RegNet": "regnetx_002",
    "EfficientNet-Lite": "tf_efficientnet_lite0",
    "MobileNetV3": "mobilenetv3_small_050",
    "ConvNeXt": "convnext_atto",
    "DLA": "dla46_c",
    "HRNet": "hrnet_w18_small",
    "DenseNet": "densenet121",
    "VoVNet": "ese_vovnet19b_slim_dw",
}
# What they are made of is in another family, too.
ALIKE = ("ResNet-D", "RegNet", "MobileNetV3", "DLA", "VoVNet")
of_every_family = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=family, marks=pytest.mark.slow if family in ALIKE else ())
        for family, name in FAMILIES.items()
    ],
)
BN = nn.modules.batchnorm._BatchNorm
PIXELS = ("pixel_mean", "pixel_std", "input_format")


def config(**keys: object) -> CfgNode:
    """A config with the keys of MODEL.TIMM, whose input is that of most models."""
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_fpn_backbone", 0
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    for key, value in keys.items():
        cfg.MODEL.TIMM[key] = value
    return cfg


# Without FPN, on the map of stride 16, with Detectron2's last stage of a ResNet behind the RoIs.
C4 = [
    "MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.OUT_INDICES", "[1, 2, 3]",
    "MODEL.ROI_HEADS.NAME", "Res5ROIHeads",
]  # fmt: skip


def build(name: str, cfg: CfgNode) -> nn.Module:
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))


@of_every_family
def test_maps_have_the_strides_and_channels_that_they_say(name: str) -> None:
    backbone = TimmBackbone(name).eval()
    shapes = backbone.output_shape()
    assert {key: shape.stride for key, shape in shapes.items()} == {
        "res2": 4,
        "res3": 8,
        "res4": 16,
        "res5": 32,
    }
    features = backbone(torch.rand(2, 3, 64, 96))
    for key, shape in shapes.items():
        assert features[key].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)


@of_every_family
def test_maps_are_those_of_the_model_itself(name: str) -> None:
    backbone = TimmBackbone(name).eval()
    theirs = timm.create_model(name, features_only=True, out_indices=backbone.body.feature_info
                               .out_indices).eval()  # fmt: skip
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    x = torch.rand(1, 3, 64, 64)
    for ours, wanted in zip(backbone(x).values(), theirs(x), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


@of_every_family
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_every_parameter_that_trains_gets_a_gradient(name: str, norm: str) -> None:
    backbone = TimmBackbone(name, norm=norm, freeze_at=1)
    sum(y.square().mean() for y in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    parameters = dict(backbone.named_parameters())
    trained = [key for key, parameter in parameters.items() if parameter.requires_grad]
    assert trained and len(trained) < len(parameters)
    assert not [key for key in trained if parameters[key].grad is None]
    has_bn = any(isinstance(module, BN) for module in backbone.modules())
    assert has_bn == (norm == "BN" and name != "convnext_atto")


@of_every_family
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_frozen_stages_are_those_that_lead_to_their_map(name: str, norm: str) -> None:
    if (name, norm) == ("convnext_atto", "GN"):
        return  # it has LayerNorm alone
    frozen = TimmBackbone(name, norm=norm, freeze_at=2)
    features = frozen(torch.rand(2, 3, 64, 64))
    # Each map of HRNet comes from its last stage.
    hrnet = name.startswith("hrnet")
    assert [y.requires_grad for y in features.values()] == [hrnet, True, True, True]
    fixed = [key for key, parameter in frozen.named_parameters() if not parameter.requires_grad]
    assert fixed
    for bn in (module for module in frozen.modules() if isinstance(module, BN)):
        assert all(parameter.requires_grad for parameter in bn.parameters())
    every = TimmBackbone(name, norm=norm, freeze_at=5)
    assert not any(parameter.requires_grad for parameter in every.parameters())
    assert not any(isinstance(module, BN) for module in every.modules())


@pytest.mark.parametrize(
    ("name", "freeze_at", "out_indices", "trains"),
    [
        ("resnet18", 2, [3], ["layer2", "layer3"]),
        ("resnet18", 5, [3], []),
        pytest.param("selecsls42", 4, (), ["head_0", "head_1"], marks=pytest.mark.slow),
        ("efficientvit_m0", 1, (), ["stages_0", "stages_1"]),
        # timm names their levels by what is no module, and their parts are not in order.
        ("twins_svt_small", 2, (), ["patch_embeds", "blocks", "pos_block"]),
        pytest.param("mvitv2_tiny", 3, (), ["stages"], marks=pytest.mark.slow),
    ],
)
def test_stages_are_frozen_where_the_model_ends_early_or_has_levels_without_modules(
    name: str, freeze_at: int, out_indices: list[int], trains: list[str]
) -> None:
    backbone = TimmBackbone(name, freeze_at=freeze_at, out_indices=out_indices)
    features = backbone(torch.rand(1, 3, 64, 64))
    assert {key: y.requires_grad for key, y in features.items()} == {
        key: shape.stride > 2**freeze_at for key, shape in backbone.output_shape().items()
    }
    found = {
        key.removeprefix("body.").removeprefix("model.").split(".")[0]
        for key, parameter in backbone.named_parameters()
        if parameter.requires_grad
    }
    assert found == set(trains)


@pytest.mark.parametrize(
    ("name", "freeze_at", "message"),
    [
        ("twins_svt_small", 1, "does not tell where this stage of twins_svt_small ends; set 0"),
        ("sequencer2d_s", 0, r"strides \[7, 14, 14, 14\], and none of 4, 8, 16, 32"),
        ("inception_v3", 0, "a map of 60x68 for a picture of 256x288, and .* 64x72 at stride 4"),
        ("levit_128s", 0, "does not take pictures of any size"),
    ],
)
def test_models_that_no_detector_can_take_are_refused(
    name: str, freeze_at: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TimmBackbone(name, freeze_at=freeze_at)


@pytest.mark.parametrize(
    "name",
    [
        "skresnet18",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("rexnet_100", "resnest14d", "nextvit_small")
        ),
    ],
)
def test_norms_of_gates_and_of_linear_layers_are_frozen_so_that_one_image_trains(name: str) -> None:
    backbone = TimmBackbone(name, norm="GN").train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    sum(y.mean() for y in backbone(torch.rand(1, 3, 64, 64)).values()).backward()
    assert before and all(torch.equal(b, before[key]) for key, b in backbone.named_buffers())


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 5)])
def test_frozen_bn_of_linear_layers_stays_as_it_is(shape: tuple[int, ...]) -> None:
    bn = nn.Sequential(nn.BatchNorm1d(8))
    bn[0].running_mean.normal_()
    nn.init.normal_(bn[0].weight)
    x = torch.randn(shape)
    expected = bn.eval()(x)
    timm_backbone._freeze_batch_norms(bn, bn.modules())
    torch.testing.assert_close(bn.train()(x), expected)
    assert not any(p.requires_grad for p in bn.parameters())
    before = bn[0].running_mean.clone()
    bn.train()(x)
    assert torch.equal(bn[0].running_mean, before)


def test_position_biases_are_those_of_weights_that_come_later() -> None:
    trained, built = (TimmBackbone("tiny_vit_5m_224") for _ in range(2))
    for key, parameter in trained.named_parameters():
        if "attention_biases" in key:
            nn.init.normal_(parameter)
    built.load_state_dict(trained.state_dict())
    x = torch.rand(1, 3, 64, 64)
    expected = trained.train(False)(x)
    for key, y in built.train(False)(x).items():
        torch.testing.assert_close(y, expected[key])


@of_every_family
def test_a_state_dict_goes_out_and_in(name: str) -> None:
    ours, theirs = TimmBackbone(name).eval(), TimmBackbone(name, norm="BN").eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "num_batches" not in k})
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(ours(x).values(), theirs(x).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@of_every_family
def test_a_file_of_the_classifier_is_what_the_backbone_starts_from(
    name: str, tmp_path: Path
) -> None:
    classifier = timm.create_model(name, num_classes=7).eval()
    for module in classifier.modules():
        if isinstance(module, BN):
            module.running_mean.normal_(0, 0.1)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(name, weights=str(tmp_path / "weights.pth")).eval()
    x = torch.rand(1, 3, 64, 64)
    wanted = classifier.forward_features(x)
    conv_head = name.startswith(("tf_efficientnet", "mobilenet", "hrnet"))
    # Their last map is before the head's convolutions; all but these are in the file.
    if not conv_head:
        last = backbone(x)["res5"]
        wanted = nn.functional.relu(wanted) if name.startswith("densenet") else wanted
        last = nn.functional.relu(last) if name.startswith("densenet") else last
        torch.testing.assert_close(last, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        next(backbone.parameters()).detach(), next(classifier.parameters()).detach()
    )


# timm gives their parts other names where they are backbones.
RENAMED = ("resnet10t", "ese_vovnet19b_slim_dw", "repvgg_a0", "resnetv2_18")


@pytest.mark.parametrize("name", RENAMED)
def test_a_file_of_the_body_is_what_the_backbone_starts_from(name: str, tmp_path: Path) -> None:
    source = TimmBackbone(name)
    for tensor in source.state_dict().values():
        tensor.normal_()
    torch.save(source.body.state_dict(), tmp_path / "body.pth")
    backbone = TimmBackbone(name, weights=str(tmp_path / "body.pth"))
    for key, tensor in source.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], tensor), key


def test_weights_that_lack_a_part_of_the_model_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({k: v for k, v in state.items() if "blocks.3" not in k}, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"it lacks \d+ of \d+ tensors \(blocks.3"):
        TimmBackbone("tf_efficientnet_lite0", weights=str(tmp_path / "part.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"no archive", "holds no weights that can be read"),
        ({}, "holds no weights"),
        ({"conv1.weight": torch.zeros(1)}, "timm cannot build resnet18"),
    ],
)
def test_files_without_the_weights_are_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(InputError, match=message):
        TimmBackbone("resnet18", weights=str(file))


@pytest.mark.parametrize(
    ("file_of", "name"),
    [
        ("resnet34", "resnet18"),
        ("seresnet33ts", "resnet33ts"),
        ("tf_efficientnet_lite1", "tf_efficientnet_lite0"),
    ],
)
def test_weights_of_a_larger_relative_are_refused(file_of: str, name: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(file_of).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"tensors have no place in it .*of another model\?"):
        TimmBackbone(name, weights=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "body.", "module.", "encoder."])
@pytest.mark.parametrize("name", ["resnet18", "hrnet_w18_small"])
def test_a_name_before_all_names_is_no_matter(name: str, prefix: str, tmp_path: Path) -> None:
    state = timm.create_model(name, num_classes=3).state_dict()
    held = {prefix + key: value for key, value in state.items()}
    torch.save({"state_dict": {**held, "loss.weight": torch.ones(3)}}, tmp_path / "x.pth")
    body = TimmBackbone(name, weights=str(tmp_path / "x.pth")).body
    assert torch.equal(body.conv1.weight, state["conv1.weight"])


def test_numbers_that_are_none_are_told(tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    state["layer4.1.conv2.weight"][0] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"1 of \d+ tensors have infinite or no .*layer4.1.conv2"):
        TimmBackbone("resnet18", weights=str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("GN", {"num_groups": 1}, None),
        ("GN", {"num_groups": 32}, "was converted for GN of .*'num_groups': 1,.* says .*: 32"),
        ("GN", {}, "says .*'num_groups': 32"),
        ("GN", {"channels_per_group": 4}, "says .*'channels_per_group': 4"),
        ("GN", {"num_groups": 1, "hand_over": True}, "a hand-over begins with BN"),
        ("FrozenBN", {}, None),
    ],
)
def test_weights_of_a_conversion_are_of_the_gn_that_the_class_is_given(
    norm: str, options: dict, message: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "x.pth"
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.MODEL.GN.NUM_GROUPS = 1
    write_converted(file, timm.create_model("resnet10t").state_dict(), cfg)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        TimmBackbone("resnet10t", weights=str(file), norm=norm, **options)


def test_a_stage_below_the_stem_is_none() -> None:
    backbone = TimmBackbone("resnet10t", freeze_at=-1)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_transformers_take_pictures_of_other_sizes(name: str) -> None:
    backbone = TimmBackbone(name, out_indices=[3]).eval()
    ((key, shape),) = backbone.output_shape().items()
    y = backbone(torch.rand(1, 3, 64, 96))[key]
    assert y.shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)


class TestFrozen:
    def test_bn_keeps_its_activation_and_its_numbers(self) -> None:
        norms = []
        for norm in ("BN", "FrozenBN"):
            torch.manual_seed(0)
            backbone = TimmBackbone("tf_efficientnet_lite0", norm=norm)
            norms.append(backbone.body.bn1)
        bn, frozen = norms
        assert type(frozen) is FrozenBatchNormAct2d and frozen.eps == bn.eps == 1e-3
        for norm in norms:
            norm.running_mean.copy_(torch.linspace(-1, 1, 32))
            norm.running_var.copy_(torch.linspace(0.5, 2, 32))
        x = torch.randn(2, 32, 8, 8, requires_grad=True) * 5
        torch.testing.assert_close(frozen.train()(x), bn.eval()(x))
        assert frozen(x).max() == 6  # of its ReLU6

    @pytest.mark.parametrize(
        "frozen",
        [
            lambda model: timm.layers.freeze_batch_norm_2d(model),
            lambda model: TimmBackbone("regnetx_002"),
        ],
        ids=["timm's", "ours"],
    )
    def test_inject_convert_and_audit_know_it(self, frozen: object) -> None:
        model = frozen(timm.create_model("regnetx_002", features_only=True))
        audit = str(gn_det.audit(model))
        assert "FrozenBatchNormAct2d; inject replaces it" in audit
        result = gn_det.convert_bn(model, [torch.rand(2, 3, 64, 64)])
        assert not result.not_reached
        kinds = {type(module).__name__ for module in model.modules()}
        assert not [kind for kind in kinds if "BatchNorm" in kind]

    def test_injected_norms_of_frozen_stages_do_not_train(self) -> None:
        # Of DenseNet, norms come before their convolutions; of ResNet-D, behind a sequence.
        for name in ("densenet121", "resnet18d"):
            backbone = gn_det.inject(TimmBackbone(name, freeze_at=2), "backbone")
            assert not backbone(torch.rand(1, 3, 64, 64))["res2"].requires_grad
            assert gn_det.audit(backbone).rows[0].site == "backbone"


class TestConfig:
    def test_fpn_takes_the_levels_that_there_are(self) -> None:
        fpn = build("build_timm_fpn_backbone", config(NAME="resnet18"))
        assert list(fpn(torch.rand(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6"]

    def test_retinanets_pyramid_ends_in_p7(self) -> None:
        cfg = config(NAME="resnet18")
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        fpn = build("build_timm_retinanet_fpn_backbone", cfg)
        assert list(fpn(torch.rand(1, 3, 128, 128))) == ["p3", "p4", "p5", "p6", "p7"]

    def test_plain_backbone_gives_the_maps_that_are_asked_for(self) -> None:
        backbone = build("build_timm_backbone", config(NAME="resnet18", OUT_INDICES=[3]))
        assert {k: s.stride for k, s in backbone.output_shape().items()} == {"res4": 16}
        # layer4 is not there, so that nothing waits for its gradient.
        assert not any("layer4" in key for key, _ in backbone.named_parameters())

    def test_gn_by_the_key_and_by_the_meta_architecture(self) -> None:
        cfg = config(NAME="resnet18", NORM="GN")
        sites = {row.site for row in gn_det.audit(build("build_timm_fpn_backbone", cfg)).rows}
        assert sites == {"backbone", "fpn"}
        cfg.MODEL.TIMM.NORM = "FrozenBN"
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "GNRetinaNet", "cpu"
        cfg.MODEL.BACKBONE.NAME = "build_timm_retinanet_fpn_backbone"
        cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
        model = build_model(cfg)
        assert {row.site for row in gn_det.audit(model).rows} == {"backbone", "fpn", "dense_head"}
        assert not any(isinstance(module, (BN, FrozenBatchNorm2d)) for module in model.modules())

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("INPUT.FORMAT", "BGR"),
            ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
            ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
            ("MODEL.PIXEL_MEAN", [0.485, 0.456, 0.406]),
            ("MODEL.PIXEL_STD", [57.375, 57.12, 58.395]),
        ],
    )
    def test_another_input_than_that_of_the_weights_is_refused(
        self, key: str, value: object
    ) -> None:
        cfg = config(NAME="resnet18")
        cfg.merge_from_list([key, value])
        with pytest.raises(InputError, match=r"RGB, MODEL.PIXEL_MEAN \[123.675, 116.28, 103.53\]"):
            build("build_timm_fpn_backbone", cfg)

    @pytest.mark.parametrize(
        ("mean", "std", "advice"),
        [
            ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "for pixels from 0 to 1"),
            ([128.0], [64.0], "takes pictures of 3 channels"),
            ([127.5] * 3, [127.5] * 3, "local-dir:FOLDER"),
        ],
    )
    def test_what_to_do_about_another_input_is_told(
        self, mean: list[float], std: list[float], advice: str
    ) -> None:
        cfg = config(NAME="resnet10t")
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = mean, std
        with pytest.raises(InputError, match=advice):
            build("build_timm_fpn_backbone", cfg)

    def test_detectron2s_own_weights_do_not_take_the_place_of_timms(self) -> None:
        cfg = config(NAME="resnet10t", WEIGHTS="mine.pth")
        cfg.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
        with pytest.raises(InputError, match=r"takes the place of MODEL.TIMM.WEIGHTS 'mine.pth'"):
            build("build_timm_fpn_backbone", cfg)

    def test_a_config_that_says_no_input_gets_timms(self) -> None:
        keys = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME"]
        cfg = load_config(None, [*keys, "tf_efficientnet_lite0"])
        assert cfg.INPUT.FORMAT == "RGB"
        assert cfg.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_STD == [127.5] * 3
        said = load_config(None, [*keys, "resnet18", "INPUT.FORMAT", "BGR"])
        assert said.INPUT.FORMAT == "BGR" and said.MODEL.PIXEL_MEAN[0] == 123.675
        assert load_config(None).MODEL.PIXEL_MEAN == get_cfg().MODEL.PIXEL_MEAN
        assert load_config(None).INPUT.FORMAT == "BGR"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("resnet5o", "did you mean resnet50"),
            ("tf_eficientnet_lite0", "did you mean tf_efficientnet_lite0"),
            ("resnet18.a1_in1", "did you mean resnet18.a1_in1k"),
        ],
    )
    def test_an_unknown_name_gets_the_nearest(self, name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_config(None, ["MODEL.TIMM.NAME", name])
        with pytest.raises(InputError, match=message):
            TimmBackbone(name)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"OUT_INDICES": [7]}, "has 5 feature maps, 0 to 4"),
            ({"OUT_INDICES": [1, 1]}, "have strides"),
            ({"NORM": "LN"}, "not FrozenBN, BN or GN"),
            ({"NAME": ""}, "needs the name of a model in MODEL.TIMM.NAME"),
            ({"NAME": "local-dir:/nowhere"}, "timm cannot build it"),
        ],
    )
    def test_keys_that_cannot_work_are_refused(self, keys: dict, message: str) -> None:
        with pytest.raises(InputError, match=message):
            build("build_timm_backbone", config(**{"NAME": "resnet18", **keys}))

    def test_levels_that_are_not_there_are_refused(self) -> None:
        cfg = config(NAME="resnet18", OUT_INDICES=[2, 3, 4])
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
        with pytest.raises(InputError, match=r"has res2, and resnet18 gives res3 \(stride 8\)"):
            build("build_timm_fpn_backbone", cfg)

    @pytest.mark.parametrize(
        "builder", ["build_timm_fpn_backbone", "build_timm_retinanet_fpn_backbone"]
    )
    @pytest.mark.parametrize("indices", [[1, 2, 3], [2], [1, 2, 3, 4]])
    def test_the_levels_behind_the_last_map_come_from_it(
        self, builder: str, indices: list[int]
    ) -> None:
        cfg = config(NAME="resnet18", OUT_INDICES=indices)
        cfg.MODEL.FPN.IN_FEATURES = [f"res{i + 1}" for i in indices]
        fpn = build(builder, cfg)
        last = indices[-1] + 1
        more = 2 if "retinanet" in builder else 1
        levels = range(indices[0] + 1, last + more + 1)
        strides = {f"p{level}": 2**level for level in levels}
        assert {k: shape.stride for k, shape in fpn.output_shape().items()} == strides
        features = fpn(torch.rand(1, 3, 128, 128))
        assert {k: 128 // f.shape[-1] for k, f in features.items()} == strides
        if more == 1:
            assert torch.equal(features[f"p{last + 1}"], features[f"p{last}"][:, :, ::2, ::2])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                ["MODEL.FPN.IN_FEATURES", "['res2', 'res3']"],
                r"gives res2, .*, res5, and MODEL.FPN.IN_FEATURES ends at res3: .* to \[1, 2\]",
            ),
            (
                [*C4, "MODEL.TIMM.OUT_INDICES", "[]"],
                r"ROI_HEADS.IN_FEATURES end at res4: .* to \[1, 2, 3\]",
            ),
            (C4, r"takes 1024 channels .*, and res4 of resnet18 has 256: .*CHANNELS to 64"),
        ],
    )
    def test_maps_that_nothing_reads_or_that_the_heads_cannot_take_are_refused(
        self, settings: list, message: str
    ) -> None:
        cfg = config(NAME="resnet18")
        cfg.merge_from_list(settings)
        with pytest.raises(InputError, match=message):
            build(cfg.MODEL.BACKBONE.NAME, cfg)

    def test_a_res5_head_takes_the_channels_that_it_is_told(self) -> None:
        cfg = config(NAME="resnet18")
        cfg.merge_from_list([*C4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.DEVICE", "cpu"])
        check_complete_config(cfg)
        model = build_model(cfg).eval()
        with torch.no_grad():
            model([{"image": torch.zeros(3, 64, 64)}])

    @pytest.mark.parametrize("freeze_at", [6, 99, 2.5])
    def test_stages_that_are_not_there_cannot_be_frozen(self, freeze_at: float) -> None:
        with pytest.raises(InputError, match=rf"FREEZE_AT .* is {freeze_at}, and has to be"):
            TimmBackbone("resnet18", freeze_at=freeze_at)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["MODEL.RESNETS.NORM", "GN"], "MODEL.RESNETS.NORM 'GN' changes nothing in a backbone"),
            (["MODEL.RESNETS.DEPTH", "101"], "DEPTH 101 changes nothing"),
            (
                ["MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.RESNETS.STRIDE_IN_1X1", "False"],
                "WIDTH_PER_GROUP 8, MODEL.RESNETS.STRIDE_IN_1X1 False change nothing",
            ),
            (["MODEL.RESNETS.OUT_FEATURES", "['res3']"], ""),
            ([*C4, "MODEL.RESNETS.NORM", "GN"], ""),  # of the res5 head
        ],
    )
    def test_keys_of_resnets_that_change_nothing_are_refused(
        self, settings: list[str], message: str
    ) -> None:
        cfg = config(NAME="resnet18")
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.merge_from_list(settings)
        with pytest.raises(InputError, match=message) if message else nullcontext():
            check_complete_config(cfg)

    def test_name_of_backbone_and_of_model_go_together(self) -> None:
        cfg = config(NAME="resnet18")
        check_complete_config(cfg)
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        with pytest.raises(InputError, match="go with a model of timm"):
            check_complete_config(cfg)

    def test_lazy_config_builds_the_class(self) -> None:
        lazy = LazyCall(FPN)(
            bottom_up=LazyCall(TimmBackbone)(name="resnet18", freeze_at=2),
            in_features=["res3", "res4", "res5"],
            out_channels=16,
        )
        fpn = instantiate(lazy)
        assert list(fpn(torch.rand(1, 3, 64, 64))) == ["p3", "p4", "p5"]

    @pytest.mark.parametrize(
        ("change", "weights", "fits"),
        [
            ({}, True, True),
            ({"input_format": "BGR"}, True, False),
            ({"pixel_std": [1.0, 1.0, 1.0]}, True, False),
            # Detectron2's, for a random start.
            (dict(zip(PIXELS, ([103.53, 116.28, 123.675], [1.0] * 3, "BGR"), strict=True)),
             False, True),
            (dict(zip(PIXELS, ([103.53, 116.28, 123.675], [1.0] * 3, "BGR"), strict=True)),
             True, False),
        ],
    )  # fmt: skip
    def test_a_model_of_a_lazy_config_has_the_input_of_timms_weights(
        self, change: dict, weights: bool, fits: bool
    ) -> None:
        values = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], "RGB")
        mean, std, colours = {**dict(zip(PIXELS, values, strict=True)), **change}.values()
        model = nn.Sequential(TimmBackbone("resnet10t", out_indices=[2]))
        model.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        model.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))
        model.input_format = colours
        with nullcontext() if fits else pytest.raises(InputError, match="of a LazyConfig"):
            check_timm_input(model, starts_from_weights=weights)


def test_a_model_that_a_checkpoint_fills_does_not_need_the_file_of_timm(tmp_path: Path) -> None:
    cfg = load_config(
        ROOT / "configs/timm/mask_rcnn_effnet_lite0_FPN.yaml",
        ["MODEL.TIMM.WEIGHTS", str(tmp_path / "gone.pth"), "MODEL.DEVICE", "cpu"],
    )
    with pytest.raises(InputError, match="no such file"):
        engine.build_model(cfg)
    engine.build_model(cfg, weights_follow=True)
    assert cfg.MODEL.TIMM.WEIGHTS == str(tmp_path / "gone.pth")
