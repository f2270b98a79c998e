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
    heads = [Column(name, overflow="fold", justify="left" if n < text_columns else "right") for n, name in enumerate(columns)]
    made = Table(*heads, title=Text(title) if title else None)
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
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

    A table fits if its numbers need no second line. Heads and text may be wrapped for that.

    Args:
        narrower: tables that say the most important part of `table` in fewer columns.
    """
    for choice in (table, *narrower):
        if sum(map(_least, choice.columns)) + _borders(choice) <= console.width:
            console.print(_narrowed(choice, console.width))
            return
    console.print(stacked((table, *narrower)[-1]))


def _narrowed(table: Table, width: int) -> Table:
    """The table itself if it fits as it is; otherwise with number columns as narrow as their numbers, and wrapped heads."""
    if sum(map(_natural, table.columns)) + _borders(table) <= width:
        return table
    narrow = Table(*(column.copy() for column in table.columns), title=table.title)
    for column, own in zip(narrow.columns, table.columns, strict=True):
        if column.justify == "right":
            column.width = _least(own)
        else:
            column.min_width = _least(own)
    for row in cells(table):
        narrow.add_row(*row)
    return narrow


def _borders(table: Table) -> int:
    """Characters of a line that are borders and spaces."""
    return 3 * len(table.columns) + 1


def _natural(column: Column) -> int:
    """Characters of the widest line of a column."""
    return max(_longest(column), cell_len(str(column.header)))


def _least(column: Column) -> int:
    """Characters that a column needs: all of its numbers and of each word of its head; `LEAST_TEXT` if it is text."""
    if column.justify != "right":
        return min(_natural(column), LEAST_TEXT)
    return max(_longest(column), *(cell_len(word) for word in str(column.header).split()), 1)


def _longest(column: Column) -> int:
    lines = (line for cell in column.cells for line in str(cell).split("\n"))
    return max(map(cell_len, lines), default=0)


def stacked(table: Table) -> Table:
    """The same table with two columns: the first one, and the names and cells of the others, a line each."""
    first, *others = table.columns
    left = Column(first.header, overflow="fold", min_width=min(_natural(first), LEAST_TEXT))
    narrow = Table(left, Column("", overflow="fold"), title=table.title, show_lines=True)
    for name, *row in cells(table):
        filled = [(str(column.header), cell) for column, cell in zip(others, row, strict=True) if cell.plain]
        named = [Text.assemble((f"{head} ", "dim"), cell) for head, cell in filled]
        narrow.add_row(name, Text("\n").join(named))
    return narrow
