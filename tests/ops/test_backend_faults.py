"""Where the kernels cannot be compiled, loaded or launched: one warning, and ATen from then on."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.kernels import DTYPES, LAYOUTS, check_against_reference, make_inputs
from support.programs import ROOT
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from gn_det.errors import InputError
from gn_det.ops import group_norm, guarded
from gn_det.ops.form import FORMS
from gn_det.ops.kernels import launch
from gn_det.ops.obstacles import obstacle_of

pytestmark = pytest.mark.usefixtures("as_on_a_new_process")


@pytest.fixture
def launches_raise(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], list[int]]:
    """Tensors on the CPU go to the kernels, whose launches raise; the list counts them."""
    module = importlib.import_module("gn_det.ops.group_norm")
    monkeypatch.setattr(module, "kernels_run_on", lambda device_type: True)

    def raising(error: Exception) -> list[int]:
        tried: list[int] = []

        def run(launches: list, device: torch.device) -> None:
            tried.append(len(launches))
            raise error

        monkeypatch.setattr(launch, "run", run)
        return tried

    return raising


PTXAS = "Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal   : "

# What Triton, CUDA and the system say, and words of what to do about it.
ERRORS = {
    "no compiler": (RuntimeError("Failed to find C compiler. Please specify via CC"), "gcc"),
    "a cache whose file is gone": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/home/u/.triton/k.json"),
        "remove Triton's",
    ),
    "a read-only cache": (
        OSError(errno.EROFS, "Read-only file system", "/home/u/.triton"),
        "TRITON_CACHE_DIR",
    ),
    "a cache of another user": (
        PermissionError(errno.EACCES, "Permission denied", "/home/other/.triton"),
        "TRITON_CACHE_DIR",
    ),
    "a cache that is a file": (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/home/u/.triton/cache"),
        "TRITON_CACHE_DIR",
    ),
    "no home": (RuntimeError("Could not create or locate cache dir"), "TRITON_CACHE_DIR"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), "room"),
    "a cache mounted noexec": (
        ImportError("cuda_utils.so: failed to map segment from shared object"),
        "noexec",
    ),
    "a half-written library": (ImportError("cuda_utils.so: file too short"), "remove Triton's"),
    "a library of another Python": (
        ImportError("launcher.so: undefined symbol: _PyThreadState_UncheckedGet"),
        "remove Triton's",
    ),
    "half-written metadata": (json.JSONDecodeError("Expecting value", "", 0), "remove Triton's"),
    "a half-written cubin": (
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        "remove Triton's",
    ),
    "no driver": (AssertionError("libcuda.so cannot found!\nPlease make sure"), "ldconfig"),
    "no active driver": (RuntimeError("0 active drivers ([]). There should be one."), "no dr"),
    "an old driver": (
        RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported "
                     "toolchain."),
        "update the driver",
    ),
    "too old a card": (
        PTXASError(PTXAS + "Value 'sm_60' is not defined for option 'gpu-name'"),
        "too old",
    ),
    "no image for the card": (
        RuntimeError("Triton Error [CUDA]: no kernel image is available for execution"),
        "too old",
    ),
    "bfloat16 without hardware": (
        PTXASError(PTXAS + "Feature '.bf16' requires .target sm_80 or higher"),
        "no bfloat16",
    ),
    "out of shared memory": (OutOfResources(166400, 101376, "shared memory"), "101376"),
    "what nobody has seen": (ValueError("the moon is in the wrong phase"), "the moon is in the"),
}  # fmt: skip

every_error = pytest.mark.parametrize(("error", "advice"), ERRORS.values(), ids=ERRORS)


@every_error
def test_training_goes_on_with_atens_operators_and_one_warning(
    error: Exception, advice: str, launches_raise: Callable
) -> None:
    tried = launches_raise(error)
    form = FORMS["GN+add+ReLU"]
    with pytest.warns(UserWarning) as said:
        for _ in range(3):
            check_against_reference(form, 3, make_inputs(form, (2, 6, 5, 7), torch.device("cpu")))
    (text,) = [str(warning.message) for warning in said]
    assert text.startswith("group_norm on cpu in float32 runs on ATen's operators, not on its")
    assert advice in text and "\n" not in text and len(text) < 700
    assert str(error).splitlines()[0][:30] in text
    assert len(tried) == 1, "later calls do not try again"


@every_error
def test_where_the_kernels_are_insisted_on_it_is_an_error_at_every_call(
    error: Exception, advice: str, launches_raise: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches_raise(error)
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
    for _ in range(2):
        with pytest.raises(InputError, match="^GN_DET_BACKEND=triton, but the kernels do not work"):
            group_norm(torch.randn(2, 6, 5, 7), 3)
    monkeypatch.setenv("GN_DET_BACKEND", "auto")
    with pytest.warns(UserWarning, match="runs on ATen's operators"):
        group_norm(torch.randn(2, 6, 5, 7), 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: unspecified launch failure"),
        RuntimeError("Cannot re-initialize CUDA in forked subprocess."),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_aten_could_not_mend_either_is_raised_as_it_is(
    error: BaseException, launches_raise: Callable
) -> None:
    launches_raise(error)
    with pytest.raises(type(error)) as raised:
        group_norm(torch.randn(2, 6, 5, 7), 3)
    assert raised.value is error
    assert not any(guarded._verdicts.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_atens_stand_in_is_right_in_every_form(
    form, layout: torch.memory_format, dtype: torch.dtype, launches_raise: Callable
) -> None:
    launches_raise(RuntimeError("Failed to find C compiler."))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for shape in ((2, 6, 5, 7), (3, 6, 1, 2), (1, 6, 33, 40)):
            inputs = make_inputs(form, shape, torch.device("cpu"), dtype, layout)
            y, gradients = check_against_reference(form, 3, inputs)
            assert y.is_contiguous(memory_format=layout)
            assert gradients["x"].is_contiguous(memory_format=layout)
            without = {name: inputs[name] for name in inputs if name not in ("weight", "bias")}
            check_against_reference(form, 3, without)
        for shape in ((2, 6), (2, 6, 9), (2, 6, 3, 4, 5)):
            check_against_reference(form, 3, make_inputs(form, shape, torch.device("cpu"), dtype))
        empty = torch.zeros(0, 6, 5, 7, dtype=dtype, requires_grad=True)
        group_norm(empty, 3, activation="relu").sum().backward()
        assert empty.grad.shape == empty.shape


def test_a_kernel_that_fails_in_the_backward_pass_alone_leaves_right_gradients(
    monkeypatch: pytest.MonkeyPatch, launches_raise: Callable
) -> None:
    """Its launches need more shared memory; the forward pass ran on the kernels."""
    launches_raise(OutOfResources(166400, 101376, "shared memory"))
    failing = launch.run
    outputs = {}
    truth = guarded.aten.forward

    def forward_runs(launches: list, device: torch.device) -> None:
        if launches[0].kernel.__name__ not in ("one_pass_kernel", "statistics_kernel"):
            failing(launches, device)
        named = dict(zip(launches[-1].kernel.arg_names, launches[-1].arguments, strict=False))
        y, statistics = truth(outputs["inputs"], 3, 1e-5, FORMS["GN+ReLU"])
        named["y_ptr"].copy_(y)
        named["statistics_ptr"].copy_(statistics)

    launches_of = launch.Forward.__call__

    def keep(forward: launch.Forward, *inputs: Tensor | None) -> tuple:
        outputs["inputs"] = launch.Inputs(*inputs)
        return launches_of(forward, *inputs)

    monkeypatch.setattr(launch, "run", forward_runs)
    monkeypatch.setattr(launch.Forward, "__call__", keep)
    form = FORMS["GN+ReLU"]
    with pytest.warns(UserWarning, match="too little on a multiprocessor"):
        check_against_reference(form, 3, make_inputs(form, (2, 6, 5, 7), torch.device("cpu")))


def test_one_dtype_that_fails_leaves_the_others_their_kernels(
    launches_raise: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = launches_raise(PTXASError(PTXAS + "Feature '.bf16' requires .target sm_80"))
    with pytest.warns(UserWarning, match="on cpu in bfloat16 runs on ATen"):
        group_norm(torch.randn(2, 6, 5, 7).bfloat16(), 3)
    assert guarded.kernels_work(torch.device("cpu"), torch.float32)
    assert not guarded.kernels_work(torch.device("cpu"), torch.bfloat16)
    assert len(tried) == 1


def test_a_compiled_model_goes_on_as_well(launches_raise: Callable) -> None:
    launches_raise(RuntimeError("Failed to find C compiler."))
    function = torch.compile(lambda x: group_norm(x, 3, activation="relu"), backend="aot_eager")
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    with pytest.warns(UserWarning, match="runs on ATen's operators"):
        y = function(x)
        y.backward(torch.ones_like(y))
    expected = torch.nn.functional.group_norm(x, 3).relu()
    torch.testing.assert_close(y, expected)


# What happens for real, as far as it can be brought about without a GPU.


def build_a_launcher(folder: Path) -> None:
    """What Triton does at the first launch: compile C against Python's headers, then load it."""
    build = pytest.importorskip("triton.runtime.build")
    if not hasattr(build, "compile_module_from_src"):
        pytest.skip("this Triton builds it elsewhere")
    build._find_compiler.cache_clear()
    source = (
        "#include <Python.h>\n"
        'static struct PyModuleDef d = {PyModuleDef_HEAD_INIT, "tiny", NULL, -1, NULL};\n'
        "PyMODINIT_FUNC PyInit_tiny(void) { return PyModule_Create(&d); }\n"
    )
    try:
        build.compile_module_from_src(src=source, name="tiny")
    finally:
        build._find_compiler.cache_clear()


