"""Parts of classes that nobody knows get the site that they are, and norms where they may have one.

The stand-ins have the structure of public projects' modules, and none of their code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import Tensor, nn

from gn_det import FusedGroupNorm, InputError, audit, inject

C = 32


def model(**parts: nn.Module) -> nn.Module:
    """A detector with these parts at attributes; ``__`` is a dot."""
    detector = nn.Module()
    for path, part in parts.items():
        *above, name = path.split("__")
        owner = detector
        for each in above:
            if not hasattr(owner, each):
                setattr(owner, each, nn.Module())
            owner = getattr(owner, each)
        setattr(owner, name, part)
    return detector


def conv3(channels: int = C, kind: type = nn.Conv2d, **options: object) -> nn.Module:
    return kind(C, channels, 3, padding=1, **options)


class ConvModule(nn.Module):
    """mmcv's: convolution, norm, activation, of which the norm may be missing."""

    order = ("conv", "norm", "act")

    def __init__(self, channels: int = C, norm: str | None = None, act: bool = True) -> None:
        super().__init__()
        self.conv = conv3(channels, bias=norm is None)
        self.out_channels = channels
        self.with_norm, self.with_activation = norm is not None, act
        self.norm_name = norm
        if norm:
            self.add_module(norm, nn.BatchNorm2d(channels))
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self, self.norm_name) if self.norm_name else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x) if self.with_norm else x
        return self.activate(x) if self.with_activation else x


class Neck(nn.Module):
    """mmdetection's FPN, with a level above the last lateral."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList([ConvModule(act=False) for _ in range(2)])
        self.fpn_convs = nn.ModuleList([ConvModule(act=False) for _ in range(3)])


class HighResolution(nn.Module):
    """DensePose's HRFPN, which hangs where the backbone does and holds that."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom_up = nn.Sequential(conv3(), nn.BatchNorm2d(C))
        self.reduction_conv = Conv2d(2 * C, C, 1)
        self.fpn_conv = nn.ModuleList([Conv2d(C, C, 3, padding=1) for _ in range(3)])


HighResolution.__name__ = "HRFPN"


class TopBlock(nn.Module):
    """LastLevelP6P7 as AdelaiDet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.p6, self.p7 = conv3(stride=2), conv3(stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        p6 = self.p6(x)
        return [p6, self.p7(F.relu(p6))]


class Proposals(nn.Module):
    """mmdetection's RPN head."""

    def __init__(self) -> None:
        super().__init__()
        self.rpn_conv = conv3()
        self.rpn_cls, self.rpn_reg = nn.Conv2d(C, 3, 1), nn.Conv2d(C, 12, 1)

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.rpn_conv(x))
        return self.rpn_cls(x), self.rpn_reg(x)


class OldProposals(StandardRPNHead):
    """Detectron2's up to 0.4, whose convolution is PyTorch's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.conv = conv3()
        self.objectness_logits, self.anchor_deltas = nn.Conv2d(C, 3, 1), nn.Conv2d(C, 12, 1)


class Boxes(nn.Module):
    """mmdetection's box head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_convs = nn.ModuleList([ConvModule() for _ in range(2)])
        self.shared_fcs = nn.ModuleList([nn.Linear(C * 49, 64)])
        self.fc_cls, self.fc_reg = nn.Linear(64, 5), nn.Linear(64, 16)


