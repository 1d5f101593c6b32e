"""Form: its five values, how they print, and when the output is kept."""

from __future__ import annotations

from gn_det.ops.form import FORMS, Form


def test_a_form_prints_what_one_call_computes() -> None:
    assert [str(form) for form in FORMS.values()] == [
        "GN",
        "GN+ReLU",
        "GN+add",
        "GN+add+ReLU",
        "GN+GN+add+ReLU",
    ]
    assert f"{Form(add=True, normalize_add=True)}" == "GN+GN+add"


def test_a_form_is_found_by_what_it_prints() -> None:
    assert all(FORMS[str(form)] is form for form in FORMS.values())


def test_only_a_relu_behind_a_plain_addition_needs_the_output_again() -> None:
    assert [name for name, form in FORMS.items() if form.keeps_output] == ["GN+add+ReLU"]
