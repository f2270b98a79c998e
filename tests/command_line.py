"""The command line, run in this process."""

from __future__ import annotations

import sys

from vlmprune import cli


def vlmprune(monkeypatch, *arguments):
    """Run a command; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["vlmprune", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0
