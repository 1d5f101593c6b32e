"""PyTorch's own samples for its group_norm, good and bad, through ours."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from gn_det.ops import group_norm

# Their import forbids to set torch.backends.cudnn.benchmark in this process, as training does.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import OpInfo, SampleInput

OPERATOR: OpInfo = next(op for op in op_db if op.name == "nn.functional.group_norm")


def samples(dtype: torch.dtype) -> list[SampleInput]:
    """The small ones, and those that PyTorch compares with NumPy."""
    return [
        *OPERATOR.sample_inputs("cpu", dtype, requires_grad=True),
        *OPERATOR.reference_inputs("cpu", dtype, requires_grad=True),
    ]


def in_float32_or_wider(value: object) -> object:
    if not isinstance(value, Tensor) or value.dtype == torch.float64:
        return value
    return value.detach().float().requires_grad_(value.requires_grad)


def results(function: object, sample: SampleInput, dy: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the parameters that there are."""
    y = function(sample.input, *sample.args, **sample.kwargs)
    tensors = [sample.input, *sample.kwargs.values()]
    leaves = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", sorted(OPERATOR.dtypes, key=str), ids=str)
def test_output_and_all_gradients_are_those_of_pytorch(dtype: torch.dtype) -> None:
    num_results = []
    for sample in samples(dtype):
        dy = torch.randn_like(sample.input)
        ours = results(group_norm, sample, dy)
        # PyTorch's own in 16 bits rounds between its steps, and loses the gradient of a group of
        # two elements altogether.
        truth = results(OPERATOR.op, sample.transform(in_float32_or_wider), dy)
        for actual, expected in zip(ours, truth, strict=True):
            assert actual.dtype == dtype
            # Samples with a negative eps may have a root of a negative number.
            torch.testing.assert_close(actual, expected.to(dtype), equal_nan=True)
        num_results.append(len(ours))
    # One sample has no parameters, the others have both.
    assert set(num_results) == {2, 4}
    assert len(num_results) > 50


@pytest.mark.parametrize(
    "bad",
    [pytest.param(bad, id=bad.error_regex) for bad in OPERATOR.error_inputs("cpu")],
)
def test_what_pytorch_refuses_is_refused(bad: object) -> None:
    sample = bad.sample_input
    with pytest.raises(bad.error_type, match=bad.error_regex):
        OPERATOR.op(sample.input, *sample.args, **sample.kwargs)
    with pytest.raises((ValueError, TypeError)):
        group_norm(sample.input, *sample.args, **sample.kwargs)
