"""Writes what became of every cell into the file that VLMPRUNE_MATRIX names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

OUTCOMES: dict[str, dict[str, str]] = {}
FILE = os.environ.get("VLMPRUNE_MATRIX")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process that prints the results, also if others ran the tests."""
    properties = dict(report.user_properties)
    if "cell" not in properties or (report.when != "call" and report.passed):
        return
    OUTCOMES[str(properties["cell"])] = {"outcome": report.outcome, "reason": str(properties.get("reason", ""))}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if FILE and OUTCOMES and not hasattr(session.config, "workerinput"):
        versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
        cells = {name: OUTCOMES[name] for name in sorted(OUTCOMES)}
        Path(FILE).write_text(json.dumps({"versions": versions, "cells": cells}, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cells passed, and how many were refused, by reason."""
    if not OUTCOMES:
        return
    reasons: dict[str, int] = {}
    for found in OUTCOMES.values():
        what = found["outcome"] if found["outcome"] != "skipped" else f"refused: {found['reason']}"
        reasons[what] = reasons.get(what, 0) + 1
    terminalreporter.write_sep("-", f"{len(OUTCOMES)} cells of the family matrix")
    for what, count in sorted(reasons.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{count:5}  {what}")
