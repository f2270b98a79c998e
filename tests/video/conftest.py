"""Writes what became of every cell of the video matrix into the file that VLMPRUNE_VIDEO_MATRIX names."""

from __future__ import annotations

from families.outcomes import Outcomes

OUTCOMES = Outcomes("the video matrix", "video cell", "VLMPRUNE_VIDEO_MATRIX")

pytest_runtest_logreport = OUTCOMES.note
pytest_sessionfinish = OUTCOMES.write
pytest_terminal_summary = OUTCOMES.summarise
