"""The schedule that follows from images per GPU, against values computed by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from detectron2.config import CfgNode, get_cfg, instantiate
from omegaconf import DictConfig

import gn_det
from gn_det import InputError, get_config
from gn_det.engine.schedule import (
    rescale_schedule,
    resolve_lazy_schedule,
    resolve_schedule,
    schedule_table,
)


def reference(**solver: object) -> CfgNode:
    """Detectron2's 1x schedule: 16 images, learning rate 0.02, 90k iterations."""
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.BASE_LR = 0.02
    cfg.SOLVER.MAX_ITER = 90_000
    cfg.SOLVER.STEPS = (60_000, 80_000)
    cfg.SOLVER.WARMUP_ITERS = 1000
    cfg.SOLVER.CHECKPOINT_PERIOD = 5000
    cfg.TEST.EVAL_PERIOD = 10_000
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 2.0
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


# GPUs, images on each: at a time, learning rate, iterations, steps, warm-up, checkpoint,
# evaluation, clipping.
BY_HAND = {
    "1x1": (1, 1, 1, 0.00125, 1_440_000, (960_000, 1_280_000), 16_000, 80_000, 160_000, 8.0),
    "1x2": (1, 2, 2, 0.0025, 720_000, (480_000, 640_000), 8000, 40_000, 80_000, 32**0.5),
    "8x1": (8, 1, 8, 0.01, 180_000, (120_000, 160_000), 2000, 10_000, 20_000, 8**0.5),
    "8x2": (8, 2, 16, 0.02, 90_000, (60_000, 80_000), 1000, 5000, 10_000, 2.0),
    "2x8x2": (16, 2, 32, 0.04, 45_000, (30_000, 40_000), 500, 2500, 5000, 2**0.5),
}


def numbers(cfg: CfgNode) -> tuple:
    solver = cfg.SOLVER
    return (
        solver.IMS_PER_BATCH,
        pytest.approx(solver.BASE_LR, rel=1e-12),
        solver.MAX_ITER,
        solver.STEPS,
        solver.WARMUP_ITERS,
        solver.CHECKPOINT_PERIOD,
        cfg.TEST.EVAL_PERIOD,
        pytest.approx(solver.CLIP_GRADIENTS.CLIP_VALUE, rel=1e-12),
    )


@pytest.mark.parametrize("name", BY_HAND)
def test_the_schedule_is_the_one_computed_by_hand(name: str) -> None:
    world_size, ims_per_gpu, *expected = BY_HAND[name]
    assert numbers(resolve_schedule(reference(IMS_PER_GPU=ims_per_gpu), world_size)) == (
        tuple(expected)
    )


def test_detectron2s_reference_comes_out_unchanged_at_8x2() -> None:
    before = reference(IMS_PER_GPU=2)
    after = resolve_schedule(before, 8)
    after.SOLVER.IMS_PER_GPU = 2
    assert after == before


def test_accumulated_batches_count_as_images_of_a_step() -> None:
    cfg = resolve_schedule(reference(IMS_PER_GPU=1, ACCUMULATE_STEPS=4), 2)
    assert cfg.SOLVER.IMS_PER_BATCH == 2  # at a time; 8 a step
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.01) and cfg.SOLVER.MAX_ITER == 180_000


def test_a_resolved_config_stays_as_it_is() -> None:
    resolved = resolve_schedule(reference(IMS_PER_GPU=1), 1)
    assert resolve_schedule(resolved, 4) is resolved


def test_the_config_that_is_resolved_does_not_change() -> None:
    cfg = reference(IMS_PER_GPU=1)
    cfg.freeze()
    resolve_schedule(cfg, 1)
    assert cfg == reference(IMS_PER_GPU=1)


@pytest.mark.parametrize(("steps", "expected"), [(200, 3200), (0, 0)])
def test_a_hand_over_ends_after_as_many_images(steps: int, expected: int) -> None:
    cfg = reference(IMS_PER_GPU=1)
    cfg.MODEL.GN.HAND_OVER_STEPS = steps
    assert resolve_schedule(cfg, 1).MODEL.GN.HAND_OVER_STEPS == expected


