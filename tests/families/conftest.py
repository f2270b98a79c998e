"""Writes what became of every cell into the file that VLMPRUNE_MATRIX names."""

from __future__ import annotations

from outcomes import Outcomes

MATRIX = Outcomes("family matrix", "cell", "VLMPRUNE_MATRIX")
pytest_runtest_logreport = MATRIX.pytest_runtest_logreport
pytest_sessionfinish = MATRIX.pytest_sessionfinish
pytest_terminal_summary = MATRIX.pytest_terminal_summary
