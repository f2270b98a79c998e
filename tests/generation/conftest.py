"""Writes what became of every cell into the file that VLMPRUNE_WAYS names."""

from __future__ import annotations

from families.outcomes import Outcomes

OUTCOMES = Outcomes("the ways of generating", "way", "VLMPRUNE_WAYS")

pytest_runtest_logreport = OUTCOMES.note
pytest_sessionfinish = OUTCOMES.write
pytest_terminal_summary = OUTCOMES.summarise
