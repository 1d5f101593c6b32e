"""Compile kernels for GPUs that are not there, and read the machine code.

Triton compiles ahead of time for any target, and its wheel holds NVIDIA's disassembler. What is
looked at is the code of the launches that gn_det makes, from the same arguments.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gn_det.ops.kernels.launch import Launch

__all__ = ["TARGETS", "MachineCode", "compile_launch", "scattered_sums"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class MachineCode:
    """What the code of one kernel for one target does.

    Attributes:
        registers: of a thread.
        spill_bytes: stack of a thread on NVIDIA, spilled registers on AMD.
        loads, stores: global loads and stores by width in bits, in the loop where there is one.
        divisions: integer divisions, each a conversion from float to integer, likewise.
        atomics: atomic operations on global memory.
    """

    registers: int
    spill_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    divisions: int
    atomics: int


def compile_launch(launch: Launch, target: str, aligned: bool = True) -> MachineCode:
    """Compile a launch, of tensors that may be on the meta device, for one of TARGETS.

    Args:
        aligned: whether the tensors start at multiples of 16 bytes, as PyTorch allocates them.
    """
    compiled = _compile(launch, TARGETS[target], aligned)
    if TARGETS[target].backend == "hip":
        return _read_amdgcn(compiled.asm["amdgcn"])
    return _read_cubin(compiled.asm["cubin"])


def scattered_sums(launch: Launch, target: str) -> int:
    """Reductions of a launch over threads of a warp that are no neighbours.

    Triton 3.3 to 3.7 sums others in their place: of every layout it takes a run of threads.
    """
    ttgir = _compile(launch, TARGETS[target], aligned=True).asm["ttgir"]
    # #linear = #ttg.linear<{register = [], lane = [[0, 1], [1, 0], [0, 2], ...], warp = ...}>
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.linear<\{.*lane = (\[.*\]), warp", ttgir, re.M))
    reduction = r'"tt\.reduce"[^\n]*axis = (\d).*?\}\) : \(tensor<[^\n]*?, (#\w+)>\) ->'
    count = 0
    for axis, layout in re.findall(reduction, ttgir, re.S):
        lanes = json.loads(layouts.get(layout, "[]"))
        bits = [bit for bit, basis in enumerate(lanes) if basis[int(axis)]]
        count += bits != [*range(bits[0], bits[-1] + 1)] if bits else 0
    return count


def _compile(launch: Launch, gpu: GPUTarget, aligned: bool) -> Any:
    names = launch.kernel.arg_names
    signature, attributes = {}, {}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    for index, argument in enumerate(launch.arguments):
        if argument is None:
            constants[(index,)] = None
        elif isinstance(argument, Tensor):
            signature[names[index]] = _POINTERS[argument.dtype]
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[names[index]] = "fp32" if isinstance(argument, float) else "i32"
    signature = {name: signature.get(name, "constexpr") for name in names}
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=gpu,
        options=launch.options(gpu.warp_size, nvidia=gpu.backend == "cuda"),
    )


def _read_cubin(cubin: bytes) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_CUOBJDUMP, "--dump-resource-usage", file.name)
        sass = _run(_CUOBJDUMP, "-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # /*0a30*/   @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?) ;", sass)
    position = {int(address, 16): index for index, (address, _) in enumerate(code)}
    instructions = [text for _, text in code]
    hot = _hot(instructions, lambda text: _sass_successor(text, position))
    return MachineCode(
        registers=registers,
        spill_bytes=stack + sum("LDL" in text or "STL" in text for text in instructions),
        loads=_sass_widths("LDG", hot),
        stores=_sass_widths("STG", hot),
        divisions=sum("F2I" in text for text in hot),
        atomics=sum(bool(re.search(r"\b(ATOMG?|RED)\b", text)) for text in instructions),
    )


def _sass_successor(text: str, position: dict[int, int]) -> tuple[int | None, bool]:
    if match := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text):
        return position[int(match.group(1), 16)], text.startswith("@") or ", 0x" in text
    return None, text.startswith("@") or not re.search(r"\b(EXIT|RET)\b", text)


def _sass_widths(operation: str, code: list[str]) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for text in code:
        if match := re.search(rf"\b{operation}\.E((?:\.\w+)*)", text):
            suffix = re.search(r"\.(128|64|U16|S16|U8)\b", match.group(1))
            width = suffix.group(1).lstrip("US") if suffix else "32"
            widths[int(width)] += 1
    return dict(widths)


def _read_amdgcn(assembly: str) -> MachineCode:
    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))

    code = [line.split(";")[0].strip() for line in assembly.splitlines()]
    labels = {line[:-1]: number for number, line in enumerate(code) if line.endswith(":")}
    hot = _hot(code, lambda line: _amdgcn_successor(line, labels))
    return MachineCode(
        registers=metadata("vgpr_count"),
        spill_bytes=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        loads=_amdgcn_widths("load", hot),
        stores=_amdgcn_widths("store", hot),
        divisions=sum(line.startswith("v_cvt_u32_f32") for line in hot),
        atomics=sum("_atomic_" in line for line in code),
    )


def _amdgcn_successor(line: str, labels: dict[str, int]) -> tuple[int | None, bool]:
    if line.startswith(("s_cbranch", "s_branch")):
        return labels[line.split()[-1]], line.startswith("s_cbranch")
    return None, not line.startswith("s_endpgm")


def _amdgcn_widths(operation: str, code: list[str]) -> dict[int, int]:
    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
    widths: Counter[int] = Counter()
    for line in code:
        if match := re.match(rf"(?:global|buffer)_{operation}_(\w+?)(?:_d16\w*)?\s", line):
            widths[bits[match.group(1)]] += 1
    return dict(widths)


def _hot(code: list[str], successor: Callable[[str], tuple[int | None, bool]]) -> list[str]:
    """The instructions that run more than once, or, without a loop, all.

    successor gives where an instruction jumps to, if it does, and whether it may also fall through.
    """
    edges: list[list[int]] = []
    for index, text in enumerate(code):
        target, falls_through = successor(text)
        following = [index + 1] if falls_through and index + 1 < len(code) else []
        edges.append(following + ([] if target is None else [target]))
    reverse: list[list[int]] = [[] for _ in code]
    live = {0} | _reachable(0, edges)
    for index in live:
        for target in edges[index]:
            reverse[target].append(index)
    heads = {target for index in live for target in edges[index] if target <= index}
    inside = set().union(*(_reachable(head, edges) & _reachable(head, reverse) for head in heads))
    return [code[index] for index in sorted(inside)] or code


def _reachable(start: int, edges: list[list[int]]) -> set[int]:
    """What can be reached from start along edges; start only if it lies on a cycle."""
    found: set[int] = set()
    todo = list(edges[start])
    while todo:
        index = todo.pop()
        if index not in found:
            found.add(index)
            todo.extend(edges[index])
    return found


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
