"""One table for a terminal and for a file: rich's `Table`, printed, or written as Markdown.

    accuracy = table(["recipe", "mean"], [[code("fastv:layer=2"), "99.3"]], title="accuracy in %")
    show(accuracy, console)
    path.write_text(markdown(accuracy) + "\\n")

rich has a Markdown box, but it wraps cells at the width of a terminal, does not escape pipes and writes no alignment, so
`markdown` writes the lines itself, from the columns of the same object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

LEAST_TEXT = 20
"""Characters of a text column that are not wrapped."""
CODE = "cyan"
"""Style of recipes and names from code in a terminal; Markdown puts them into backticks."""


def code(text: str) -> Text:
    """A cell that holds code, such as a recipe."""
    return Text(text, style=CODE)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], text_columns: int = 1, title: str = "") -> Table:
    """A table whose first columns are text and whose other columns are numbers.

    Args:
        columns: the heads.
        rows: the cells. A string is shown as it is: square brackets are no markup. A newline starts a new line in the cell.
        text_columns: how many of the first columns are aligned left, and may be wrapped in a narrow terminal. The others are
            aligned right and never wrapped.
        title: shown above the table in a terminal.
    """
    filled = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    heads = []
    for number, name in enumerate(columns):
        longest = max(
            cell_len(line) for cell in (Text(name), *(row[number] for row in filled)) for line in cell.plain.split("\n")
        )
        if number < text_columns:
            heads.append(Column(name, overflow="fold", min_width=min(longest, LEAST_TEXT)))
        else:
            heads.append(Column(name, justify="right", no_wrap=True, min_width=longest))
    made = Table(*heads, title=Text(title) if title else None)
    for row in filled:
        made.add_row(*row)
    return made


def cells(table: Table) -> list[list[Text]]:
    """The cells of a table that `table` made, row by row."""
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def markdown(table: Table) -> str:
    """The table as lines of Markdown, without its title."""
    aligned = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = [_line([_escaped(Text(str(column.header))) for column in table.columns]), f"|{'|'.join(aligned)}|"]
    return "\n".join([*lines, *(_line([_escaped(cell) for cell in row]) for row in cells(table))])


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _escaped(cell: Text) -> str:
    """A cell's text for Markdown, where a bare pipe would end the cell even inside backticks."""
    text = cell.plain.replace("|", "\\|").replace("\n", "<br>")
    return f"`{text}`" if cell.style == CODE else text


def show(table: Table, console: Console, *narrower: Table) -> None:
    """Print the first of some tables that fits into the terminal; if none does, the last with each row as named cells.

    Args:
        narrower: tables that say the most important part of `table` in fewer columns.
    """
    choices = (table, *narrower)
    console.print(next((choice for choice in choices if _width(choice) <= console.width), stacked(choices[-1])))


def _width(table: Table) -> int:
    """Characters that the table needs, with spaces and borders."""
    return 1 + sum((column.min_width or 0) + 3 for column in table.columns)


def stacked(table: Table) -> Table:
    """The same table with two columns: the first one, and the names and cells of the others, a line each."""
    first, *others = table.columns
    left = Column(first.header, overflow="fold", min_width=first.min_width)
    narrow = Table(left, Column("", overflow="fold"), title=table.title, show_lines=True)
    for name, *row in cells(table):
        filled = [(str(column.header), cell) for column, cell in zip(others, row, strict=True) if cell.plain]
        named = [Text.assemble((f"{head} ", "dim"), cell) for head, cell in filled]
        narrow.add_row(name, Text("\n").join(named))
    return narrow
