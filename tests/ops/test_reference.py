"""The paper's formula as written here, against PyTorch in double precision and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.kernels import make_inputs
from torch import Tensor

from gn_det.ops.form import FORMS, Form
from gn_det.ops.reference import group_norm_reference

CPU = torch.device("cpu")


def pytorchs(form: Form, num_groups: int, inputs: dict[str, Tensor], eps: float) -> Tensor:
    """A form out of PyTorch's operators."""
    y = F.group_norm(inputs["x"], num_groups, inputs["weight"], inputs["bias"], eps)
    if form.normalize_add:
        parameters = inputs["residual_weight"], inputs["residual_bias"]
        y = y + F.group_norm(inputs["residual"], num_groups, *parameters, eps)
    elif form.add:
        y = y + inputs["residual"]
    return F.relu(y) if form.relu else y


@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((2, 12, 5, 3), 4), ((3, 6), 2), ((2, 6, 7), 1), ((1, 6, 2, 3, 4), 6), ((0, 6, 2, 2), 3)],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_output_and_gradients_equal_pytorchs_in_double_precision(
    form: Form, shape: tuple, num_groups: int
) -> None:
    inputs = make_inputs(form, shape, CPU, torch.float64, parameter_dtype=torch.float64)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y = group_norm_reference(
        **leaves,
        num_groups=num_groups,
        eps=1e-3,
        activation="relu" if form.relu else None,
        normalize_residual=form.normalize_add,
    )
    expected = pytorchs(form, num_groups, leaves, 1e-3)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    dy = torch.randn(shape, dtype=torch.float64)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    truth = torch.autograd.grad(expected, list(leaves.values()), dy)
    for name, ours, theirs in zip(leaves, gradients, truth, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12, msg=f"d{name}")


def test_equals_a_group_worked_out_by_hand() -> None:
    # One group of 1, 3, 5, 7: mean 4, biased variance 5, so with eps 4 the divisor is 3.
    x = torch.tensor([1.0, 3.0, 5.0, 7.0]).reshape(1, 2, 2)
    y = group_norm_reference(x, 1, torch.tensor([3.0, 6.0]), torch.tensor([10.0, 20.0]), 4.0)
    assert y.tolist() == [[[7.0, 9.0], [22.0, 26.0]]]


def test_groups_are_neighbouring_channels_of_one_sample() -> None:
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    y = group_norm_reference(x, 3, eps=0.0)
    for sample in range(2):
        for group in range(3):
            values = y[sample, 2 * group : 2 * group + 2]
            assert abs(values.mean()) < 1e-12
            assert abs(values.square().mean() - 1) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_is_computed_and_returned_in_double_precision(dtype: torch.dtype) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    inputs = make_inputs(form, (2, 6, 4, 5), CPU, dtype, parameter_dtype=dtype)
    options = {"num_groups": 3, "activation": "relu", "normalize_residual": True}
    y = group_norm_reference(**inputs, **options)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    assert y.dtype == torch.float64
    assert torch.equal(y, group_norm_reference(**doubles, **options))


def test_an_added_residual_of_less_precision_is_widened() -> None:
    x = torch.randn(2, 6, 4, 5, dtype=torch.bfloat16)
    y = group_norm_reference(x, 3, residual=x)
    assert y.dtype == torch.float64
    assert torch.equal(y, group_norm_reference(x, 3) + x.double())
