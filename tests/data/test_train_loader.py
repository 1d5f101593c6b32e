"""Batches that depend on the seed, the rank and their number, and on nothing else."""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import random
import re
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch.utils.data import IterableDataset

from gn_det import InputError
from gn_det.config import get_config
from gn_det.data import train_loader
from gn_det.data.train_loader import TrainLoader, build_train_loader

# Seven items, three of them upright.
ITEMS = [{"id": i, "width": 10 + i % 2, "height": 10} for i in range(7)]


def sample(item: dict[str, Any]) -> tuple[int, float, float, float]:
    """An item and what augmentation would draw."""
    return item["id"], random.random(), np.random.rand(), torch.rand(1).item()


def loader(start: int = 0, **kwargs: Any) -> TrainLoader:
    arguments = {"mapper": sample, "seed": 3, "total_batch_size": 2, "num_workers": 0, **kwargs}
    built = build_train_loader(ITEMS, **arguments)
    built.start = start
    return built


def first(batches: TrainLoader, number: int) -> list[Any]:
    with contextlib.closing(batches):
        return list(itertools.islice(batches, number))


@pytest.mark.parametrize("start", [1, 5, 11])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_begun_later_are_those_of_the_whole_run(start: int, num_workers: int) -> None:
    whole = first(loader(), 14)
    assert first(loader(start, num_workers=num_workers), 14 - start) == whole[start:]


def broken(item: dict[str, Any]) -> None:
    raise InputError(f"picture {item['id']} is broken")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_input_stays_one_line_through_loading_processes(num_workers: int) -> None:
    with pytest.raises(InputError) as caught:
        first(loader(num_workers=num_workers, mapper=broken), 1)
    assert re.fullmatch(r"picture \d is broken", str(caught.value))


@pytest.mark.slow
def test_batches_do_not_depend_on_workers_or_on_what_was_drawn_before() -> None:
    whole = first(loader(), 12)
    torch.manual_seed(123)
    random.seed(123)
    assert first(loader(num_workers=2), 12) == whole


def test_another_seed_gives_other_images_and_other_augmentation() -> None:
    one, other = first(loader(), 12), first(loader(seed=4), 12)
    ids = [[[item for item, *_ in batch] for batch in batches] for batches in (one, other)]
    assert ids[0] != ids[1]
    draws = {draw for batch in one for _, *drawn in batch for draw in drawn}
    assert draws.isdisjoint(draw for batch in other for _, *drawn in batch for draw in drawn)


def test_no_two_samples_are_augmented_alike() -> None:
    draws = [draw for batch in first(loader(), 12) for _, draw, *_ in batch]
    assert len(set(draws)) == 24


def test_batches_are_of_one_orientation_and_all_items_come_round() -> None:
    batches = first(loader(), 21)
    assert all(len({item % 2 for item, *_ in batch}) == 1 for batch in batches)
    assert {item for batch in batches for item, *_ in batch} == set(range(7))
    mixed = first(loader(aspect_ratio_grouping=False), 21)
    assert any(len({item % 2 for item, *_ in batch}) == 2 for batch in mixed)


def test_an_epoch_has_every_item_once() -> None:
    batches = first(loader(total_batch_size=1), 21)
    for epoch in range(3):
        assert sorted(batch[0][0] for batch in batches[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_detectron2s_other_samplers_can_be_begun_anywhere_too() -> None:
    def sampler() -> RepeatFactorTrainingSampler:
        return RepeatFactorTrainingSampler(torch.tensor([1.0, 2.5] * 3 + [1.0]), seed=1)

    whole = first(loader(sampler=sampler()), 14)
    assert first(loader(5, sampler=sampler()), 9) == whole[5:]


def test_a_sample_that_cannot_be_made_is_replaced_by_the_same_one_each_time() -> None:
    def mapper(item: dict[str, Any]) -> tuple | None:
        return None if item["id"] < 3 else sample(item)

    whole = first(loader(mapper=mapper), 10)
    assert all(item >= 3 for batch in whole for item, *_ in batch)
    assert first(loader(4, mapper=mapper, num_workers=2), 6) == whole[4:]


def test_a_mapper_that_makes_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="a sample of none of 7 items"):
        first(loader(mapper=lambda item: None), 1)


def test_no_data_and_data_without_places_are_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(7))

    with pytest.raises(InputError, match="the training data set is empty"):
        build_train_loader([], mapper=sample, seed=0, total_batch_size=2)
    with pytest.raises(InputError, match="Stream can be read from its beginning only"):
        build_train_loader(Stream(), mapper=sample, seed=0, total_batch_size=2)


def test_a_config_builds_the_batches_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "detectron2.data.build.get_detection_dataset_dicts", lambda *args, **kwargs: ITEMS
    )
    cfg = get_config("small/quickstart.yaml")
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.TRAIN = ("items",)
    batches = []
    for seed in (3, 3, 4):
        torch.rand(seed)  # whatever came before
        np.random.rand(seed)
        cfg.SEED = seed
        batches.append(first(build_train_loader(cfg, mapper=sample), 6))
    assert batches[0] == batches[1] != batches[2]


def test_resuming_far_into_a_run_loads_nothing_on_the_way() -> None:
    loaded = []

    def mapper(item: dict[str, Any]) -> int:
        loaded.append(item["id"])
        return item["id"]

    first(loader(100_000, mapper=mapper), 3)
    assert len(loaded) == 6


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (RuntimeError("unable to allocate shared memory(shm) for file"), signal.SIGBUS),
        (OSError(errno.ENOSPC, "No space left on device"), signal.SIGBUS),
        (TypeError("cannot pickle"), signal.SIGABRT),
    ],
)
def test_a_loading_process_without_shared_memory_ends(
    error: Exception, number: signal.Signals
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=train_loader._end_without_memory, args=(error, None)
    )
    process.start()
    process.join()
    assert process.exitcode == -number
