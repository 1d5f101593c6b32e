"""Hand-over from frozen BN to GN: where it begins and ends, in checkpoints and after a break."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock
from support.processes import in_two_processes
from support.programs import ROOT
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import gn_det
from gn_det import FusedGroupNorm, InputError
from gn_det.checkpoint import Checkpointer
from gn_det.config import load_config
from gn_det.config.combinations import check_complete_config
from gn_det.engine import trainer
from gn_det.engine.hand_over import HandOverHook
from gn_det.engine.loop import fit
from gn_det.engine.step import AccumulatingTrainer
from gn_det.engine.trainer import build_model
from gn_det.layers.group_norm import FusedGroupNormAct
from gn_det.layers.hand_over import HandOver, hand_overs
from gn_det.modeling.with_gn import with_gn

STEPS = 4


class Network(nn.Module):
    """BN of several kinds: Detectron2's frozen one in a block, timm's with its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = BatchNormAct2d(8, act_layer=nn.SiLU, eps=1e-3)
        self.block = BasicBlock(8, 8, norm="FrozenBN")

    def forward(self, batch: list[Tensor]) -> dict[str, Tensor]:
        return {"loss": self.features(torch.stack(batch)).square().mean()}

    def features(self, x: Tensor) -> Tensor:
        return self.block(self.bn(self.stem(x)))


def with_bn() -> Network:
    torch.manual_seed(0)
    network = Network()
    for norm in (network.bn, network.block.conv1.norm, network.block.conv2.norm):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return network


def handed_over(network: nn.Module | None = None) -> nn.Module:
    return with_gn(network or with_bn(), "default", hand_over=True, num_groups=2)


def batches() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[*torch.randn(2, 3, 9, 9, generator=generator)] for _ in range(8)]


class Recorder(HookBase):
    def __init__(self, see: Callable[[nn.Module], object] = lambda model: None) -> None:
        self.see, self.seen = see, []

    def before_step(self) -> None:
        self.seen.append(self.see(self.trainer.model))


def train(
    model: nn.Module, folder: Path, max_iter: int = 7, *, resume: bool = False, weights: str = "",
    hook: HookBase | None = None, steps: int = STEPS,
) -> nn.Module:  # fmt: skip
    folder.mkdir(exist_ok=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    done = 0
    if resume:
        last = torch.load(folder / (folder / "last_checkpoint").read_text(), weights_only=True)
        done = last["iteration"] + 1
    trainer = AccumulatingTrainer(model, batches()[done:], optimizer)
    fit(
        trainer,
        Checkpointer(model, str(folder), trainer=trainer),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        max_iter,
        weights=weights,
        resume=resume,
        checkpoint_period=1,
        more_hooks=[HandOverHook(model, steps), *([hook] if hook else [])],
    )
    return model


def test_it_begins_at_frozen_bn_and_ends_as_plain_gn(tmp_path: Path) -> None:
    x = torch.stack(batches()[0])
    outputs = Recorder(lambda model: model.features(x).detach())
    alphas = [norm for _, norm in hand_overs(handed_over())]
    assert len(alphas) == 3
    model = train(handed_over(), tmp_path, hook=outputs)
    torch.testing.assert_close(outputs.seen[0], with_bn().eval().features(x))
    assert not any(hand_overs(model))
    assert type(model.block.conv1.norm) is FusedGroupNorm
    assert type(model.bn) is FusedGroupNormAct
    # Fused as without a hand-over, with the state dict and the output of GN.
    plain = with_gn(with_bn(), "default", num_groups=2)
    assert type(model.block) is type(plain.block)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.features(x), plain.features(x))


def test_the_part_of_gn_rises_in_equal_steps(tmp_path: Path) -> None:
    see = Recorder(lambda model: [norm.alpha for _, norm in hand_overs(model)])
    train(handed_over(), tmp_path, hook=see)
    assert see.seen == [[alpha] * 3 for alpha in (0, 0, 1 / 3, 2 / 3)] + [[], [], []]


