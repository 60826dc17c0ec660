"""Tables of reports.

`tabulate` is not used: it pads cells to the longest of a column, so that one new row changes every line of a table that
is committed.
"""

from collections.abc import Iterable
from typing import Any


def markdown_table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> list[str]:
    """The lines of a table in Markdown."""
    names = list(head)
    return [f"| {' | '.join(map(str, cells))} |" for cells in (names, ["---"] * len(names), *rows)]
