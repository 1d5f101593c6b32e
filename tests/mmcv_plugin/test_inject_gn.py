"""InjectGN in mmengine's Runner: averages, resumed runs, mixed precision, scaled learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gn_det.mmcv_plugin  # noqa: F401 (registration)
from gn_det import FusedGroupNorm, InputError, audit


class TinyHead(nn.Module):
    """GN that no config names."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.ReLU(),
        )
        self.predictor = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predictor(self.tower(x))


class TinyDetector(BaseModel):
    """Norms of a backbone (4), a neck of mmcv's (1), and a head with GN (2)."""

    def __init__(self, backbone: dict, neck: dict | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        channels = [3, 16, 16, 16, 16]
        self.backbone = nn.Sequential(
            *(
                layer
                for before, after in pairwise(channels)
                for layer in (
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(inplace=True),
                )
            )
        )
        for parameter in self.backbone[: backbone["frozen"] * 3].parameters():
            parameter.requires_grad = False
        self.neck = ConvModule(16, 16, 1, norm_cfg=neck and neck["norm_cfg"], act_cfg=None)
        self.head = TinyHead()

    def forward(self, inputs: Tensor, target: Tensor, mode: str = "tensor") -> Any:
        predicted = self.head(self.neck(self.backbone(inputs)))
        return {"loss": (predicted - target).square().mean()} if mode == "loss" else predicted


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    MODELS.register_module("TinyDetector", module=TinyDetector, force=True)
    yield
    MODELS._module_dict.pop("TinyDetector")


MODEL: dict[str, Any] = dict(
    type="InjectGN",
    model="TinyDetector",
    backbone=dict(frozen=1),
    neck=dict(norm_cfg=dict(type="BN")),
)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    # mmengine 0.10 reads its own checkpoints in a way that PyTorch 2.6 and newer refuse.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    names = iter(range(100))

    def make(iterations: int = 3, **changed: Any) -> Runner:
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(8, 3, 8, 8), torch.randn(8, 1, 8, 8))
        settings = dict(
            model=MODEL,
            work_dir=str(tmp_path / "work"),
            train_dataloader=DataLoader(data, batch_size=2),
            train_cfg=dict(by_epoch=False, max_iters=iterations, val_interval=100),
            optim_wrapper=dict(
                optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4),
                paramwise_cfg=dict(norm_decay_mult=0.0),
            ),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False)),
            experiment_name=f"{tmp_path.name}_{next(names)}",
            log_level="ERROR",
            randomness=dict(seed=0),
        )
        return Runner(**{**settings, **changed})

    yield make
    DefaultScope._instance_dict.clear()


def fused_norms(model: nn.Module) -> list[FusedGroupNorm]:
    return [module for module in model.modules() if isinstance(module, FusedGroupNorm)]


def test_what_it_builds_is_the_model_itself_with_its_names() -> None:
    arguments = {key: value for key, value in MODEL.items() if key not in ("type", "model")}
    plain, ours = MODELS.build(dict(type="TinyDetector", **arguments)), MODELS.build(MODEL)
    assert type(ours) is TinyDetector
    bn = ("running_mean", "running_var", "num_batches_tracked")
    assert list(ours.state_dict()) == [key for key in plain.state_dict() if not key.endswith(bn)]
    assert len(fused_norms(ours)) == 7
    forms = {row.form: 0 for row in audit(ours).rows}
    for row in audit(ours).rows:
        forms[row.form] += len(row.modules)
    assert forms == {"GN+ReLU": 6, "GN": 1}  # of the neck nothing follows


def test_a_whole_config_is_taken_as_well_as_a_type() -> None:
    whole = {**MODEL, "type": "TinyDetector"}
    del whole["model"]
    model = MODELS.build(dict(type="InjectGN", model=whole, num_groups=2))
    assert {norm.num_groups for norm in fused_norms(model)} == {2}
    model = MODELS.build({**MODEL, "model": TinyDetector})
    assert len(fused_norms(model)) == 7


