"""The public function on the CPU: its five forms against the paper's formula, and its refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.kernels import CHANNELS_LAST, CONTIGUOUS, DTYPES, check_against_reference, make_inputs
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gn_det.ops import group_norm
from gn_det.ops.form import FORMS, Form
from gn_det.ops.reference import group_norm_reference

CPU = torch.device("cpu")

SHAPES = [
    ((2, 64, 7, 9), 32),
    ((1, 48, 5, 5), 24),  # channels that are no power of two
    ((3, 6, 1, 1), 2),  # one pixel
    ((2, 24), 4),  # no spatial dimension
    ((2, 6, 11), 3),  # sequences
    ((2, 12, 3, 4, 5), 3),  # volumes
]

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def options_of(form: Form) -> dict[str, object]:
    """What group_norm is told besides tensors."""
    return {
        "activation": "relu" if form.relu else None,
        "normalize_residual": form.normalize_add,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
@every_form
def test_output_and_gradients_equal_the_papers_formula(
    form: Form, shape: tuple, num_groups: int, dtype: torch.dtype
) -> None:
    check_against_reference(form, num_groups, make_inputs(form, shape, CPU, dtype))


@every_form
def test_parameters_may_have_any_floating_dtype(form: Form) -> None:
    for dtype, parameter_dtype in [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float64),
        (torch.float32, torch.float16),
    ]:
        inputs = make_inputs(form, (2, 6, 4, 5), CPU, dtype, parameter_dtype=parameter_dtype)
        check_against_reference(form, 3, inputs)


def test_parameters_default_to_one_and_zero() -> None:
    x = torch.randn(2, 6, 4, 5)
    weight, bias = torch.randn(6), torch.randn(6)
    one, zero = torch.ones(6), torch.zeros(6)
    torch.testing.assert_close(group_norm(x, 3), group_norm(x, 3, one, zero))
    torch.testing.assert_close(group_norm(x, 3, weight), group_norm(x, 3, weight, zero))
    torch.testing.assert_close(group_norm(x, 3, bias=bias), group_norm(x, 3, one, bias))
    residual = {"residual": torch.randn_like(x), "normalize_residual": True}
    expected = group_norm(x, 3, **residual, residual_weight=one, residual_bias=zero)
    torch.testing.assert_close(group_norm(x, 3, **residual), expected)


@every_form
def test_float64_is_the_reference_itself(form: Form) -> None:
    inputs = make_inputs(form, (2, 6, 4, 5), CPU, torch.float64, parameter_dtype=torch.float64)
    y = group_norm(**inputs, num_groups=3, **options_of(form))
    assert torch.equal(y, group_norm_reference(**inputs, num_groups=3, **options_of(form)))


@every_form
def test_first_and_second_derivatives_pass_pytorchs_check_in_double_precision(form: Form) -> None:
    inputs = make_inputs(form, (2, 4, 3), CPU, torch.float64, parameter_dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(inputs, tensors, strict=True))
        return group_norm(**named, num_groups=2, **options_of(form))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 1.0])
def test_eps_is_added_to_both_variances(eps: float) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    check_against_reference(form, 3, make_inputs(form, (2, 6, 4, 5), CPU), eps=eps)


def test_one_group_is_layer_norm_and_a_group_a_channel_is_instance_norm() -> None:
    x = torch.randn(2, 6, 4, 5)
    assert torch.allclose(group_norm(x, 1), F.layer_norm(x, x.shape[1:]), atol=1e-5)
    assert torch.allclose(group_norm(x, 6), F.instance_norm(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@every_form
def test_an_empty_batch_gives_zero_not_missing_gradients(form: Form, dtype: torch.dtype) -> None:
    leaves = {
        name: tensor.requires_grad_()
        for name, tensor in make_inputs(form, (0, 8, 7, 7), CPU, dtype).items()
    }
    y = group_norm(**leaves, num_groups=4, **options_of(form))
    assert y.shape == (0, 8, 7, 7) and y.dtype == dtype
    y.sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@every_form
def test_the_layout_of_the_input_is_kept(form: Form, dtype: torch.dtype) -> None:
    flat = make_inputs(form, (2, 8, 6, 7), CPU, dtype)
    volume = make_inputs(form, (2, 8, 3, 4, 5), CPU, dtype)
    for layout, inputs in [
        (CONTIGUOUS, flat),
        (CHANNELS_LAST, flat),
        (CONTIGUOUS, volume),
        (torch.channels_last_3d, volume),
    ]:
        # The residual's layout does not matter: it stays contiguous.
        x = inputs["x"].contiguous(memory_format=layout)
        y = group_norm(**inputs | {"x": x}, num_groups=4, **options_of(form))
        assert y.is_contiguous(memory_format=layout), f"{layout}: {y.stride()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_a_slice_of_channels_last_gives_dense_channels_last(form: Form, dtype: torch.dtype) -> None:
    inputs = make_inputs(form, (2, 8, 6, 8), CPU, dtype, CHANNELS_LAST)
    images = {name: tensor for name, tensor in inputs.items() if tensor.dim() == 4}
    for sliced in (
        {name: image[:, :, ::2, 1:7] for name, image in images.items()},
        {name: image[1:, :, :, ::2] for name, image in images.items()},
    ):
        assert not sliced["x"].is_contiguous(memory_format=CHANNELS_LAST)
        y, _ = check_against_reference(form, 4, inputs | sliced)
        assert y.is_contiguous(memory_format=CHANNELS_LAST)


def test_an_input_of_any_strides_is_read_right() -> None:
    form = FORMS["GN+add+ReLU"]
    inputs = make_inputs(form, (2, 6, 4, 5), CPU)
    strange = {
        "x": torch.randn(5, 2, 4, 6).permute(1, 3, 2, 0),
        "residual": torch.randn(2, 6, 1, 1).expand(2, 6, 4, 5),
    }
    check_against_reference(form, 3, inputs | strange)


def test_the_inputs_are_left_as_they_were() -> None:
    form = FORMS["GN+GN+add+ReLU"]
    inputs = make_inputs(form, (2, 6, 4, 5), CPU)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    group_norm(**inputs, num_groups=3, **options_of(form))
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.filterwarnings("ignore:group_norm of an input")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("pixels", [(), (1,), (1, 1), (1, 1, 1)], ids=str)
def test_a_group_of_one_value_gives_the_bias_however_many_images(
    num_images: int, pixels: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(num_images, 8, *pixels, dtype=dtype)
    bias = torch.randn(8).to(dtype)
    y = group_norm(x, 8, torch.rand(8).to(dtype), bias)
    # Float32 rounds x - mean, and divides it by the square root of eps.
    torch.testing.assert_close(y, bias.view(8, *pixels).expand_as(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_layout_is_kept_on_a_gpu_without_triton(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("GN_DET_BACKEND", "aten")
    with FakeTensorMode():
        x = torch.randn(2, 8, 6, 7, dtype=dtype, device="cuda").to(memory_format=CHANNELS_LAST)
        assert group_norm(x, 4).is_contiguous(memory_format=CHANNELS_LAST)


def test_a_nan_stays_in_its_group_and_goes_through_relu() -> None:
    x = torch.randn(2, 6, 4, 5)
    x[1, 2, 0, 0] = torch.nan
    y = group_norm(x, 3, activation="relu")
    assert y[1, 2:4].isnan().all()
    assert y.isnan().sum() == y[1, 2:4].numel()


@every_form
def test_autocast_leaves_the_dtype_of_the_input(form: Form) -> None:
    inputs = make_inputs(form, (2, 8, 4, 4), CPU, torch.bfloat16)
    expected = group_norm(**inputs, num_groups=4, **options_of(form))
    with torch.autocast("cpu", torch.bfloat16):
        y = group_norm(**inputs, num_groups=4, **options_of(form))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["GN+add+ReLU", "GN+GN+add+ReLU", "GN+add"])
def test_autocast_casts_a_residual_to_the_inputs_dtype_and_its_gradient_back(name: str) -> None:
    form = FORMS[name]
    inputs = make_inputs(form, (2, 8, 4, 4), CPU, torch.bfloat16)
    residual = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = group_norm(**inputs | {"residual": residual}, num_groups=4, **options_of(form))
    cast = inputs | {"residual": residual.bfloat16()}
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, group_norm(**cast, num_groups=4, **options_of(form)))
    y.float().square().sum().backward()
    assert residual.grad.dtype == torch.float32
    assert residual.grad.any()


def test_outside_autocast_a_residual_of_another_dtype_is_refused_with_both() -> None:
    x = torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"residual is torch\.float32, the input torch\.bfloat16"):
        group_norm(x, 4, residual=x.float())
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=False),
        pytest.raises(TypeError, match=r"residual is torch\.float32"),
    ):
        group_norm(x, 4, residual=x.float())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@every_form
def test_meta_tensors_give_the_shape_and_dtype_of_the_output(
    form: Form, dtype: torch.dtype
) -> None:
    inputs = make_inputs(form, (2, 8, 4, 5), torch.device("meta"), dtype)
    y = group_norm(**inputs, num_groups=4, **options_of(form))
    assert (y.shape, y.dtype, y.device.type) == ((2, 8, 4, 5), dtype, "meta")


@pytest.mark.parametrize(
    ("message", "shape", "num_groups"),
    [
        ("48, is not a multiple of num_groups, 32", (1, 48, 2, 2), 32),
        ("8, is not a multiple of num_groups, 16", (1, 8, 2, 2), 16),
        ("8, is not a multiple of num_groups, 0", (1, 8, 2, 2), 0),
        ("8, is not a multiple of num_groups, -2", (1, 8, 2, 2), -2),
        (r"an input \(N, C, \*spatial\), got shape .*\[8\]", (8,), 4),
        (r"an input \(N, C, \*spatial\), got shape .*\[1, 8, 2, 2, 2, 2\]", (1, 8, 2, 2, 2, 2), 4),
        (r"nothing to normalize in an input of shape .*\[2, 8, 0, 3\]", (2, 8, 0, 3), 4),
        (r"nothing to normalize in an input of shape .*\[2, 0, 3\]", (2, 0, 3), 4),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_its_values(
    message: str, shape: tuple, num_groups: int
) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm(torch.zeros(shape), num_groups)


def test_an_integer_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
        group_norm(torch.zeros(1, 8, 2, 2, dtype=torch.int64), 4)


@pytest.mark.parametrize("name", ["weight", "bias", "residual_weight", "residual_bias"])
def test_a_parameter_that_does_not_fit_is_refused_by_its_name_with_both_values(name: str) -> None:
    x = torch.zeros(2, 8, 3, 3)

    def call(parameter: Tensor) -> None:
        group_norm(x, 4, residual=x, normalize_residual=True, **{name: parameter})

    with pytest.raises(ValueError, match=rf"^{name} has shape .*\[4\].* 8 channels"):
        call(torch.ones(4))
    with pytest.raises(ValueError, match=rf"^{name} has shape .*\[8, 1\].* 8 channels"):
        call(torch.ones(8, 1))
    with pytest.raises(TypeError, match=rf"^{name} needs a floating-point dtype.* torch\.int32"):
        call(torch.ones(8, dtype=torch.int32))
    with pytest.raises(ValueError, match=rf"^{name} is on meta, the input on cpu"):
        call(torch.ones(8, device="meta"))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"shape .*\[2, 8, 3, 4\].* input .*\[2, 8, 3, 3\]", {"size": (2, 8, 3, 4)}),
        (ValueError, r"shape .*\[2, 8, 1, 1\].* input .*\[2, 8, 3, 3\]", {"size": (2, 8, 1, 1)}),
        (TypeError, r"torch\.float64, the input torch\.float32", {"dtype": torch.float64}),
        (TypeError, r"torch\.int64, the input torch\.float32", {"dtype": torch.int64}),
        (ValueError, "on meta, the input on cpu", {"device": "meta"}),
    ],
)
def test_a_residual_that_does_not_fit_is_refused_with_both_values(
    error: type, message: str, change: dict
) -> None:
    residual = torch.zeros(**{"size": (2, 8, 3, 3), **change})
    with pytest.raises(error, match=f"^residual (is|has) .*{message}"):
        group_norm(torch.zeros(2, 8, 3, 3), 4, residual=residual)


def test_options_that_contradict_each_other_are_refused() -> None:
    x, parameter = torch.zeros(2, 8, 3, 3), torch.ones(8)
    with pytest.raises(ValueError, match="normalize_residual is set, but there is no residual"):
        group_norm(x, 4, normalize_residual=True)
    for name in ("residual_weight", "residual_bias"):
        for residual in (x, None):
            with pytest.raises(ValueError, match=f"{name}.* need normalize_residual=True"):
                group_norm(x, 4, residual=residual, **{name: parameter})


def test_an_unknown_activation_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match='activation is "gelu", not None or "relu"'):
        group_norm(torch.zeros(2, 8, 3, 3), 4, activation="gelu")
