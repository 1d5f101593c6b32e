"""How many groups: the default, and the two ways to say another number."""

from __future__ import annotations

from dataclasses import dataclass

from gn_det.errors import InputError

__all__ = ["Groups", "default_num_groups", "num_groups_of"]


def default_num_groups(num_channels: int, at_most: int = 32) -> int:
    """The largest divisor of num_channels that is at most at_most (32 is the paper's G).

    Raises:
        ValueError: num_channels or at_most is below 1.
    """
    if num_channels < 1 or at_most < 1:
        raise ValueError(
            f"num_channels and at_most must be at least 1, got {num_channels} and {at_most}"
        )
    return next(g for g in range(min(num_channels, at_most), 0, -1) if num_channels % g == 0)


@dataclass(frozen=True)
class Groups:
    """A number of groups, said in one of two ways or in neither.

    Attributes:
        num_groups: G for every layer. A layer whose channels are not a multiple of G gets the
            largest divisor of its channels below G.
        channels_per_group: the channels of each group, in place of num_groups. A layer whose
            channels are not a multiple of it gets the largest divisor of its channels below it.

    Raises:
        InputError: both are given, or one is below 1.
    """

    num_groups: int | None = None
    channels_per_group: int | None = None

    def __post_init__(self) -> None:
        numbers = [n for n in (self.num_groups, self.channels_per_group) if n is not None]
        given = f"num_groups {self.num_groups} and channels_per_group {self.channels_per_group}"
        if len(numbers) > 1:
            raise InputError(f"{given} are two ways to say the same; give one")
        if any(number < 1 for number in numbers):
            raise InputError(f"{given}: at least 1")

    @property
    def is_default(self) -> bool:
        """Whether neither is given, so that a GN layer that is there keeps its own groups."""
        return self == Groups()

    def of(self, num_channels: int) -> int:
        """G for a layer of num_channels channels; 32 or the largest divisor below by default."""
        if self.channels_per_group is not None:
            return num_channels // default_num_groups(num_channels, self.channels_per_group)
        if self.num_groups is not None:
            return default_num_groups(num_channels, self.num_groups)
        return default_num_groups(num_channels)


def num_groups_of(
    num_channels: int, num_groups: int | None = None, channels_per_group: int | None = None
) -> int:
    """``Groups(num_groups, channels_per_group).of(num_channels)``."""
    return Groups(num_groups, channels_per_group).of(num_channels)
