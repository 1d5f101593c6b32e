"""The categories of a split, by themselves and by those of the training split."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from support.coco import dataset

from gn_det import InputError

Normalised = Callable[..., tuple[dict, Any]]
KNOWN = [(1, "box"), (2, "disc")]


def pairs(data: dict) -> list[tuple[int, str]]:
    return sorted((c["id"], c["name"]) for c in data["categories"])


def of_categories(*categories: tuple, used: dict[int, object] | None = None) -> Callable:
    """Set the categories, (id, name) or (id, name, supercategory), and ids of annotations."""

    def change(data: dict) -> None:
        keys = "id", "name", "supercategory"
        data["categories"] = [dict(zip(keys, c, strict=False)) for c in categories]
        for annotation in data["annotations"]:
            annotation["category_id"] = (used or {}).get(
                annotation["category_id"], annotation["category_id"]
            )

    return change


@pytest.mark.parametrize("kind", [str, float])
def test_ids_in_text_or_with_a_point_are_numbers(normalised: Normalised, kind: type) -> None:
    data, findings = normalised(of_categories((kind(1), "box"), (kind(2), "disc")))
    assert data == dataset() and findings.count("mended") == 2


@pytest.mark.parametrize(
    ("name", "mended"),
    [
        ("box\n", "box"),
        (" a\r\nbox ", "a box"),
        ("box\x1b[2J", "box\\x1b[2J"),
        ("\u202ebox", "\\u202ebox"),
        ("a  box", "a  box"),
        ("箱 \U0001f469\u200d\U0001f52c", "箱 \U0001f469\u200d\U0001f52c"),
    ],
)
def test_a_name_that_would_break_a_table_is_one_line(
    normalised: Normalised, name: str, mended: str
) -> None:
    data, findings = normalised(of_categories((1, name), (2, "disc")))
    assert pairs(data) == [(1, mended), (2, "disc")]
    assert findings.count("mended") == (name != mended)


@pytest.mark.parametrize(
    ("categories", "kept"),
    [
        ([(0, "shapes", "none"), (1, "box", "shapes"), (2, "disc", "shapes")], KNOWN),
        ([(0, "box", "none"), (1, "box", "box"), (2, "disc", "box")], KNOWN),
        ([(0, "shapes"), (1, "box", "shapes"), (2, "disc", "shapes")], KNOWN),
        ([(0, "_background_"), (1, "box"), (2, "disc")], KNOWN),
        # These are classes, if classes without objects.
        (
            [(0, "person", "person"), (1, "box", "thing"), (2, "disc", "thing")],
            [(0, "person"), *KNOWN],
        ),
        ([(1, "box"), (2, "disc"), (3, "star")], [*KNOWN, (3, "star")]),
        ([(0, "other", "none"), (1, "box", "none"), (2, "disc", "none")], [(0, "other"), *KNOWN]),
        ([(1, "box", "none"), (2, "disc", "box")], KNOWN),
    ],
)
def test_a_root_without_objects_is_left_out(
    normalised: Normalised, categories: list, kept: list
) -> None:
    data, findings = normalised(of_categories(*categories))
    assert pairs(data) == kept
    assert findings.count("mended") == len(categories) - len(kept)
    assert findings.changed == (len(categories) != len(kept))


@pytest.mark.parametrize("name", ["box", "box ", " box"])
def test_categories_of_one_name_are_one(normalised: Normalised, name: str) -> None:
    data, findings = normalised(of_categories((1, "box"), (2, name)))
    assert pairs(data) == [(1, "box")]
    assert {a["category_id"] for a in data["annotations"]} == {1}
    assert "same name: their objects are of the first" in findings.table()


@pytest.mark.parametrize(
    ("categories", "used"),
    [
        ([(1, "box"), (2, "disc")], None),
        ([(2, "disc"), (1, "box")], None),
        ([(1, "box")], {2: 1}),
        ([(2, "disc")], {1: 2}),
        ([(7, "box"), (9, "disc")], {1: 7, 2: 9}),
        ([(1, "disc"), (2, "box")], {1: 2, 2: 1}),
        ([(1, "disc")], {2: 1}),
        ([(0, "thing", "none"), (1, "box", "thing"), (2, "disc", "thing")], None),
        ([(1, "box"), (2, "disc"), (3, "star")], None),
        ([("1", "box"), ("2", "disc")], None),
    ],
)
def test_a_second_split_has_the_categories_of_the_first_by_name(
    normalised: Normalised, categories: list, used: dict | None
) -> None:
    data, findings = normalised(of_categories(*categories, used=used), known=KNOWN)
    assert pairs(data) == KNOWN
    names = {number: name for number, name, *_ in categories}
    names |= {int(number): name for number, name in names.items()}
    change = used or {}
    expected = {
        a["id"]: names[change.get(a["category_id"], a["category_id"])]
        for a in dataset()["annotations"]
    }
    # Those of one category in one picture are one object.
    found = {a["id"]: dict(KNOWN)[a["category_id"]] for a in data["annotations"]}
    assert found.items() <= expected.items() and {*found.values()} == {*expected.values()}
    assert findings.changed == (sorted(categories) != KNOWN)


@pytest.mark.parametrize(
    ("categories", "used"),
    [
        ([(1, "box"), (3, "star")], {2: 3}),
        ([(1, "Box"), (2, "disc")], None),
        ([(1, "star"), (2, "disc")], None),
    ],
)
def test_objects_of_a_category_that_is_not_known_are_refused(
    normalised: Normalised, categories: list, used: dict | None
) -> None:
    with pytest.raises(InputError, match=r"the model knows \[\(1, 'box'\), \(2, 'disc'\)\]: obj"):
        normalised(of_categories(*categories, used=used), known=KNOWN)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([("box", "box")], "category ids are no whole numbers .*'box'"),
        ([(None, "box")], "category ids are no whole numbers"),
        ([(1, None), (2, "disc")], "categories have no name"),
        ([(1, ""), (2, "")], "2 categories have no name .*1 '': ''; also 2"),
        ([(1, " "), (2, "disc")], "1 categories have no name"),
        ([(1, "\n"), (2, "disc")], "1 categories have no name"),
        ([(1, "box"), (1, "disc")], "category ids have two names .*'box', 'disc'"),
        ([(1, "box"), ("1", "disc")], "category ids have two names"),
        ([], "no category is declared"),
    ],
)
def test_categories_without_a_number_or_a_name_are_refused(
    normalised: Normalised, categories: list, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        normalised(of_categories(*categories))


def test_a_category_that_is_listed_twice_is_one(normalised: Normalised) -> None:
    data, findings = normalised(of_categories((1, "box"), (2, "disc"), (1, "box")))
    assert pairs(data) == KNOWN and findings.count("mended") == 1


def test_one_name_in_two_unicode_forms_is_one_class(normalised: Callable) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD"))
    data, findings = normalised(lambda d: d["categories"][0].update(name=decomposed))
    assert data["categories"][0]["name"] == composed
    assert "another Unicode form" in findings.table()
    known = [(1, decomposed), (2, "disc")]  # as a run of before has it
    data, _ = normalised(lambda d: d["categories"][0].update(name=composed), known=known)
    assert data["categories"][0]["name"] == composed


def test_a_class_in_another_case_is_named(normalised: Callable) -> None:
    with pytest.raises(InputError, match=r"did you mean BOX\?"):
        normalised(known=[(1, "BOX"), (2, "disc")])
