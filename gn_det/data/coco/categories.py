"""The categories of a COCO-format data set, and those of a second split by the first one's."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from gn_det.data.coco.findings import Findings, shown
from gn_det.data.coco.values import whole_number
from gn_det.errors import InputError
from gn_det.text import nearest, printable

__all__ = ["Known", "normalise_categories"]

Known = Sequence[tuple[int, str]]
_BACKGROUND = {"_background_", "__background__", "__ignore__"}


def normalise_categories(
    categories: list[dict[str, Any]], used: Collection[int], known: Known, findings: Findings
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Give categories whole ids and drop those that exporters add; or take those that are known.

    Args:
        categories: those of the JSON.
        used: ids that annotations have.
        known: (id, name) of the categories that a model or another split has; () for none.
        findings: told of everything that is mended, dropped or refused.

    Returns:
        The categories, and which of them an id of the JSON stands for.

    Raises:
        InputError: objects are of a category that is not known.
    """
    categories = _well_formed(categories, findings)
    known = [(number, unicodedata.normalize("NFC", name)) for number, name in known]
    findings.check()
    if not known:
        kept = _without_roots(categories, used, findings)
        return _of_one_name_each(kept, used, findings)
    ids = defaultdict(list)
    for number, name in known:
        ids[name].append(number)
    stands_for: dict[int, int] = {}
    unknown = []
    exact = {c["id"] for c in categories if (c["id"], c["name"]) in known}
    for category in categories:
        number, name = category["id"], category["name"]
        if number in exact:
            stands_for[number] = number
        elif len(ids[name]) == 1 and (number in used or ids[name][0] not in exact):
            stands_for[number] = ids[name][0]
            what = "categories have other ids than those of the same name that are known"
            findings.add("mended", what, _place(category), ids[name][0])
        elif number in used:
            unknown.append(category)
    declared = {c["id"]: c for c in categories}
    if unknown:
        names = [c["name"] for c in unknown]
        hints = "".join(nearest(name, [n for _, n in known]) for name in names[:1])
        raise InputError(
            f"{findings.json_file} declares the categories "
            f"{shown(sorted((c['id'], c['name']) for c in categories))}, the model knows "
            f"{shown(list(known))}: objects are of {', '.join(map(shown, names))}{printable(hints)}"
        )
    for category in categories:
        if category["id"] not in stands_for:
            findings.add("mended", "categories without objects are left out", _place(category))
    for number, name in known:
        if name not in {c["name"] for c in categories}:
            what = "categories are known and not listed here: added, without objects"
            findings.add("mended", what, f"category {number}", name)
    kept = []
    for number, name in known:
        mine = declared.get(number, {})
        kept.append(mine if mine.get("name") == name else _named(categories, number, name))
    if {c["id"] for c in kept} != {c["id"] for c in categories}:
        findings.changed = True
    return kept, stands_for


def _named(categories: list[dict[str, Any]], number: int, name: str) -> dict[str, Any]:
    """The category of a name, with another id."""
    others = (category for category in categories if category["name"] == name)
    return {**next(others, {}), "id": number, "name": name}


def _well_formed(categories: list[dict[str, Any]], findings: Findings) -> list[dict[str, Any]]:
    by_id: dict[int, dict[str, Any]] = {}
    for index, category in enumerate(categories):
        number, name = whole_number(category.get("id")), category.get("name")
        if number is None:
            what = "category ids are no whole numbers"
            findings.add("refused", what, f"categories[{index}]", category.get("id"))
            continue
        if type(category["id"]) is not int:
            findings.add("mended", "category ids written as text or 1.0", _place(category))
            category["id"] = number
        if type(name) in (int, float):
            findings.add("mended", "category names written as numbers", _place(category))
            category["name"] = name = str(name)
        if isinstance(name, str) and printable(name) != name:
            # Detectron2 prints names in tables, where a line break would begin a line of its own.
            what = "category names with line breaks or characters that cannot be shown"
            findings.add("mended", what, _place(category))
            category["name"] = name = printable(" ".join(name.split()))
        elif isinstance(name, str) and name.strip() != name:
            findings.add("mended", "category names with spaces around", _place(category))
            category["name"] = name = name.strip()
        if isinstance(name, str) and not unicodedata.is_normalized("NFC", name):
            findings.add("mended", "category names in another Unicode form", _place(category))
            category["name"] = name = unicodedata.normalize("NFC", name)
        if not isinstance(name, str) or not name:
            findings.add("refused", "categories have no name", _place(category), name)
        elif number not in by_id:
            by_id[number] = category
        elif by_id[number]["name"] == name:
            findings.add("mended", "categories are listed twice", _place(category))
        else:
            names = by_id[number]["name"], name
            findings.add("refused", "category ids have two names", f"category {number}", *names)
    if not categories:
        findings.add("refused", "no category is declared", "categories", [])
    return list(by_id.values())


def _without_roots(
    categories: list[dict[str, Any]], used: Collection[int], findings: Findings
) -> list[dict[str, Any]]:
    """Leave out what stands for no class: the name of all classes together, or the background."""
    parents = [c.get("supercategory") for c in categories]
    roots = [
        c
        for c in categories
        if c["id"] not in used
        and (
            c["name"] in _BACKGROUND
            or (c["name"] in parents and c.get("supercategory") in (None, "", "none"))
        )
    ]
    for category in roots:
        what = "root categories without objects, as exporters add them: left out"
        findings.add("mended", what, _place(category))
    return [c for c in categories if c not in roots]


def _of_one_name_each(
    categories: list[dict[str, Any]], used: Collection[int], findings: Findings
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Categories that have objects and the same name, as of joined data sets, are one."""
    first_of: dict[str, int] = {}
    stands_for = {}
    for category in categories:
        number, name = category["id"], category["name"]
        first = first_of.setdefault(name, number) if number in used else number
        stands_for[number] = first
        if first != number:
            what = "categories have the same name: their objects are of the first"
            findings.add("mended", what, _place(category), first)
    return [c for c in categories if stands_for[c["id"]] == c["id"]], stands_for


def _place(category: dict[str, Any]) -> str:
    name = category.get("name")
    return f"category {shown(category['id'])}" + (f" {shown(name)}" if name is not None else "")
