"""What audit and convert_bn return has in common: tables as text and Markdown, and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

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
        """Every field by its name."""
        return json.dumps(asdict(self), indent=2)

    def _tables(self, style: str) -> str:
        """The tables in one of tabulate's formats."""
        raise NotImplementedError
