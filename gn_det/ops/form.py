"""The forms of group_norm: what one call computes besides normalizing."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FORMS", "Form"]


class Form(NamedTuple):
    """What one call of :func:`gn_det.group_norm` computes. It prints as "GN+add+ReLU".

    Attributes:
        relu: whether a ReLU comes last.
        add: whether a residual is added before it.
        normalize_add: whether that residual is normalized before it is added.
    """

    relu: bool = False
    add: bool = False
    normalize_add: bool = False

    @property
    def keeps_output(self) -> bool:
        """Whether the backward pass needs the output, to find ReLU's mask.

        Without a residual, or with its statistics, the mask can be found again from the input.
        """
        return self.relu and self.add and not self.normalize_add

    def __str__(self) -> str:
        return "GN" + "+GN" * self.normalize_add + "+add" * self.add + "+ReLU" * self.relu


# The forms that models need, by their names.
FORMS = {
    str(form): form
    for form in (
        Form(),
        Form(relu=True),
        Form(add=True),
        Form(relu=True, add=True),
        Form(relu=True, add=True, normalize_add=True),
    )
}
