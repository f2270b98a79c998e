"""What a report consists of: sections of sentences, tables, figures and pictures, in a form that HTML and Markdown share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.table import Table as RichTable
from rich.text import Text

from vlmprune.show import table as tables

MARKS = {"beats": "▲", "ties": "=", "loses": "▼"}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: the first line.
        under: further lines, in smaller letters.
        code: whether `text` is code, such as a recipe.
        verdict: "beats", "ties" or "loses" (against random), or nothing.
        heat: how large a loss is, in steps from 0 (none) to 4.
        warn: whether the loss is far larger than that of the mean.
    """

    text: str
    under: tuple[str, ...] = ()
    code: bool = False
    verdict: str = ""
    heat: int = 0
    warn: bool = False

    def markdown(self) -> str:
        """The cell as Markdown, where a bare pipe would end the cell even inside backticks."""
        first = f"`{self.text}`" if self.code else self.text
        marked = " ".join([f"**{first}**" if self.warn else first, *([MARKS[self.verdict]] if self.verdict else [])])
        return "<br>".join([marked, *self.under]).replace("|", "\\|")


@dataclass(frozen=True)
class Table:
    """A table. Its first `text_columns` columns are text and name the row; the others are numbers.

    Attributes:
        title: what the table shows, for its caption.
        heads: of the columns.
        rows: the cells.
        text_columns: number of columns that are aligned left.
        kind: "" or "losses", which a style sheet may show differently.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: int = 1
    kind: str = ""

    @staticmethod
    def of(table: RichTable, title: str) -> Table:
        """A table that `show.table` made."""
        heads = tuple(str(column.header) for column in table.columns)
        text = sum(column.justify != "right" for column in table.columns)
        return Table(title, heads, tuple(tuple(map(_cell, row)) for row in tables.cells(table)), text)

    def markdown(self) -> str:
        """The table as lines of Markdown."""
        numbers = len(self.heads) - self.text_columns
        rule = "|".join(["---"] * self.text_columns + ["---:"] * numbers)
        lines = [" | ".join(self.heads), *(" | ".join(cell.markdown() for cell in row) for row in self.rows)]
        head, *rows = (f"| {line} |" for line in lines)
        return "\n".join([head, f"|{rule}|", *rows])


def _cell(text: Text) -> Cell:
    first, *under = text.plain.split("\n")
    return Cell(first, tuple(under), code=text.style == tables.CODE)


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        title: what is drawn; backticks enclose code.
        svg: the drawing, for inside an HTML page.
        says: what it shows, in words, for those who do not see it.
        note: one line below the title.
        wide: whether it needs the whole width of a page to be readable.
    """

    title: str
    svg: str
    says: str
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Picture:
    """A small picture.

    Attributes:
        title: backticks enclose code.
        png: the file's bytes, in base 64.
        says: what it shows, in words.
        lines: further lines of its caption.
        right: whether the answer in the caption is right; None if there is none.
    """

    title: str
    png: str
    says: str
    lines: tuple[str, ...] = ()
    right: bool | None = None


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, or with `warning` a sentence that must not be missed; backticks enclose code."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Sentences:
    """Sentences of which each is an item of a list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """Figures that are shown beside each other where there is room; `legend` explains their lines."""

    figures: tuple[Figure, ...]
    legend: tuple[tuple[str, str], ...] = ()
    small: bool = False


@dataclass(frozen=True)
class Pictures:
    """A row of pictures about one question."""

    title: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Facts:
    """Names with values; `code` shows the values as code."""

    rows: tuple[tuple[str, str], ...]
    code: bool = False


Part = Table | Paragraph | Sentences | Figures | Pictures | Facts


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        title: its heading.
        anchor: its name in links.
        parts: what it consists of.
    """

    title: str
    anchor: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: of the page.
        lead: one sentence on what was measured.
        tiles: the few numbers that are read first: a value, what it is, and a remark.
        sections: in the order in which they are read.
    """

    title: str
    lead: str
    tiles: tuple[tuple[str, str, str], ...] = ()
    sections: tuple[Section, ...] = field(default=())


def listed(parts: Iterable[str]) -> str:
    """Parts as an enumeration: "a, b and c"."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def percent_of(share: float) -> str:
    """A share of 1 in percent, with at most three digits: "12.5 %"."""
    return f"{100 * share:.3g} %"


def shares(values: Sequence[float]) -> str:
    """Shares of 1 as an enumeration in percent: "50, 35 and 25 %"."""
    return f"{listed(f'{100 * value:.3g}' for value in values)} %"
