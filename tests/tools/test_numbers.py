"""Numbers of flags that no program can use."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gn_det import InputError

DATA = "--train train.json images"
COMPARE = f"compare --recipes a.yaml --output o {DATA}"
CONVERT = f"convert_bn_to_gn --config-file a.yaml --output o {DATA}"
CLASSIFY = "--output o --data digits"
SWEEP = f"batch_size_sweep {CLASSIFY}"

# Program and its other flags, the flag, values that are refused.
FLAGS = [
    (COMPARE, "--ims-per-gpu", "0 -1"), (COMPARE, "--seeds", "-1"),
    (COMPARE, "--lrs", "0 -1 nan inf"), (COMPARE, "--steps", "0 -1"), (COMPARE, "--jobs", "0"),
    (COMPARE, "--distill", "0"), (COMPARE, "--num-gpus", "0"),
    (CONVERT, "--calibration-images", "0"), (CONVERT, "--distill", "-1"),
    (CONVERT, "--fine-tune", "-1"), (CONVERT, "--lr", "0 nan"), (SWEEP, "--jobs", "0"),
    (SWEEP, "--seeds", "-1"), (SWEEP, "--num-workers", "-1 257"),
    (f"feature_distribution {CLASSIFY}", "--records", "0"),
    ("train_test_gap --output o a", "--batch-sizes", "0"),
    ("plan_memory --config-file a.yaml", "--ims-per-gpu", "0"),
    ("benchmark_group_norm", "--ims-per-gpu", "0"), ("recommend data", "--num-gpus", "0"),
    ("recommend data", "--gpus", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flag", "values"), FLAGS)
def test_they_are_refused_by_name_before_anything_begins(
    command: str, flag: str, values: str, call_main: Callable
) -> None:
    program, *others = command.split()
    for value in values.split():
        with pytest.raises(InputError, match=f"^{flag} {float(value):g}.*: (at|a finite)"):
            call_main(f"tools/{program}.py", *others, f"{flag}={value}")
