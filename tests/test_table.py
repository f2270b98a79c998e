"""One table for a terminal and for a file: the same cells in both, whatever is in them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from vlmprune.show.table import code, markdown, show, table

RECIPE = "sparsevlm:layer=3|7|16,tokens=300|200|110"


@pytest.fixture
def made() -> Table:
    rows = [[code(RECIPE), "99.3 [98.9, 99.6]", "[red]7"], ["un-pruned", "—", "1\n2"]]
    return table(["recipe", "mean", "|I|"], rows, title="accuracy [95 %]")


def printed(made: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(made, console)
    return console.file.getvalue()


def test_markdown(made):
    """Red: a pipe ends its cell, a newline its row, or a number is not aligned right."""
    assert markdown(made).splitlines() == [
        "| recipe | mean | \\|I\\| |",
        "|---|---:|---:|",
        "| `sparsevlm:layer=3\\|7\\|16,tokens=300\\|200\\|110` | 99.3 [98.9, 99.6] | [red]7 |",
        "| un-pruned | — | 1<br>2 |",
    ]


def test_a_file_does_not_depend_on_the_terminal(made, monkeypatch):
    """Red: long cells are wrapped at the width of a terminal."""
    wide = markdown(made)
    monkeypatch.setenv("COLUMNS", "20")
    assert markdown(made) == wide


def test_wide_terminal(made):
    shown = printed(made, 120)
    assert f"│ {RECIPE} │ 99.3 [98.9, 99.6] │ [red]7 │" in shown, "one line per row; brackets are no markup"
    assert "accuracy [95 %]" in shown


@pytest.mark.parametrize("width", [40, 50])
def test_narrow_terminal_loses_nothing(made, width):
    """Red: a cell is shortened to fit. Each row becomes a list of named cells."""
    shown = printed(made, width)
    assert "…" not in shown
    for part in ("mean 99.3", "99.6]", "[red]7", "|I|"):
        assert part in shown
    left = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert "".join(left) == f"{RECIPE}un-pruned"


def test_text_is_wrapped_before_rows_are_stacked(made):
    shown = printed(made, 60)
    assert "┃ recipe" in shown
    assert "mean 99.3" not in shown
    assert "…" not in shown


def test_heads_are_wrapped_before_numbers(made):
    """Red: a long head widens its column, so that rows are stacked although all numbers fit."""
    long = table(["layer", "attention to the first token of the prompt"], [["1", "10.5%"], ["22", "9.1%"]], text_columns=0)
    shown = printed(long, 40)
    assert "│     1 │     10.5% │" in shown
    assert max(map(len, shown.splitlines())) <= 40
    assert "│     1 │                                      10.5% │" in printed(long, 60)


@pytest.mark.parametrize("width", range(30, 140, 7))
def test_no_line_is_longer_than_the_terminal(width):
    """Two text columns and three of numbers, at every width."""
    rows = [[code("a" * 50), "word " * 12, "1.5 [1.0, 2.0]", "99", "7"], ["un-pruned", "", "—", "1", "22"]]
    shown = printed(table(["recipe", "what it is", "mean of all", "n", "x"], rows, text_columns=2), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