class Masks(nn.Module):
    """mmdetection's mask head."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvModule() for _ in range(4)])
        self.upsample = nn.ConvTranspose2d(C, C, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.conv_logits = nn.Conv2d(C, 4, 1)


class SpatialAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.stack([x.mean(1), x.amax(1)], 1)
        return x * self.conv(maps).sigmoid()


class SpatialAttentionMaskHead(nn.Module):
    """CenterMask2's: Detectron2's convolutions with an empty place for a norm, and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        for n in range(1, 5):
            setattr(self, f"mask_fcn{n}", conv3(kind=Conv2d, activation=F.relu))
        self.spatialAtt = SpatialAttention()
        self.deconv = nn.ConvTranspose2d(C, C, 2, stride=2)
        self.predictor = Conv2d(C, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for n in range(1, 5):
            x = getattr(self, f"mask_fcn{n}")(x)
        return self.predictor(F.relu(self.deconv(self.spatialAtt(x))))


class MaskIoU(nn.Module):
    """CenterMask2's MaskIoU head."""

    def __init__(self) -> None:
        super().__init__()
        for n in range(1, 5):
            setattr(self, f"maskiou_fcn{n}", conv3(kind=Conv2d, activation=F.relu))
        self.maskiou_fc1, self.maskiou = nn.Linear(C * 49, 64), nn.Linear(64, 4)


class Dense(nn.Module):
    """mmdetection's dense heads: two towers of ConvModules."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList([ConvModule() for _ in range(2)])
        self.reg_convs = nn.ModuleList([ConvModule() for _ in range(2)])
        self.retina_cls, self.retina_reg = conv3(9), conv3(12)


class Towers(nn.Module):
    """AdelaiDet's FCOS head without norms; its controller makes another module's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_tower = nn.Sequential(conv3(), nn.ReLU(), conv3(), nn.ReLU())
        self.bbox_tower = nn.Sequential(conv3(), nn.ReLU(), conv3(), nn.ReLU())
        self.share_tower = nn.Sequential()
        self.cls_logits, self.bbox_pred, self.ctrness = conv3(9), conv3(4), conv3(1)
        self.controller = nn.Sequential(conv3(), nn.ReLU(), conv3(169))

    def forward(self, x: Tensor) -> list[Tensor]:
        classes = self.cls_tower(x)
        boxes = self.bbox_tower(x)
        return [self.cls_logits(classes), F.relu(self.bbox_pred(boxes)), self.ctrness(boxes)]


class Surfaces(nn.Module):
    """DensePose's head of eight convolutions, whose predictor is another module."""

    def __init__(self) -> None:
        super().__init__()
        for n in range(1, 9):
            setattr(self, f"body_conv_fcn{n}", conv3(kind=Conv2d))

    def forward(self, x: Tensor) -> Tensor:
        for n in range(1, 9):
            x = F.relu(getattr(self, f"body_conv_fcn{n}")(x))
        return x


class SurfacePredictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("ann_index", "index_uv", "u", "v"):
            setattr(self, f"{name}_lowres", nn.ConvTranspose2d(C, 25, 4, stride=2, padding=1))


class Decoder(nn.Module):
    """DensePose's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_heads = []
        for level in ("p2", "p3"):
            scale = nn.Sequential(
                conv3(kind=Conv2d, activation=F.relu), nn.Upsample(scale_factor=2)
            )
            setattr(self, level, scale)
            self.scale_heads.append(scale)
        self.predictor = Conv2d(C, C, 1)


class Pixels(nn.Module):
    """Mask2Former's pixel decoder with NORM ""."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter_1 = Conv2d(C, C, 1, norm=get_norm("", C))
        self.layer_1 = conv3(kind=Conv2d, norm=get_norm("", C), activation=F.relu)
        self.mask_features = conv3(kind=Conv2d)


class Stage(nn.Module):
    """A stage of a backbone with BN beside the convolutions, as VoVNet, DLA and detrex have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(bias=False), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class Gated(nn.Module):
    """A dense head with task attention and a deformable convolution's offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked_convs = nn.ModuleList([ConvModule()])
        self.layer_attention = nn.Sequential(
            nn.Conv2d(C, 16, 1), nn.ReLU(), nn.Conv2d(16, C, 1), nn.Sigmoid()
        )
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, 16, 1), nn.ReLU(), nn.Conv2d(16, C, 1)
        )
        self.conv_offset = nn.Sequential(conv3(), nn.ReLU(), conv3(18))
        self.tood_cls = conv3(9)


def fcn(n: int, stem: str) -> list[str]:
    return [f"{stem}{k}.norm" for k in range(1, n + 1)]


