"""The list of deliberate bugs names tests that exist, and docs/guards.md shows it. `python tests/planted.py` plants them."""

from __future__ import annotations

from dataclasses import replace

from planted import BUGS, ROOT, lost, table


def test_every_bug_still_applies():
    """Red: the code that a bug replaces was rewritten, or a test that must turn red was renamed or removed: nothing guards the
    guard."""
    assert lost(BUGS) == []


def test_a_bug_that_no_longer_applies_is_found():
    bug = BUGS[0]
    assert lost([bug]) == []
    for wrong, why in (
        (replace(bug, old="no such line"), f"its text stands 0 times in {bug.file}"),
        (replace(bug, old="\n"), "its text stands"),
        (replace(bug, file="vlmprune/live/gone.py"), "its text stands 0 times in vlmprune/live/gone.py"),
        (replace(bug, red=("test_gone",)), "no test is called test_gone"),
    ):
        (found,) = lost([wrong])
        assert found.startswith(f"NO LONGER APPLIES: {bug.guard}: {bug.name} (")
        assert why in found


def test_every_bug_is_one():
    """Red: a replacement changes nothing."""
    for bug in BUGS:
        assert bug.old != bug.new, bug.name
    assert len({(bug.guard, bug.name) for bug in BUGS}) == len(BUGS)


def test_the_document_has_the_table():
    """Red: `python tests/planted.py --table` prints another table than docs/guards.md has."""
    assert table() in (ROOT / "docs/guards.md").read_text()