def without_compiler(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.delenv("CC", raising=False)
    patch.setenv("PATH", str(folder))


def with_a_compiler_that_is_gone(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CC", str(folder / "cc-9"))


def with_a_compiler_that_fails(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CC", "false")


def without_headers(patch: pytest.MonkeyPatch, folder: Path) -> None:
    paths = sysconfig.get_paths()
    patch.setenv("CC", "false")  # on some systems the compiler finds them by itself
    patch.setattr(sysconfig, "get_paths", lambda **_: paths | {"include": str(folder)})


def with_a_cache_that_cannot_be(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    patch.setenv("TRITON_CACHE_DIR", str(folder / "file" / "cache"))


@pytest.mark.parametrize(
    ("spoil", "advice"),
    [
        (without_compiler, "apt-get install gcc"),
        (with_a_compiler_that_is_gone, "CC names a C compiler that cannot be run"),
        (with_a_compiler_that_fails, "the C compiler .* failed; it says why above"),
        (without_headers, r"no .*/Python.h; install .*python3\.\d+-dev"),
        (with_a_cache_that_cannot_be, "set TRITON_CACHE_DIR to a folder that can"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_triton_itself_raises_in_a_slim_container_is_understood(
    spoil: Callable, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    spoil(monkeypatch, tmp_path)
    with pytest.raises(Exception) as raised:
        build_a_launcher(tmp_path)
    assert re.search(advice, obstacle_of(raised.value))


COMPILE = """
import torch
from gn_det.ops.form import FORMS
from gn_det.studies.kernels.machine_code import compile_launch
from gn_det.studies.kernels.report import launches_of

forward, _ = launches_of((2, 6, 5, 7), FORMS["GN"], torch.float32, torch.contiguous_format,
                         num_groups=3)
print(compile_launch(forward[0], "sm_90").registers > 0)
"""


def compiling(cache: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_that_compile_at_once_and_one_that_finds_half_of_it_get_their_kernel(
    tmp_path: Path,
) -> None:
    for done in [compiling(tmp_path) for _ in range(2)]:
        out, errors = done.communicate()
        assert out == "True\n", errors
    groups = list(tmp_path.rglob("__grp__*.json"))
    assert groups
    for group in groups:  # what a full disk or a crash leaves
        group.write_bytes(group.read_bytes()[:10])
    out, errors = compiling(tmp_path).communicate()
    assert out == "True\n", errors


def test_threads_that_come_at_once_wait_for_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    started, going_on = threading.Event(), threading.Event()
    checks = []

    def slow(device: torch.device, dtype: torch.dtype) -> None:
        checks.append(device)
        started.set()
        going_on.wait()

    monkeypatch.setattr(guarded, "find_mismatch", slow)
    gpu = torch.device("meta")  # any that is not the CPU
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(guarded.kernels_work(gpu, torch.float32)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    started.wait()
    going_on.set()
    for thread in threads:
        thread.join()
    assert found == [True] * 4 and len(checks) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_forked_during_a_check_or_after_it_goes_on(launches_raise: Callable) -> None:
    def child_works() -> bool:
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)  # OpenMP's threads are not in the child
            x: Tensor = torch.ones(1, 6, 2, 2)
            os._exit(0 if group_norm(x, 3).shape == x.shape else 1)
        return os.waitpid(process, 0)[1] == 0

    launches_raise(RuntimeError("Failed to find C compiler."))
    with guarded._checking:  # by a thread that is not in the child
        assert child_works()
    with pytest.warns(UserWarning):
        group_norm(torch.ones(1, 6, 2, 2), 3)
    assert child_works()