# Names of the norms that "ALL" gives a model, by site.
TABLE: dict[str, tuple[Callable[[], nn.Module], dict[str, list[str]]]] = {
    "mmdetection's neck": (
        lambda: model(neck=Neck()),
        {
            "fpn": [f"neck.lateral_convs.{n}.gn" for n in range(2)]
            + [f"neck.fpn_convs.{n}.gn" for n in range(2)],
            "fpn.top_block": ["neck.fpn_convs.2.gn"],
        },
    ),
    "HRFPN": (
        lambda: model(backbone=HighResolution()),
        {
            "backbone": ["backbone.bottom_up.1"],
            "fpn": [
                "backbone.reduction_conv.norm", *(f"backbone.fpn_conv.{n}.norm" for n in range(3))
            ],
        },
    ),
    "top block": (
        lambda: model(backbone__top_block=TopBlock()),
        {"fpn.top_block": ["backbone.top_block.p6.norm", "backbone.top_block.p7.norm"]},
    ),
    "mmdetection's RPN": (
        lambda: model(rpn_head=Proposals()), {"rpn": ["rpn_head.rpn_conv.norm"]}
    ),
    "Detectron2 0.4's RPN": (
        lambda: model(proposal_generator__rpn_head=OldProposals()),
        {"rpn": ["proposal_generator.rpn_head.conv.norm"]},
    ),
    "mmdetection's box head": (
        lambda: model(roi_head__bbox_head=Boxes()),
        {"box_head": [f"roi_head.bbox_head.shared_convs.{n}.gn" for n in range(2)]},
    ),
    "mmdetection's cascade": (
        lambda: model(roi_head__bbox_head=nn.ModuleList([Boxes(), Boxes()])),
        {
            "box_head": [
                f"roi_head.bbox_head.{stage}.shared_convs.{n}.gn"
                for stage in range(2)
                for n in range(2)
            ]
        },
    ),
    "mmdetection's mask head": (
        lambda: model(roi_head__mask_head=Masks()),
        {
            "mask_head": [f"roi_head.mask_head.convs.{n}.gn" for n in range(4)],
            "mask_head.deconv": ["roi_head.mask_head.upsample.norm"],
        },
    ),
    "CenterMask2's mask head": (
        lambda: model(roi_heads__mask_head=SpatialAttentionMaskHead()),
        {
            "mask_head": fcn(4, "roi_heads.mask_head.mask_fcn"),
            "mask_head.deconv": ["roi_heads.mask_head.deconv.norm"],
        },
    ),
    "CenterMask2's mask head alone": (
        SpatialAttentionMaskHead,
        {"mask_head": fcn(4, "mask_fcn"), "mask_head.deconv": ["deconv.norm"]},
    ),
    "MaskIoU": (
        lambda: model(roi_heads__maskiou_head=MaskIoU()),
        {"mask_head": fcn(4, "roi_heads.maskiou_head.maskiou_fcn")},
    ),
    "mmdetection's dense head": (
        lambda: model(bbox_head=Dense()),
        {
            "dense_head": [
                f"bbox_head.{tower}_convs.{n}.gn" for tower in ("cls", "reg") for n in range(2)
            ]
        },
    ),
    "FCOS": (
        lambda: model(proposal_generator__fcos_head=Towers()),
        {
            "dense_head": [
                f"proposal_generator.fcos_head.{tower}_tower.{n}"
                for tower in ("cls", "bbox")
                for n in (1, 4)
            ]
        },
    ),
    "DensePose": (
        lambda: model(
            roi_heads__densepose_head=Surfaces(),
            roi_heads__densepose_predictor=SurfacePredictor(),
            roi_heads__decoder=Decoder(),
        ),
        {
            "keypoint_head": [
                *fcn(8, "roi_heads.densepose_head.body_conv_fcn"),
                "roi_heads.decoder.p2.0.norm", "roi_heads.decoder.p3.0.norm",
            ]
        },
    ),
    "Mask2Former": (
        lambda: model(sem_seg_head__pixel_decoder=Pixels()),
        {
            "sem_seg_head": [
                f"sem_seg_head.pixel_decoder.{name}_1.norm" for name in ("adapter", "layer")
            ]
        },
    ),
    "a backbone with BN": (
        lambda: model(backbone__bottom_up=nn.Sequential(Stage(), Stage())),
        {"backbone": ["backbone.bottom_up.0.bn1", "backbone.bottom_up.1.bn1"]},
    ),
    "a head with attention": (
        lambda: model(bbox_head=Gated()), {"dense_head": ["bbox_head.stacked_convs.0.gn"]}
    ),
}  # fmt: skip


