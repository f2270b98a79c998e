"""The store: what was added is on disk, is never rewritten, and is merged whoever wrote it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmprune.errors import UsageError
from vlmprune.evals.files import created, written_whole
from vlmprune.evals.store import SETTINGS, Store

ASKED = {"model": "tiny", "images": 4, "versions": {"torch": "2.13.0"}}


def rows(folder: Path, code: str = "") -> dict:
    store = Store(folder, ASKED, code)
    return {key: store[key] for key in store}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_added_is_found_by_the_next_process(tmp_path):
    first = Store(tmp_path, ASKED)
    assert files(tmp_path) == [SETTINGS], "a process that adds nothing makes no file"
    first.add(("fastv", 0, 1), {"given": ["yes"], "seconds": 0.5})
    first.add_all({("fastv", 0, 2): {"given": ["no"]}, ("none", 0, 2): {"given": []}})
    assert len(first) == 3
    found = rows(tmp_path)
    assert found == {
        ("fastv", 0, 1): {"given": ["yes"], "seconds": 0.5},
        ("fastv", 0, 2): {"given": ["no"]},
        ("none", 0, 2): {"given": []},
    }
    assert Store(None, ASKED).get(("fastv", 0, 1)) is None


def test_every_process_has_a_file_of_its_own_and_an_interrupted_line_does_not_count(tmp_path):
    """Red: a file is rewritten at the start, so that what another process writes meanwhile is lost."""
    with Store(tmp_path, ASKED) as store:
        store.add(("a",), {"n": 1})
        store.add(("b",), {"n": 2})
    torn = tmp_path / "answers-0001.jsonl"
    torn.write_bytes(torn.read_bytes()[:-5])
    before = torn.read_bytes()
    again = Store(tmp_path, ASKED)
    assert list(again) == [("a",)]
    again.add(("b",), {"n": 3})
    assert torn.read_bytes() == before
    assert files(tmp_path) == ["answers-0001.jsonl", "answers-0002.jsonl", SETTINGS]
    assert rows(tmp_path) == {("a",): {"n": 1}, ("b",): {"n": 3}}


def test_two_at_once_see_each_others_rows_and_take_the_same_of_two(tmp_path):
    one, other = Store(tmp_path, ASKED), Store(tmp_path, ASKED)
    one.add(("a",), {"by": 1})
    other.add(("a",), {"by": 2})
    other.add(("b",), {"by": 2})
    assert ("b",) not in one
    one.refresh()
    other.refresh()
    expected = {("a",): {"by": 1}, ("b",): {"by": 2}}
    assert {key: one[key] for key in one} == {key: other[key] for key in other} == rows(tmp_path) == expected


def test_a_line_that_is_still_being_written_is_read_when_it_is_complete(tmp_path):
    store = Store(tmp_path, ASKED)
    line = json.dumps({"key": ["a"], "code": "", "row": {"n": 1}})
    with (tmp_path / "answers-0007.jsonl").open("w", buffering=1) as file:
        file.write(line[:9])
        file.flush()
        store.refresh()
        assert len(store) == 0
        file.write(line[9:] + "\n")
        store.refresh()
    assert store[("a",)] == {"n": 1}


def test_what_another_process_has_begun_comes_last(tmp_path):
    """Red: two sweeps in one folder ask everything twice; or what a killed one had begun is never asked."""
    keys = [(n,) for n in range(4)]
    one, other = Store(tmp_path, ASKED), Store(tmp_path, ASKED)
    ones, others = one.to_do(keys), other.to_do(keys)
    taken = [next(ones), next(others)]
    other.add(taken[1], {})
    taken.append(next(others))
    one.add(taken[0], {})
    taken.append(next(ones))
    assert taken == [(0,), (1,), (2,), (3,)]
    one.add((3,), {})
    assert next(ones) == (2,), "begun by the other, which may be dead"
    other.add((2,), {})
    one.add((2,), {})
    assert list(ones) == list(others) == list(Store(tmp_path, ASKED).to_do(keys)) == []


def test_answers_of_other_code_are_asked_again_and_stay_where_they_are(tmp_path):
    Store(tmp_path, ASKED, "old").add(("a",), {"n": 1})
    new = Store(tmp_path, ASKED, "new")
    assert (len(new), new.stale) == (0, 1)
    new.add(("a",), {"n": 2})
    assert rows(tmp_path, "old") == {("a",): {"n": 1}}
    assert rows(tmp_path, "new") == {("a",): {"n": 2}}


def test_a_folder_with_other_settings_is_refused_with_the_difference(tmp_path):
    Store(tmp_path, ASKED)
    other = {"model": "tiny", "images": 5, "versions": {"torch": "2.14.0"}, "split": "dev"}
    with pytest.raises(UsageError) as refused:
        Store(tmp_path, other)
    assert "images 4 there, 5 here; split nothing there, 'dev' here; versions.torch '2.13.0' there" in str(refused.value)
    Store(tmp_path, {**ASKED, "versions": dict(ASKED["versions"])})


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (SETTINGS, "{", "cannot be read as JSON"),
        (SETTINGS, None, "holds answers but no settings.json"),
        ("answers-0001.jsonl", '{"key": 3}\n', "has a damaged line"),
        ("answers-0001.jsonl", "\0\0\0\n", "has a damaged line"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path, name, text, sentence):
    Store(tmp_path, ASKED).add(("a",), {})
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=sentence):
        Store(tmp_path, ASKED)


FULL = """
import resource, sys
from pathlib import Path
from vlmprune.errors import UsageError
from vlmprune.evals.store import Store
store = Store(Path(sys.argv[1]), {})
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
try:
    for n in range(100):
        store.add((n,), {"given": ["an answer"]})
except UsageError as error:
    print(n, error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.add(("later",), {})
"""
"""The operating system refuses to write in the middle of a line, as on a full disk."""


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    """Red: half a line stays, and the next row is glued to it, so that both are lost."""
    ran = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    written, sentence = ran.stdout.split(maxsplit=1)
    assert f"cannot write to {tmp_path} (File too large): the {written} finished parts are kept; free space" in sentence
    assert not (tmp_path / "answers-0001.jsonl").read_bytes().endswith(b"\n")
    store = Store(tmp_path, {})
    assert list(store) == [*((n,) for n in range(int(written))), ("later",)]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "sweep.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with (
        pytest.raises(UsageError, match=r"cannot write .*sweep\.json \(No space left on device\)"),
        written_whole(path) as draft,
    ):
        draft.write_text("new")
    assert files(tmp_path) == ["sweep.json"]
    assert path.read_text() == "old"


def test_one_of_several_creates_a_file(tmp_path):
    path = tmp_path / "settings.json"
    assert created(path, "one")
    assert not created(path, "two")
    assert path.read_text() == "one"


def test_one_of_several_creates_a_file_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    test_one_of_several_creates_a_file(tmp_path)