def test_a_child_of_a_config_adds_two_keys(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(
        "model = dict(type='TinyDetector', backbone=dict(frozen=0), neck=None)\n"
    )
    (tmp_path / "child.py").write_text(
        "_base_ = 'base.py'\n"
        "custom_imports = dict(imports=['gn_det.mmcv_plugin'], allow_failed_imports=False)\n"
        "model = dict(type='InjectGN', model='TinyDetector', sites=['backbone', 'dense_head'])\n"
    )
    config = Config.fromfile(tmp_path / "child.py")
    model = MODELS.build(config.model)
    assert type(model) is TinyDetector and len(fused_norms(model)) == 6
    assert config.model.backbone.frozen == 0  # where init_detector looks for it


def test_gn_alone_becomes_ours_where_bn_is_to_stay() -> None:
    model = MODELS.build({**MODEL, "sites": "GN"})
    assert [norm.num_groups for norm in fused_norms(model)] == [4, 4]
    assert sum(len(row.modules) for row in audit(model).rows if row.form == "GN+ReLU") == 2
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 5


def test_a_site_that_is_not_there_is_told() -> None:
    with pytest.raises(InputError, match="no site 'nek'"):
        MODELS.build({**MODEL, "sites": ["nek"]})


@pytest.mark.parametrize("amp", [False, True])
def test_every_norm_that_trains_is_in_the_optimizer_and_moves(
    amp: bool, runner: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    optimizer = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4)
    wrapper = dict(
        type="AmpOptimWrapper" if amp else "OptimWrapper",
        optimizer=optimizer,
        paramwise_cfg=dict(norm_decay_mult=0.0),
        **(dict(dtype="bfloat16", loss_scale=1.0) if amp else {}),
    )
    run = runner(
        optim_wrapper=wrapper,
        auto_scale_lr=dict(base_batch_size=16, enable=True),
        custom_hooks=[dict(type="EMAHook", momentum=0.5)],
    )
    norms = fused_norms(run.model)
    before = {parameter: parameter.detach().clone() for parameter in run.model.parameters()}
    run.train()
    groups = {p: group for group in run.optim_wrapper.param_groups for p in group["params"]}
    assert len(norms) == 7 and len(fused_norms(run.model)) == 7
    trained = [p for norm in norms for p in norm.parameters() if p.requires_grad]
    assert len(trained) == 12  # the norm of the frozen stage stays as it was
    for parameter in trained:
        assert groups[parameter]["lr"] == pytest.approx(0.1 * 2 / 16)
        assert groups[parameter]["weight_decay"] == 0.0
        assert not torch.equal(parameter, before[parameter])
    for parameter in norms[0].parameters():
        assert torch.equal(parameter, before[parameter])
    average = next(hook for hook in run.hooks if type(hook).__name__ == "EMAHook").ema_model
    assert len(fused_norms(average)) == 7


def test_a_resumed_run_ends_as_one_that_never_stopped(
    runner: Callable[..., Runner], tmp_path: Path
) -> None:
    whole = runner(work_dir=str(tmp_path / "whole"), iterations=4)
    whole.train()
    assert len(fused_norms(whole.model)) == 7
    resumed = runner(iterations=4, resume=True, load_from=str(tmp_path / "whole/iter_2.pth"))
    resumed.train()
    assert resumed.iter == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def test_a_checkpoint_loads_into_the_model_of_its_config(
    runner: Callable[..., Runner], tmp_path: Path
) -> None:
    run = runner()
    run.train()
    model = MODELS.build(MODEL)
    load_checkpoint(model, str(tmp_path / "work/iter_3.pth"), strict=True, map_location="cpu")
    x, target = torch.randn(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    assert torch.equal(model.eval()(x, target), run.model.eval()(x, target))


@pytest.mark.parametrize(
    "option", [{"num_groups": 1}, {"channels_per_group": 4}, {"weight_standardization": True}]
)
def test_options_of_norms_that_stay_as_they_are_are_refused(option: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))}.* would change nothing"):
        MODELS.build({**MODEL, "sites": "GN", **option})


def test_groups_have_the_fewest_channels_that_are_asked_for() -> None:
    model = MODELS.build({**MODEL, "min_channels_per_group": 8})
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.GroupNorm)]
    assert [(norm.num_channels, norm.num_groups) for norm in norms] == [(16, 2)] * 4
