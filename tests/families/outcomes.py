"""What became of the cells of a matrix: counted at the end of a test run, and written into a file if one is named."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers


class Outcomes:
    """Hooks of a `conftest.py`, which gives them pytest's names.

    Args:
        title: of the matrix.
        recorded: the property under which a test records the name of its cell.
        variable: of the environment, with the name of a file for the outcomes.
    """

    def __init__(self, title: str, recorded: str, variable: str) -> None:
        self._title, self._recorded, self._file = title, recorded, os.environ.get(variable)
        self._found: dict[str, dict[str, str]] = {}

    def note(self, report: pytest.TestReport) -> None:
        """In the process that prints the results, also if others ran the tests."""
        properties = dict(report.user_properties)
        if self._recorded not in properties or (report.when != "call" and report.passed):
            return
        self._found[str(properties[self._recorded])] = {
            "outcome": report.outcome,
            "reason": str(properties.get("reason", "")),
        }

    def write(self, session: pytest.Session) -> None:
        """Into the file."""
        if self._file and self._found and not hasattr(session.config, "workerinput"):
            versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
            cells = {name: self._found[name] for name in sorted(self._found)}
            Path(self._file).write_text(json.dumps({"versions": versions, "cells": cells}, indent=1) + "\n")

    def summarise(self, terminalreporter: pytest.TerminalReporter) -> None:
        """How many cells passed, and how many were refused, by reason."""
        if not self._found:
            return
        reasons = Counter(
            found["outcome"] if found["outcome"] != "skipped" else f"refused: {found['reason']}"
            for found in self._found.values()
        )
        terminalreporter.write_sep("-", f"{len(self._found)} cells of {self._title}")
        for what, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5}  {what}")