@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_gn_is_fitted_to_what_bn_puts_out_before_its_part_rises(num_groups: int) -> None:
    batch = batches()[0]
    x = torch.stack(batch)
    expected = with_bn().eval().features(x)
    converted = with_bn()
    gn_det.convert_bn(converted, [batch], num_groups=num_groups)
    copied = with_gn(with_bn(), "default", num_groups=num_groups)

    model = with_gn(with_bn(), "default", hand_over=True, num_groups=num_groups)
    trainer = SimpleTrainer(model, [batch] * 3, torch.optim.SGD(model.parameters(), lr=0.0))
    fits = Recorder(lambda model: copy.deepcopy(model.state_dict()))
    trainer.register_hooks([HandOverHook(model, steps=20), fits])
    trainer.train(0, 3)
    before, still_before, fitted = fits.seen
    assert all(torch.equal(value, still_before[key]) for key, value in before.items())
    fitted = {key: value for key, value in fitted.items() if key in copied.state_dict()}
    # The first norm has the inputs that it has in a conversion.
    torch.testing.assert_close(fitted["bn.weight"], converted.bn.weight)
    torch.testing.assert_close(fitted["bn.bias"], converted.bn.bias)
    distances = []
    for state in (copied.state_dict(), fitted):
        copied.load_state_dict(state)
        distances.append((copied.features(x) - expected).norm())
    assert distances[1] < 0.8 * distances[0]


def save_fitted(rank: int, folder: Path, pictures_each: int) -> None:
    model = handed_over()
    data = [batches()[0][pictures_each * rank :][:pictures_each]] * 5
    trainer = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks([HandOverHook(model, steps=30)])
    trainer.train(0, 4)
    torch.save(model.state_dict(), folder / f"{rank}.pth")


@pytest.mark.slow
def test_gn_is_fitted_to_the_pictures_of_all_gpus(tmp_path: Path) -> None:
    save_fitted(0, tmp_path, 2)
    whole = torch.load(tmp_path / "0.pth", weights_only=True)
    in_two_processes(save_fitted, tmp_path, 1)
    parts = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part, whole)
    assert not torch.equal(whole["bn.weight"], with_bn().bn.weight)


def test_a_norm_is_the_mean_of_both() -> None:
    model = handed_over()
    x = torch.randn(2, 8, 5, 5)
    frozen = with_bn().block.conv1.norm
    norm = model.block.conv1.norm
    assert isinstance(norm, HandOver)
    gn = nn.functional.group_norm(x, 2, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm.eval()(x), gn)  # before a training
    norm.train().begin()
    with torch.no_grad():
        norm.weight.mul_(3)  # as training may: BN keeps its own
    gn = nn.functional.group_norm(x, 2, norm.weight, norm.bias, norm.eps)
    for alpha in (0.0, 0.25, 1.0):
        norm.alpha = alpha
        torch.testing.assert_close(norm(x), (1 - alpha) * frozen(x) + alpha * gn)


@pytest.mark.parametrize(
    ("steps", "stops_after"),
    [*((STEPS, after) for after in (1, 2, STEPS - 1, STEPS, STEPS + 1)), (30, 1), (30, 3), (30, 4)],
)
def test_a_break_changes_no_bit(tmp_path: Path, steps: int, stops_after: int) -> None:
    whole = train(handed_over(), tmp_path / "whole", steps=steps)
    train(handed_over(), tmp_path / "parts", stops_after, steps=steps)
    resumed = train(handed_over(), tmp_path / "parts", resume=True, steps=steps)
    state = resumed.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("iteration", [0, STEPS - 1, 6])
def test_every_checkpoint_has_the_weights_of_gn_alone(tmp_path: Path, iteration: int) -> None:
    train(handed_over(), tmp_path)
    file = tmp_path / f"model_{iteration:07d}.pth"
    saved = torch.load(file if file.exists() else tmp_path / "model_final.pth", weights_only=True)
    plain = with_gn(with_bn(), "default", num_groups=2)
    assert saved["model"].keys() == plain.state_dict().keys()
    assert ("HandOverHook" in saved["trainer"]["hooks"]) == (iteration < STEPS - 1)
    # A model that is built for a hand-over evaluates them as plain GN.
    model = handed_over().eval()
    Checkpointer(model).load(str(file if file.exists() else tmp_path / "model_final.pth"))
    plain.eval().load_state_dict(saved["model"])
    x = torch.stack(batches()[0])
    torch.testing.assert_close(model.features(x), plain.features(x))


@pytest.mark.parametrize("folded", [False, True])
def test_bn_is_that_of_the_weights_that_the_run_starts_from(tmp_path: Path, folded: bool) -> None:
    source = with_bn()
    nn.init.normal_(source.bn.running_mean, 5)
    state = source.state_dict()
    if folded:  # as in Detectron's files, which are told by such names
        state = {key: value for key, value in state.items() if "running" not in key}
        state["conv1_bn_s"] = torch.ones(8)
        for norm in (source.bn, source.block.conv1.norm, source.block.conv2.norm):
            nn.init.zeros_(norm.running_mean)
            norm.running_var.fill_(1.0)
    torch.save({"model": state}, tmp_path / "bn.pth")
    fresh = Network()
    nn.init.ones_(fresh.bn.running_var)
    x = torch.stack(batches()[0])
    outputs = Recorder(lambda model: model.features(x).detach())
    train(handed_over(fresh), tmp_path, 1, weights=str(tmp_path / "bn.pth"), hook=outputs)
    torch.testing.assert_close(outputs.seen[0], source.eval().features(x), rtol=1e-4, atol=1e-4)


