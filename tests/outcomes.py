"""Collects what became of every cell of a matrix, and writes it into the file that an environment variable names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers


class Outcomes:
    """The hooks of a folder's `conftest.py` that has a matrix of cells.

    Args:
        matrix: what it is called.
        key: the property (`record_property`) that holds a cell's id.
        variable: the environment variable that names the file.
    """

    def __init__(self, matrix: str, key: str, variable: str) -> None:
        self.matrix, self._key, self._file = matrix, key, os.environ.get(variable)
        self.found: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the process that prints the results, also if others ran the tests."""
        properties = dict(report.user_properties)
        if self._key not in properties or (report.when != "call" and report.passed):
            return
        outcome = {"outcome": report.outcome, "reason": str(properties.get("reason", ""))}
        self.found[str(properties[self._key])] = outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._file and self.found and not hasattr(session.config, "workerinput"):
            versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
            cells = {name: self.found[name] for name in sorted(self.found)}
            Path(self._file).write_text(json.dumps({"versions": versions, "cells": cells}, indent=1) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """How many cells passed, and how many were refused, by reason."""
        if not self.found:
            return
        reasons: dict[str, int] = {}
        for found in self.found.values():
            what = found["outcome"] if found["outcome"] != "skipped" else f"refused: {found['reason']}"
            reasons[what] = reasons.get(what, 0) + 1
        terminalreporter.write_sep("-", f"{len(self.found)} cells of the {self.matrix}")
        for what, count in sorted(reasons.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{count:5}  {what}")