def placed(detector: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in audit(detector).rows:
        found.setdefault(row.site, []).extend(row.modules)
    return {site: sorted(names) for site, names in found.items()}


@pytest.mark.parametrize("project", TABLE)
def test_all_reaches_what_may_have_a_norm_and_nothing_else(project: str) -> None:
    build, expected = TABLE[project]
    detector = inject(build(), "ALL")
    assert placed(detector) == {site: sorted(names) for site, names in expected.items()}
    assert placed(inject(detector, "ALL")) == placed(detector)  # and never twice


@pytest.mark.parametrize("project", TABLE)
def test_each_site_can_be_named_alone(project: str) -> None:
    build, expected = TABLE[project]
    for site, names in expected.items():
        assert placed(inject(build(), site)) == {site: sorted(names)}


@pytest.mark.parametrize("project", TABLE)
def test_every_convolution_is_in_the_audit_before_and_after(project: str) -> None:
    detector = TABLE[project][0]()
    convs = {name for name, m in detector.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    for change in (lambda m: m, lambda m: inject(m, "ALL")):
        found = audit(change(detector))
        listed = {name for left in found.left_alone for name in left.modules}
        names = [name for row in found.rows for name in row.modules]
        behind = {conv for conv in convs if any(_stands_behind(n, conv, detector) for n in names)}
        now = {n for n, m in detector.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
        assert now - behind - _before_norms(detector) <= listed
        assert all(left.reason for left in found.left_alone)
        convs = now


def _stands_behind(norm: str, conv: str, detector: nn.Module) -> bool:
    return norm == f"{conv}.norm" or norm == f"{conv.removesuffix('.conv')}.gn"


def _before_norms(detector: nn.Module) -> set[str]:
    """Convolutions whose next sibling is a norm."""
    found = set()
    for name, parent in detector.named_modules():
        children = [*parent.named_children()]
        for (own, _), (_, then) in pairwise(children):
            if isinstance(then, (nn.BatchNorm2d, nn.GroupNorm)):
                found.add(f"{name}.{own}".lstrip("."))
    return found


@pytest.mark.parametrize("build", [Towers, SpatialAttentionMaskHead, TopBlock, Surfaces])
def test_what_gained_norms_computes_and_trains_them(build: Callable[[], nn.Module]) -> None:
    part = build()
    where = {Surfaces: "densepose_head", TopBlock: "top_block"}.get(build, "mask_head")
    inject(model(**{where: part}), "ALL")
    outputs = part(torch.randn(2, C, 8, 8))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(y.square().sum() for y in outputs).backward()
    norms = [m for m in part.modules() if isinstance(m, FusedGroupNorm)]
    assert norms and all(n.weight.grad.abs().sum() > 0 for n in norms)


def test_a_conv_module_gets_the_keys_of_a_config_with_gn() -> None:
    ours, theirs = inject(model(neck=nn.Sequential(ConvModule())), "ALL"), ConvModule(norm="gn")
    keys = [key.removeprefix("neck.0.") for key in ours.state_dict()]
    assert keys == [k for k in theirs.state_dict() if "running" not in k and "tracked" not in k]
    x = torch.randn(1, C, 4, 4)
    conv, norm = ours.neck[0].conv, ours.neck[0].gn
    torch.testing.assert_close(ours.neck[0](x), F.relu(norm(conv(x))))


def test_a_tower_that_two_heads_share_is_normalized_once() -> None:
    tower = nn.Sequential(conv3(), nn.ReLU())
    detector = model(head=nn.ModuleDict({"cls_tower": tower, "bbox_tower": tower}))
    inject(detector, "ALL")
    assert len(detector.head.cls_tower) == 3 and detector.head.bbox_tower is tower


def test_a_convolution_that_two_towers_share_is_left_and_told() -> None:
    shared = conv3()
    towers = {name: nn.Sequential(shared, nn.ReLU(), conv3(), nn.ReLU()) for name in ("a", "b")}
    detector = inject(model(head=nn.ModuleDict(towers)), "ALL")
    assert sum(isinstance(m, FusedGroupNorm) for m in detector.modules()) == 2
    (left,) = audit(detector).left_alone
    assert left.modules == ("head.a.0",) and "share" in left.reason


def test_a_backbone_keeps_its_indices_and_a_tower_its_names() -> None:
    """Its code may take features by their index."""
    layers = OrderedDict(conv=conv3(), relu=nn.ReLU())
    detector = model(
        backbone=nn.Sequential(conv3(), nn.ReLU()), head__cls_tower=nn.Sequential(layers)
    )
    inject(detector, "ALL")
    assert len(detector.backbone) == len(detector.head.cls_tower) == 2
    x = torch.randn(1, C, 6, 6)
    conv = detector.backbone[0]
    bare = F.conv2d(x, conv.weight, padding=1)
    torch.testing.assert_close(detector.backbone(x), F.relu(F.group_norm(bare, 32)))


class BottleNeck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))


def two_convs(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    )


class Depth(nn.Module):
    """As the head of transformers' DPTForDepthEstimation."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.activation = None, nn.ReLU()
        self.head = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_in_a_sequence_the_next_layer_tells_whether_a_norm_fits() -> None:
    model = nn.ModuleDict({"backbone": two_convs(3), "head": Depth()})
    inject(model)
    gained = {key for key, m in model["head"].named_modules() if isinstance(m, nn.GroupNorm)}
    assert gained == {"head.3"}


class Convolution(nn.Sequential):
    """As monai's: norm, dropout and activation have a module of their own."""

    def __init__(self, channels: int) -> None:
        behind = nn.Sequential(OrderedDict(N=nn.BatchNorm2d(8), D=nn.Dropout(), A=nn.PReLU()))
        super().__init__(OrderedDict(conv=nn.Conv2d(channels, 8, 3, padding=1), adn=behind))


def test_a_norm_in_the_module_behind_is_that_of_the_convolution() -> None:
    model = nn.Sequential(Convolution(3), Convolution(8))
    inject(model, weight_standardization=True)
    found = audit(model)
    assert [(len(row.modules), row.form[:5]) for row in found.rows] == [(2, "WS+GN")]
    assert not found.left_alone


class FPN(nn.Module):
    """As segmentation_models_pytorch names the whole of it."""

    def __init__(self, middle: str = "decoder") -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.add_module(middle, two_convs(8))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.middle)(self.encoder(x))