def test_weights_with_gn_have_no_bn_to_hand_over_from(tmp_path: Path) -> None:
    source = with_gn(with_bn(), "default", num_groups=2)
    torch.save({"model": source.state_dict()}, tmp_path / "gn.pth")
    with pytest.raises(InputError, match=r"no statistics of BN for 3 of 3 norms .*with GN;"):
        train(handed_over(), tmp_path, 1, weights=str(tmp_path / "gn.pth"))


def test_a_checkpointer_that_cannot_tell_gn_from_folded_bn_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = with_gn(with_bn(), "default", num_groups=2)
    torch.save({"model": source.state_dict()}, tmp_path / "gn.pth")
    model = handed_over()
    DetectionCheckpointer(model).load(str(tmp_path / "gn.pth"))
    simple = SimpleTrainer(model, [batches()[0]] * 2, torch.optim.SGD(model.parameters(), lr=0.0))
    simple.register_hooks([HandOverHook(model, STEPS)])
    simple.train(0, 1)
    assert "no statistics of BN for 3 of 3 norms" in caplog.text


@pytest.mark.parametrize("stops_after", [1, 3, STEPS])
def test_a_checkpoint_from_its_middle_is_evaluated_with_a_warning(
    stops_after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(handed_over(), tmp_path, stops_after)
    Checkpointer(handed_over()).load(str(tmp_path / f"model_{stops_after - 1:07d}.pth"))
    told = "from the middle of a hand-over: it is evaluated as GN" in caplog.text
    assert told == (stops_after < STEPS)


def test_a_run_that_began_without_it_cannot_go_on_with_it(tmp_path: Path) -> None:
    train(handed_over(), tmp_path, 2, steps=2)
    with pytest.raises(InputError, match="no frozen BN to hand over from"):
        train(handed_over(), tmp_path, resume=True)


def test_a_trainer_without_the_hook_cannot_train_it() -> None:
    with pytest.raises(InputError, match=r"hands over to GN: .* give the trainer .*HandOver"):
        handed_over()(batches()[0])


def test_any_trainer_of_detectron2_hands_over_with_the_hook() -> None:
    model = handed_over()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    simple = SimpleTrainer(model, [batches()[0]] * 9, optimizer)
    simple.register_hooks([HandOverHook(model, STEPS)])
    simple.train(0, STEPS + 1)
    assert not any(hand_overs(model))
    assert {type(n) for n in model.modules() if isinstance(n, FusedGroupNorm)} <= {
        FusedGroupNorm,
        FusedGroupNormAct,
    }


def test_a_model_without_norms_to_hand_over_refuses_the_hook() -> None:
    with pytest.raises(InputError, match=r"in 4 steps changes nothing: no norm .* hand_over=True"):
        HandOverHook(gn_det.inject(with_bn(), num_groups=2), STEPS)


def test_a_frozen_stage_cannot_be_handed_over() -> None:
    keys = ["MODEL.TIMM.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 2]
    cfg = load_config(ROOT / "configs/compare/photos/gn_handed_over.yaml", keys)
    with pytest.raises(InputError, match=r"FREEZE_AT 2: .* would become GN, .* set FREEZE_AT to 0"):
        trainer._hand_over(cfg, build_model(cfg))


def test_a_frozen_stage_is_refused_in_any_trainer(tmp_path: Path) -> None:
    model = handed_over()
    model.stem.requires_grad_(False)
    model.bn.requires_grad_(False)
    with pytest.raises(InputError, match=r"bn is frozen, .* needs MODEL.BACKBONE.FREEZE_AT 0"):
        train(model, tmp_path)


@pytest.mark.parametrize("gamma", [1, 0])  # timm begins the last BN of some blocks with 0
def test_a_random_start_has_nothing_to_hand_over(tmp_path: Path, gamma: int) -> None:
    network = Network()
    nn.init.constant_(network.bn.weight, gamma)
    with pytest.raises(InputError, match="no values of a trained BN to begin with"):
        train(handed_over(network), tmp_path)


def test_training_in_parts_sees_each_input_once() -> None:
    fitted = []
    for parts in ([4], [1, 2, 4]):
        model = handed_over()
        data = [batches()[0]] * 9
        trainer = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), lr=0.0))
        trainer.register_hooks([HandOverHook(model, steps=30)])
        for start, end in zip([0, *parts], parts, strict=False):
            trainer.train(start, end)
        fitted.append(model.bn.weight.detach())
        assert not model.bn._forward_pre_hooks
    torch.testing.assert_close(*fitted)


