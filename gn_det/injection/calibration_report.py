"""What calibration did to each norm, as tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from tabulate import tabulate

__all__ = ["Calibration", "CalibrationRow"]


@dataclass(frozen=True)
class CalibrationRow:
    """A norm that was converted.

    Errors are ‖gn − bn‖ / ‖bn − mean(bn)‖ over the whole calibration set: gn is the norm's output
    in the converted model (before an activation), with the errors of the norms before it; bn is
    that of the BN layer in the model as it was, and its mean is taken over all elements of a
    channel. 1 is no better than a constant in each channel. None where bn is constant, or the norm
    not reached.

    Attributes:
        name: of the module.
        site: key of SITES.
        channels: C.
        num_groups: G.
        values: of each channel that were seen; 0 where the calibration set does not reach it.
        constant_channels: those whose normalised input does not vary, and which kept the BN's γ.
        copied: error with γ, β of the BN, everywhere in the model.
        calibrated: error with γ, β fitted, everywhere in the model.
    """

    name: str
    site: str
    channels: int
    num_groups: int
    values: int
    constant_channels: int
    copied: float | None
    calibrated: float | None


@dataclass(frozen=True)
class Calibration:
    """What :func:`gn_det.injection.convert_bn` did; str() is the table.

    Attributes:
        rows: in the order of execution, norms that were not reached last.
        pass_errors: mean error of the norms with γ, β copied, and after each pass.
    """

    rows: tuple[CalibrationRow, ...]
    pass_errors: tuple[float, ...]

    @property
    def not_reached(self) -> tuple[str, ...]:
        """Norms that the calibration set did not reach, which kept γ, β of the BN."""
        return tuple(row.name for row in self.rows if row.values == 0)

    def __str__(self) -> str:
        return self._tables("simple")

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown."""
        return self._tables("github")

    def to_json(self) -> str:
        """``{"rows": [...], "pass_errors": [...]}``."""
        return json.dumps(asdict(self), indent=2)

    def _tables(self, style: str) -> str:
        headers = ["norm", "site", "channels", "groups", "constant", "copied", "calibrated"]
        rows = [
            [
                row.name,
                row.site,
                row.channels,
                row.num_groups,
                row.constant_channels or "",
                row.copied,
                row.calibrated,
            ]
            for row in self.rows
        ]
        rows.append(["mean", "", "", "", "", self.pass_errors[0], min(self.pass_errors)])
        text = tabulate(rows, headers, tablefmt=style, floatfmt=".3f", missingval="-")
        if any(row.constant_channels for row in self.rows):
            text += "\n\nconstant: channels whose normalised input does not vary, with the BN's γ"
        if self.not_reached:
            text += (
                f"\n\nNot reached by the calibration set, γ and β of the BN kept: "
                f"{', '.join(self.not_reached)}"
            )
        return text
