"""How many groups: the default, and what Groups makes of the two ways to say another number."""

from __future__ import annotations

import pytest

from gn_det import InputError
from gn_det.layers import Groups, default_num_groups


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(256, 32), (64, 32), (48, 24), (40, 20), (33, 11), (37, 1), (16, 16), (1, 1), (96, 32)],
)
def test_the_default_is_the_largest_divisor_up_to_32(channels: int, groups: int) -> None:
    assert default_num_groups(channels) == Groups().of(channels) == groups


def test_the_default_refuses_no_channels() -> None:
    with pytest.raises(ValueError, match="got 0 and 32"):
        default_num_groups(0)


def test_num_groups_is_a_limit_where_channels_do_not_divide() -> None:
    assert [Groups(num_groups=8).of(channels) for channels in (64, 36, 7)] == [8, 6, 7]


def test_channels_per_group_counts_the_other_way() -> None:
    assert [Groups(channels_per_group=16).of(channels) for channels in (64, 36, 7)] == [4, 3, 1]


def test_both_ways_at_once_and_numbers_below_1_are_refused() -> None:
    with pytest.raises(InputError, match="num_groups 8 and channels_per_group 4 are two ways"):
        Groups(8, 4)
    for name, number in (("num_groups", 0), ("channels_per_group", -1)):
        with pytest.raises(InputError, match=f"{name} is {number}, and has to be at least 1"):
            Groups(**{name: number})


def test_groups_know_whether_a_number_was_given() -> None:
    assert Groups().is_default
    assert not Groups(num_groups=32).is_default and not Groups(channels_per_group=8).is_default


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, [32, 32, 16, 1]),
        ({"min_channels_per_group": 2}, [32, 16, 8, 1]),
        ({"min_channels_per_group": 8}, [8, 4, 2, 1]),
        ({"min_channels_per_group": 4, "num_groups": 8}, [8, 8, 4, 1]),
        ({"min_channels_per_group": 4, "channels_per_group": 8}, [8, 4, 2, 1]),
    ],
)
def test_a_group_has_at_least_so_many_channels(options: dict[str, int], groups: list[int]) -> None:
    assert [Groups(**options).of(channels) for channels in (64, 32, 16, 1)] == groups
    assert Groups(min_channels_per_group=2).is_default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_channels_per_group": 0}, "min_channels_per_group is 0, and has to be at least 1"),
        ({"min_channels_per_group": 4, "channels_per_group": 2}, "2 is below min_channels"),
    ],
)
def test_a_least_number_that_cannot_be_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Groups(**options)
