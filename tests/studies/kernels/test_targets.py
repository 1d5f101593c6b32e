"""The kernels compile for every GPU that the operator's page names."""

from __future__ import annotations

import re

import pytest
import torch
from support.kernels import INTERPRETED
from support.programs import ROOT
from triton.backends.compiler import GPUTarget

from gn_det.ops.form import FORMS
from gn_det.studies.kernels import machine_code
from gn_det.studies.kernels.report import launches_of

PAGE = (ROOT / "gn_det/ops/README.md").read_text()
TARGETS = sorted(set(re.findall(r"\b(?:sm_\d+|gfx\w+)", PAGE)))
GCN = ("gfx9",)  # whose waves have 64 threads


def target_of(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith(GCN) else 32)


def test_the_page_names_gpus_of_both_kinds_old_and_new() -> None:
    assert {"sm_50", "sm_75", "sm_90", "gfx942", "gfx1100"} <= set(TARGETS)
    assert machine_code.TARGETS.keys() <= set(TARGETS)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("name", TARGETS)
def test_the_kernels_compile_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine_code.TARGETS, name, target_of(name))
    # NVIDIA's disassembler does not read the code of old cards any more.
    for reader in ("_read_cubin", "_read_amdgcn"):
        monkeypatch.setattr(machine_code, reader, len)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((1, 32, 7, 7), (1, 64, 40, 48)):  # in one pass, and split
            directions = launches_of(
                shape, FORMS["GN+add+ReLU"], dtype, torch.contiguous_format, num_groups=4
            )
            for launch in (launch for launches in directions for launch in launches):
                assert machine_code.compile_launch(launch, name) > 0
