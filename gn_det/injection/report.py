"""What the reports of audit, convert_bn and distill have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gn_det.files import json_text

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """A dataclass whose str() is a table."""

    def __str__(self) -> str:
        return self._tables("simple")

    def to_markdown(self) -> str:
        """The tables in GitHub's Markdown."""
        return self._tables("github")

    def to_json(self) -> str:
        """Every field by its name; what is not finite is null."""
        return json_text(asdict(self))

    def _tables(self, style: str) -> str:
        """The tables in one of tabulate's formats."""
        raise NotImplementedError
