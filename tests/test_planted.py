"""The list of deliberate bugs names tests that exist, and docs/guards.md shows it. `python tests/planted.py` plants them."""

from __future__ import annotations

from planted import BUGS, ROOT, functions, table


def test_the_tests_that_must_turn_red_exist():
    """Red: a test was renamed or removed, and a bug that it was there for is guarded by nothing."""
    there = functions(ROOT)
    for bug in BUGS:
        assert set(bug.red) <= there.keys(), (bug.guard, bug.name, set(bug.red) - there.keys())


def test_every_bug_is_one():
    """Red: a replacement changes nothing."""
    for bug in BUGS:
        assert bug.old != bug.new, bug.name
    assert len({(bug.guard, bug.name) for bug in BUGS}) == len(BUGS)


def test_the_document_has_the_table():
    """Red: `python tests/planted.py --table` prints another table than docs/guards.md has."""
    assert table() in (ROOT / "docs/guards.md").read_text()
