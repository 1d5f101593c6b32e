"""How many groups: the default, and the two ways to say another number."""

from __future__ import annotations

from dataclasses import dataclass

from gn_det.errors import InputError

__all__ = ["Groups", "default_num_groups"]


def default_num_groups(num_channels: int, at_most: int = 32) -> int:
    """The number of groups for a layer: the largest divisor of its channels that is at most 32.

    The paper takes 32 groups (Wu & He 2018, arXiv 1803.08494, section 3.1).

    Args:
        num_channels: C, at least 1.
        at_most: the upper limit, default 32.

    Returns:
        G, a divisor of num_channels.

    Raises:
        ValueError: num_channels or at_most is below 1.

    Example::

        assert gn_det.default_num_groups(256) == 32
        assert gn_det.default_num_groups(48) == 24
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
        min_channels_per_group: the fewest channels of a group, whatever the number of groups. One
            channel is instance norm. A layer of fewer channels gets one group. Default: 1.

    Raises:
        InputError: both of the first two are given, one is below 1, or the least number of channels
            is above channels_per_group.
    """

    num_groups: int | None = None
    channels_per_group: int | None = None
    min_channels_per_group: int = 1

    def __post_init__(self) -> None:
        if self.num_groups is not None and self.channels_per_group is not None:
            raise InputError(
                f"num_groups {self.num_groups} and channels_per_group {self.channels_per_group} "
                "are two ways to say the same; give one"
            )
        for name, number in vars(self).items():
            if number is not None and number < 1:
                raise InputError(f"{name} is {number}, and has to be at least 1")
        least = self.min_channels_per_group
        if self.channels_per_group is not None and self.channels_per_group < least:
            raise InputError(
                f"channels_per_group {self.channels_per_group} is below min_channels_per_group "
                f"{least}; give one of them"
            )

    @property
    def is_default(self) -> bool:
        """Whether no number is given, so that a GN layer that is there keeps its own groups."""
        return self.num_groups is None and self.channels_per_group is None

    def of(self, num_channels: int) -> int:
        """G for a layer of num_channels channels; 32 or the largest divisor below by default."""
        most = max(1, num_channels // self.min_channels_per_group)
        if self.channels_per_group is not None:
            groups = num_channels // default_num_groups(num_channels, self.channels_per_group)
        elif self.num_groups is not None:
            groups = default_num_groups(num_channels, self.num_groups)
        else:
            groups = default_num_groups(num_channels)
        return groups if groups <= most else default_num_groups(num_channels, most)
