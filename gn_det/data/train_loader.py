"""Training batches, each a function of the seed, the process and its number alone."""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import multiprocessing.queues
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList
from detectron2.data.build import _train_loader_from_config
from detectron2.data.samplers import GroupedBatchSampler, TrainingSampler
from detectron2.utils import comm
from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from gn_det.data.mapper import PictureMapper
from gn_det.data.pictures import PictureError
from gn_det.data.proposals import check_config_proposals
from gn_det.data.seeding import seed_generators
from gn_det.errors import InputError
from gn_det.text import shortened

__all__ = ["TrainLoader", "build_train_loader", "set_up_worker"]

_SECONDS_AFTER_SIGTERM = 60
MOST_BAD_IMAGES = 20  # that a loading process goes on without


class TrainLoader:
    """Endless batches of a process, from any of them on.

    Detectron2's sampler and its grouping by aspect ratio decide which images make a batch. Both run
    over indices alone, which takes no time, so a resumed run lets them pass what it has had. What
    is random about a sample is seeded by (seed, rank, batch, place in the batch), so it does not
    depend on workers, or on what was loaded before.

    Args:
        dataset: map-style.
        mapper: from an item of the data set to a sample; None takes another item.
        sampler: endless indices.
        group_ids: of each item; a batch is of one group.
        batch_size: images of a batch.
        seed: non-negative.
        num_workers: loading processes.
        skip_bad_images: whether another item stands in for one whose picture cannot be read.
        kwargs: for the DataLoader.

    Attributes:
        start: number of the first batch, 0 unless set before iterating.
    """

    def __init__(
        self,
        dataset: Dataset,
        mapper: Callable[[Any], Any],
        sampler: Sampler,
        group_ids: Sequence[int],
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        skip_bad_images: bool = False,
        **kwargs: Any,
    ) -> None:
        self.samples = _Samples(dataset, mapper, seed, skip_bad_images)
        self.sampler = sampler
        self.group_ids = group_ids
        self.batch_size = batch_size
        self.start = 0
        self._batches: Iterator[list[Any]] | None = None
        self._kwargs = {"num_workers": num_workers, **kwargs}

    def __iter__(self) -> Iterator[list[Any]]:
        batches = enumerate(GroupedBatchSampler(self.sampler, self.group_ids, self.batch_size))
        keys = (
            [(number, place, index) for place, index in enumerate(indices)]
            for number, indices in itertools.islice(batches, self.start, None)
        )
        self._batches = iter(
            DataLoader(
                self.samples, batch_sampler=keys, worker_init_fn=set_up_worker, **self._kwargs
            )
        )
        return self._batches

    def close(self) -> None:
        """End the loading processes, which a process that fails would else wait for at its end."""
        if self._kwargs["num_workers"] > 0 and self._batches is not None:
            self._batches._shutdown_workers()
        self._batches = None


class _Samples(Dataset):
    """Samples by (number of the batch, place in it, index in the data set)."""

    def __init__(
        self, dataset: Dataset, mapper: Callable[[Any], Any], seed: int, skip_bad_images: bool
    ) -> None:
        self.dataset = dataset
        self.mapper = mapper
        self.seeds = seed, comm.get_rank()
        self.skip_bad_images = skip_bad_images
        self.bad: set[str] = set()

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        number, place, index = key
        # What stands in for an item follows from these alone, too, so a resumed run takes the same.
        seed_generators(*self.seeds, number, 1 + place)
        for _ in range(len(self.dataset)):
            sample = self._mapped(index)
            if sample is not None:
                return sample
            index = random.randrange(len(self.dataset))
        raise InputError(f"the mapper made a sample of none of {len(self.dataset)} items")

    def _mapped(self, index: int) -> Any:
        try:
            return self.mapper(self.dataset[index])
        except PictureError as error:
            if not self.skip_bad_images:
                raise InputError(
                    f"{error}; it was whole when the run began. Mend it and resume the run; with "
                    "--skip-bad-images, another picture stands in for it"
                ) from error
            if str(error) not in self.bad:
                logging.getLogger(__name__).warning(f"{error}; another picture stands in for it")
            self.bad.add(str(error))
            if len(self.bad) > MOST_BAD_IMAGES:
                raise InputError(
                    f"more than {MOST_BAD_IMAGES} pictures cannot be read any more, such as "
                    f"{shortened(sorted(self.bad), 3)}; is their disk there?"
                ) from error
            return None


def _from_config(cfg: CfgNode, **kwargs: Any) -> dict[str, Any]:
    check_config_proposals(cfg, "TRAIN", cfg.DATASETS.TRAIN)
    # TrainingSampler takes its seed from NumPy's generator.
    seed_generators(cfg.SEED)
    given = _train_loader_from_config(cfg, **{"mapper": PictureMapper, **kwargs})
    if given["mapper"] is PictureMapper:  # which needs what is known when the data are loaded
        given["mapper"] = PictureMapper(cfg, is_train=True)
    return {**given, "seed": cfg.SEED, "skip_bad_images": cfg.DATALOADER.SKIP_BAD_IMAGES}


@configurable(from_config=_from_config)
def build_train_loader(
    dataset: list[dict[str, Any]] | Dataset,
    *,
    mapper: Callable[[Any], Any],
    seed: int,
    total_batch_size: int,
    sampler: Sampler | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    skip_bad_images: bool = False,
    **kwargs: Any,
) -> TrainLoader:
    """Detectron2's build_detection_train_loader, for batches that can be begun anywhere.

    Called with a config whose SEED is not negative, or with explicit arguments.

    Args:
        dataset: dicts as Detectron2's catalog has them, or a map-style data set of such.
        mapper: from such a dict to what the model takes.
        seed: non-negative.
        total_batch_size: images over all processes, which must divide them.
        sampler: of indices, endless; a shuffled one by default.
        aspect_ratio_grouping: whether a batch has upright or lying images only.
        num_workers: loading processes.
        collate_fn: makes a batch of samples; by default their list.
        skip_bad_images: see :class:`TrainLoader`.
        kwargs: for torch's DataLoader.

    Raises:
        InputError: the data set is empty, or iterable-style, which cannot be begun anywhere.
    """
    if isinstance(dataset, IterableDataset):
        raise InputError(
            f"{type(dataset).__name__} can be read from its beginning only, so that a run could "
            "not be resumed; make it a map-style data set"
        )
    if len(dataset) == 0:
        raise InputError("the training data set is empty")
    upright = [int(d["width"] <= d["height"]) if aspect_ratio_grouping else 0 for d in dataset]
    return TrainLoader(
        DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset,
        mapper,
        sampler or TrainingSampler(len(dataset), seed=seed),
        upright,
        total_batch_size // comm.get_world_size(),
        seed,
        num_workers,
        skip_bad_images,
        collate_fn=collate_fn or list,
        **kwargs,
    )


def set_up_worker(worker: int) -> None:
    """Let a loading process outlive signals for a while, but not the process that it loads for."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_without_memory)
    # Schedulers and terminals send signals to every process of a job, and the trainer still needs
    # its batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))
    # Where the trainer is killed, a worker may wait forever for it to empty a pipe.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # killed before this line
        os._exit(1)


def _end_without_memory(error: Exception, sample: Any) -> None:
    """End a loading process whose sample finds no shared memory; the trainer would wait for it."""
    del sample
    full = "shared memory" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
    # What the kernel does where the memory is found to be full later on.
    os.kill(os.getpid(), signal.SIGBUS if full else signal.SIGABRT)
