"""Writes what became of every cell into the file that VLMPRUNE_MATRIX names."""

from __future__ import annotations

from families.outcomes import Outcomes

OUTCOMES = Outcomes("the family matrix", "cell", "VLMPRUNE_MATRIX")

pytest_runtest_logreport = OUTCOMES.note
pytest_sessionfinish = OUTCOMES.write
pytest_terminal_summary = OUTCOMES.summarise