@pytest.mark.parametrize(
    ("max_iter", "expected"),
    [
        (180_000, ((120_000, 160_000), 2000, 10_000, 20_000, 400)),
        (9000, ((6000, 8000), 100, 500, 1000, 20)),
        (9, ((6, 8), 1, 1, 1, 1)),  # not 0, which means none
    ],
)
def test_a_schedule_in_other_iterations_keeps_its_shape(max_iter: int, expected: tuple) -> None:
    cfg = reference()
    cfg.MODEL.GN.HAND_OVER_STEPS = 200
    cfg.freeze()
    found = rescale_schedule(cfg, max_iter)
    solver = found.SOLVER
    assert solver.MAX_ITER == max_iter and solver.BASE_LR == cfg.SOLVER.BASE_LR
    assert expected == (
        solver.STEPS,
        solver.WARMUP_ITERS,
        solver.CHECKPOINT_PERIOD,
        found.TEST.EVAL_PERIOD,
        found.MODEL.GN.HAND_OVER_STEPS,
    )
    assert cfg.SOLVER.MAX_ITER == 90_000


def test_what_a_schedule_does_without_stays_so_in_other_iterations() -> None:
    cfg = reference(WARMUP_ITERS=0)
    cfg.TEST.EVAL_PERIOD = 0
    found = rescale_schedule(cfg, 180_000)
    assert (found.SOLVER.WARMUP_ITERS, found.TEST.EVAL_PERIOD) == (0, 0)
    assert found.MODEL.GN.HAND_OVER_STEPS == 0


def test_clipping_by_value_stays() -> None:
    cfg = reference(IMS_PER_GPU=1)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    assert resolve_schedule(cfg, 1).SOLVER.CLIP_GRADIENTS.CLIP_VALUE == 2.0