@pytest.mark.parametrize("name", ["bottleneck", "bottle_neck", "conv_bottleneck", "Bottleneck"])
def test_a_bottleneck_is_no_neck(name: str) -> None:
    model = nn.ModuleDict({"stem": FPN(), name: two_convs(3), "block": BottleNeck()})
    inject(model)
    assert [key for key, m in model.named_modules() if isinstance(m, nn.GroupNorm)] == [
        "stem.encoder.1"
    ]


@pytest.mark.parametrize("name", ["neck", "img_neck", "fpn"])
def test_a_neck_is_one_by_its_name(name: str) -> None:
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 3, 1), name: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())})  # fmt: skip
    assert {row.site for row in audit(inject(model)).rows} == {"fpn"}


def test_a_whole_model_that_is_called_fpn_is_none() -> None:
    sites = {row.site for row in audit(inject(FPN())).rows}
    assert sites == {"other"}
    with pytest.raises(InputError):
        inject(FPN(), "fpn")


class TestNames:
    def test_the_name_of_a_part_means_the_places_in_it(self) -> None:
        detector = model(bbox_head=Dense(), neck=Neck())
        inject(detector, "bbox_head.cls_convs")
        assert placed(detector) == {
            "dense_head": ["bbox_head.cls_convs.0.gn", "bbox_head.cls_convs.1.gn"]
        }

    def test_a_pattern_means_every_part_that_it_matches_and_no_predictor(self) -> None:
        detector = inject(model(bbox_head=Dense()), ["bbox_head.*"])
        assert len(placed(detector)["dense_head"]) == 4

    def test_the_whole_name_of_a_convolution_gives_it_a_norm_wherever_it_is(self) -> None:
        detector = model(anything=nn.ModuleDict({"c": conv3(), "d": conv3()}))
        with pytest.raises(InputError, match=r"no place for a norm.*anything\.c"):
            inject(detector, "ALL")
        assert placed(inject(detector, "anything.c")) == {"other": ["anything.c.norm"]}

    def test_a_function_decides_by_name_and_module(self) -> None:
        detector = model(bbox_head=Dense())
        inject(detector, lambda name, m: "reg" in name and m.out_channels == C)
        assert placed(detector) == {
            "dense_head": ["bbox_head.reg_convs.0.gn", "bbox_head.reg_convs.1.gn"]
        }

    def test_names_and_sites_go_together(self) -> None:
        detector = inject(model(bbox_head=Dense(), neck=Neck()), ["fpn", "bbox_head.reg_convs"])
        assert {site: len(names) for site, names in placed(detector).items()} == {
            "fpn": 4, "dense_head": 2
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("which", "message"),
        [
            ("bbox_hed", r"no site 'bbox_hed'; did you mean box_head\?.*no module"),
            ("bbox_head.fc", r"no site.*no module of Module has that name"),
            (lambda name, m: False, "nothing to normalize at a predicate"),
        ],
    )
    def test_a_name_that_means_nothing_is_refused(self, which: object, message: str) -> None:
        with pytest.raises(InputError, match=message):
            inject(model(bbox_head=Dense()), which)


class Unknown(nn.Module):
    """A mask head whose forward tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv3(), conv3()


def test_an_error_names_what_hangs_there_and_its_class() -> None:
    detector = model(roi_heads__mask_head=Unknown(), neck=Neck())
    message = (
        r"site mask_head: roi_heads\.mask_head \(Unknown\) has nothing to normalize; "
        r"roi_heads\.mask_head\.first, roi_heads\.mask_head\.second: no norm, and what follows"
    )
    with pytest.raises(InputError, match=message):
        inject(detector, "mask_head")
    with pytest.raises(InputError, match="fpn 4, fpn.top_block 1"):
        inject(detector, "mask_head")


def test_a_part_with_norms_alone_is_found_by_default_at_whatever_site() -> None:
    """As "default" has always replaced norms by their type."""
    detector = model(rpn_head=nn.Sequential(conv3(), nn.BatchNorm2d(C), nn.ReLU()))
    assert placed(inject(detector)) == {"rpn": ["rpn_head.1"]}