def test_a_checkpoint_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match="another version of gn_det"):
        HandOverHook(handed_over(), 30).load_state_dict({"bn": {}})


@pytest.mark.parametrize("option", ["recompute", "weight_standardization"])
def test_it_neither_recomputes_nor_standardizes(option: str) -> None:
    with pytest.raises(InputError, match=f"HAND_OVER_STEPS and MODEL.GN.{option.upper()} cannot"):
        with_gn(with_bn(), "default", hand_over=True, **{option: True})


def test_norms_that_do_not_train_are_handed_over_with_the_others(tmp_path: Path) -> None:
    model = handed_over()
    model.block.requires_grad_(False)  # as layers are that no feature map needs
    assert not any(hand_overs(train(model, tmp_path)))


def test_a_norm_that_was_injected_twice_keeps_its_bn() -> None:
    model = handed_over(handed_over())
    assert len([*hand_overs(model)]) == 3
    expected = dict(hand_overs(handed_over()))
    for name, norm in hand_overs(model):
        assert torch.equal(norm.running_mean, expected[name].running_mean)
        assert norm.bn_eps == expected[name].bn_eps


def test_it_copies() -> None:
    model = handed_over()
    for _, norm in hand_overs(model):
        norm.begin()
        norm.alpha = 0.5
    x = torch.stack(batches()[0])
    assert torch.equal(copy.deepcopy(model).features(x), model.features(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_copies_while_gn_is_fitted(copied: Callable, tmp_path: Path) -> None:
    copies = []
    see = Recorder(lambda model: copies.append((copied(model), copied(model.state_dict()))))
    train(handed_over(), tmp_path, max_iter=5, steps=30, hook=see)
    x = torch.stack(batches()[0])
    for model, state in copies[:3]:
        plain = handed_over().eval()
        plain.load_state_dict(state)
        assert torch.isfinite(model.features(x)).all()


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_bn_that_has_nothing_to_hand_over_is_named(options: dict) -> None:
    network = with_bn()
    network.bn = nn.BatchNorm2d(8, **options)
    with pytest.raises(InputError, match=r"1 of 3 BN layers have no .*\(bn\), and a hand-over"):
        handed_over(network)


def test_norms_that_the_fit_did_not_see_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = with_bn()
    network.unused = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    nn.init.normal_(network.unused[1].bias)
    train(handed_over(network), tmp_path)
    assert "1 of 4 norms had no input in the first 1 steps (unused.1)" in caplog.text


def test_a_training_that_ends_in_the_middle_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(handed_over(), tmp_path, max_iter=3)
    assert "ends at step 3, in the middle of a hand-over in 4 steps" in caplog.text


SMALL = ROOT / "configs/small/quickstart.yaml"
KEYS = ["MODEL.DEVICE", "cpu", "MODEL.GN.HAND_OVER_STEPS", "10", "MODEL.RESNETS.NORM", "FrozenBN"]


def test_the_key_hands_the_backbone_over_and_nothing_that_had_no_bn() -> None:
    model = build_model(load_config(SMALL, KEYS))
    names = [name for name, _ in hand_overs(model)]
    assert len(names) == 20 and all(name.startswith("backbone.bottom_up") for name in names)
    assert gn_det.audit(model).num_norms > 20


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["MODEL.GN.HAND_OVER_STEPS", "1000"], "above SOLVER.MAX_ITER"),
        (["MODEL.GN.RECOMPUTE", "True"], "MODEL.GN.RECOMPUTE cannot be combined"),
        (["MODEL.BACKBONE.COMPILE", "True"], "MODEL.BACKBONE.COMPILE cannot be combined"),
        (["MODEL.GN.WEIGHT_STANDARDIZATION", "True"], "STANDARDIZATION cannot be combined"),
    ],
)
def test_what_cannot_be_handed_over_is_one_line(keys: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_complete_config(load_config(SMALL, [*KEYS, *keys]))


@pytest.mark.parametrize(
    "keys",
    [["MODEL.RESNETS.NORM", "GN"], ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]],
    ids=["no BN", "no GN"],
)
def test_a_key_that_changes_nothing_is_an_error(keys: list[str]) -> None:
    with pytest.raises(InputError, match="HAND_OVER_STEPS changes nothing"):
        build_model(load_config(SMALL, [*KEYS, *keys]))


def test_frozen_bn_alone_is_what_the_test_network_has() -> None:
    assert isinstance(with_bn().block.conv1.norm, FrozenBatchNorm2d)