def test_no_evaluation_on_the_way_stays_none() -> None:
    cfg = reference(IMS_PER_GPU=1)
    cfg.TEST.EVAL_PERIOD = 0
    assert resolve_schedule(cfg, 1).TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ({"IMS_PER_GPU": -1}, r"IMS_PER_GPU is -1"),
        ({"ACCUMULATE_STEPS": 0}, r"ACCUMULATE_STEPS is 0"),
        ({"IMS_PER_GPU": 1, "REFERENCE_WORLD_SIZE": 8}, r"IMS_PER_GPU 1 and .*WORLD_SIZE 8"),
    ],
)
def test_what_makes_no_sense_is_refused(solver: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_schedule(reference(**solver), 1)


def test_the_table_shows_both_schedules() -> None:
    before = reference(IMS_PER_GPU=1, ACCUMULATE_STEPS=2)
    table = schedule_table(before, resolve_schedule(before, 2), 2)
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert lines["images per step"].endswith("4 = 1 x 2 GPUs x 2 accumulated")
    assert lines["learning rate"].split()[-2:] == ["0.02", "0.005"]
    assert lines["iterations"].split() == ["iterations", "90000", "360000"]
    assert lines["learning rate / 10 at"].endswith("240000, 320000")
    assert lines["gradients clipped at"].endswith("norm 4")


@pytest.mark.parametrize("world_size", [0, -2])
def test_no_gpus_at_all_are_refused(world_size: int) -> None:
    with pytest.raises(InputError, match="--num-gpus and --num-machines must be at least 1"):
        resolve_schedule(reference(IMS_PER_GPU=1), world_size)


def test_a_period_of_few_iterations_does_not_become_none() -> None:
    cfg = reference(IMS_PER_GPU=2, CHECKPOINT_PERIOD=1)
    assert resolve_schedule(cfg, 64).SOLVER.CHECKPOINT_PERIOD == 1


def test_a_reference_of_no_images_is_refused() -> None:
    with pytest.raises(InputError, match="IMS_PER_BATCH is 0"):
        resolve_schedule(reference(IMS_PER_GPU=1, IMS_PER_BATCH=0), 1)


def lazy_reference(**train: object) -> DictConfig:
    """The schedule of reference() as a LazyConfig, which does not clip."""
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_1x.py")
    cfg.train.update(eval_period=10_000, **train)
    return cfg


def multiplier(cfg: DictConfig) -> Callable[[int], float]:
    """The factor of the learning rate by iteration."""
    schedule = instantiate(cfg.lr_multiplier)
    return lambda iteration: schedule(iteration / cfg.train.max_iter)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_schedule_of_a_lazy_config_is_the_one_computed_by_hand(name: str) -> None:
    world_size, ims_per_gpu, batch, lr, max_iter, steps, warmup, *periods, _ = BY_HAND[name]
    cfg = resolve_lazy_schedule(lazy_reference(ims_per_gpu=ims_per_gpu), world_size)
    assert cfg.dataloader.train.total_batch_size == batch
    assert cfg.optimizer.lr == pytest.approx(lr, rel=1e-12)
    assert cfg.train.max_iter == max_iter
    assert [cfg.train.checkpointer.period, cfg.train.eval_period] == periods
    factor = multiplier(cfg)
    # fvcore switches up to a millionth of the run early.
    assert factor(warmup // 2) == pytest.approx(0.5, abs=0.001) and factor(warmup) == 1
    assert [factor(step - 2) for step in steps] == pytest.approx([1, 0.1])
    assert [factor(step) for step in steps] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("world_size", [1, 3, 8, 20])
@pytest.mark.parametrize("recipe", ["mask_rcnn_R_50_FPN_gn_2x", "retinanet_R_50_FPN_gn_1x"])
def test_both_kinds_of_config_have_the_same_table(recipe: str, world_size: int) -> None:
    plain, lazy = (get_config(f"coco/{recipe}.{kind}") for kind in ("yaml", "py"))
    expected = schedule_table(plain, resolve_schedule(plain, world_size), world_size)
    assert schedule_table(lazy, resolve_lazy_schedule(lazy, world_size), world_size) == expected


def test_accumulated_batches_of_a_lazy_config_count_as_images_of_a_step() -> None:
    cfg = resolve_lazy_schedule(lazy_reference(ims_per_gpu=1, accumulate_steps=4), 2)
    assert cfg.dataloader.train.total_batch_size == 2  # at a time; 8 a step
    assert cfg.optimizer.lr == pytest.approx(0.01) and cfg.train.max_iter == 180_000


def test_a_hand_over_of_a_lazy_config_ends_after_as_many_images() -> None:
    cfg = resolve_lazy_schedule(lazy_reference(ims_per_gpu=1, hand_over_steps=100), 1)
    assert cfg.train.hand_over_steps == 100 * lazy_reference().dataloader.train.total_batch_size


def test_a_resolved_lazy_config_stays_as_it_is() -> None:
    resolved = resolve_lazy_schedule(lazy_reference(ims_per_gpu=1), 1)
    assert resolve_lazy_schedule(resolved, 4) is resolved


def test_the_lazy_config_that_is_resolved_does_not_change() -> None:
    cfg = lazy_reference(ims_per_gpu=1)
    resolve_lazy_schedule(cfg, 1)
    assert cfg == lazy_reference(ims_per_gpu=1)


def test_a_lazy_config_that_knows_nothing_of_images_per_gpu_stays_as_it_is() -> None:
    cfg = lazy_reference(ims_per_gpu=1)
    del cfg.train.ims_per_gpu, cfg.train.accumulate_steps
    assert resolve_lazy_schedule(cfg, 8) is cfg


def test_a_lazy_config_to_evaluate_with_needs_no_schedule() -> None:
    cfg = lazy_reference(ims_per_gpu=0)
    del cfg.optimizer, cfg.lr_multiplier
    assert resolve_lazy_schedule(cfg, 1) is cfg


def test_a_schedule_without_steps_scales_too() -> None:
    cfg = get_config("small/quickstart.py")
    cfg.train.ims_per_gpu = 1
    resolved = resolve_lazy_schedule(cfg, 1)
    assert (resolved.train.max_iter, resolved.optimizer.lr) == (1440, 0.02)
    lines = schedule_table(cfg, resolved, 1).splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith(("warm-up", "learning"))] == [
        ["0.04", "0.02"],
        ["100", "200"],
        ["never", "never"],
    ]


def test_milestones_that_refer_to_max_iter_keep_their_place() -> None:
    cfg = lazy_reference(ims_per_gpu=1)
    cfg.lr_multiplier.scheduler.update(milestones=[60_000, 80_000], num_updates="${train.max_iter}")
    factor = multiplier(resolve_lazy_schedule(cfg, 1))
    assert (factor(959_998), factor(960_000)) == (1, 0.1)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"ims_per_gpu": -1}, r"train\.ims_per_gpu for a LazyConfig"),
        ({"ims_per_gpu": 1.5}, r"IMS_PER_GPU is 1\.5"),
        ({"accumulate_steps": 0}, r"train\.accumulate_steps for a LazyConfig"),
    ],
)
def test_what_makes_no_sense_in_a_lazy_config_is_refused(
    train: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolve_lazy_schedule(lazy_reference(**train), 1)


def test_an_optimizer_whose_learning_rate_is_its_own_cannot_be_scaled() -> None:
    cfg = lazy_reference()
    del cfg.optimizer.lr
    with pytest.raises(InputError, match=r"ims_per_gpu scales optimizer\.lr, which"):
        resolve_lazy_schedule(cfg, 1)
