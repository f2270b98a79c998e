"""Scorers: cases computed by hand from their formulas, and from examples of their papers."""

from __future__ import annotations

import pytest

from vlmprune.errors import UsageError
from vlmprune.evals.question import Question
from vlmprune.evals.scorers import SCORERS, check_scored, check_scorer, score


def asked(*answers: str, scorer: str = "exact", choices: tuple[str, ...] = (), judge=None) -> Question:
    return Question("7", (), "what ?", answers, choices, scorer=scorer, judge=judge)


@pytest.mark.parametrize(
    ("given", "answers", "expected"),
    [
        ("yes", ("yes",), 1),
        (" yes \n", ("yes",), 1),
        ("Yes", ("yes",), 0),
        ("top left", ("left", "top left"), 1),
        ("", ("yes",), 0),
    ],
)
def test_exact(given, answers, expected):
    assert SCORERS["exact"](given, asked(*answers)) == expected


@pytest.mark.parametrize(
    ("given", "answers", "expected"),
    [
        ("The Cat.", ("cat",), 1),
        ("a  red   star!", ("Red star",), 1),
        ("cats", ("cat",), 0),
        ("theatre", ("atre",), 0),  # an article is a word, not a beginning
        ("It's", ("its",), 1),
        ("yes, it is", ("yes",), 0),
        ("", ("A",), 0),  # a letter that is an article, and a sign, are not empty
        ("a.", ("A",), 1),
        ("the", ("A",), 0),
        ("+", ("-",), 0),
        ("-", ("-",), 1),
    ],
)
def test_normalised(given, answers, expected):
    assert SCORERS["normalised"](given, asked(*answers)) == expected


def ten(**times: int) -> tuple[str, ...]:
    return tuple(answer.replace("_", " ") for answer, count in times.items() for _ in range(count))


@pytest.mark.parametrize(
    ("given", "answers", "expected"),
    [
        ("cat", ten(cat=10), 1.0),
        ("cat", ten(cat=1, dog=9), 0.3),  # the one who said so has 0 others, nine have 1: 9 · 1/3 / 10
        ("cat", ten(cat=2, dog=8), 0.6),  # two have 1 other, eight have 2: (2 · 1/3 + 8 · 2/3) / 10
        ("cat", ten(cat=3, dog=7), 0.9),  # three have 2 others, seven have 3: (3 · 2/3 + 7) / 10
        ("cat", ten(cat=4, dog=6), 1.0),
        ("bird", ten(cat=4, dog=6), 0.0),
        ("Two", ten(two=10), 1.0),
        ("the 2", ("2",) * 3 + ("two",) * 7, 1.0),
        ("dont walk", ("don't walk",) * 10, 1.0),
        ("red-white", ("red white",) * 10, 1.0),  # between letters a sign is a space,
        ("yes!", ("yes",) * 10, 1.0),
        ("1,000", ("1000",) * 10, 1.0),  # between digits a comma is nothing,
        ("1.5", ("15",) * 10, 0.0),  # and a point before a digit stays
        ("no.", ("no",) * 10, 1.0),
    ],
)
def test_vqa(given, answers, expected):
    assert SCORERS["vqa"](given, asked(*answers)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "answer", "expected"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("-2", "-2.1", 1),
        ("0.0", "0", 0),  # no relative distance to 0: the texts must be equal
        ("0", "0", 1),
        ("26%", "0.25", 1),
        ("25%", "25", 0),
        ("Blue", "blue", 1),
        ("blue", "red", 0),
        ("25", "red", 0),
        ("about 100", "100", 0),
    ],
)
def test_relaxed(given, answer, expected):
    assert SCORERS["relaxed"](given, asked(answer)) == expected


@pytest.mark.parametrize(
    ("given", "answers", "expected"),
    [
        ("stop", ("stop",), 1.0),
        ("STOP", ("stop",), 1.0),
        ("stap", ("stop",), 0.75),
        ("st", ("stop",), 0.5),  # 2 of 4 is the half, which still counts
        ("s", ("stop",), 0.0),
        ("sto", ("stop",), 0.75),
        ("coca cola", ("pepsi", "Coca  Cola"), 1.0),
        ("coca cols", ("coca cola company", "coca cola"), 1 - 1 / 9),
        ("kitten", ("sitting",), 1 - 3 / 7),  # Levenshtein's own example
        ("", ("stop",), 0.0),
    ],
)
def test_anls(given, answers, expected):
    assert SCORERS["anls"](given, asked(*answers)) == pytest.approx(expected)


CHOICES = ("a red car", "a dog", "two dogs")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B: a dog", 1),
        ("b", 0),  # no letter of a choice
        ("a dog", 1),
        ("A dog.", 1),  # an article, not the choice A
        ("It is a dog", 1),
        ("The answer is B.", 1),
        ("Answer: (B)", 1),
        ("A", 0),
        ("C", 0),
        ("two dogs", 0),
        ("a dog or a red car", 0),  # two choices
        ("D", 0),  # there is none
        ("", 0),
    ],
)
@pytest.mark.parametrize("right", ["B", "a dog"])
def test_choice(given, expected, right):
    assert SCORERS["choice"](given, asked(right, choices=CHOICES)) == expected


@pytest.mark.parametrize(
    ("choices", "right", "given", "expected"),
    [
        (("A", "B", "C"), "A", "A", 1),
        (("A", "B", "C"), "A", "A.", 1),
        (("A", "B", "C"), "A", "", 0),  # "A" is an article, too, but an empty answer is no choice
        (("A", "B", "C"), "A", "the", 0),
        (("<", ">"), ">", "<", 0),
        (("<", ">"), ">", ">", 1),
        (("-5", "5"), "5", "5", 1),
        (("-5", "5"), "5", "-5", 0),
        (("-5", "5"), "5", "5.", 0),  # could be both
    ],
)
def test_choices_that_differ_in_punctuation_or_are_articles(choices, right, given, expected):
    assert SCORERS["choice"](given, asked(right, choices=choices)) == expected


def test_a_question_is_scored_by_its_own_scorer():
    assert score("Yes.", asked("yes", scorer="normalised")) == 1
    assert score("Yes.", asked("yes")) == 0
    assert score("x", asked(scorer="task", judge=lambda given: 0.25 * (given == "x"))) == 0.25


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (asked("yes", scorer="exactly"), "unknown scorer 'exactly': did you mean 'exact'?"),
        (asked(), "question 7 has no right answer"),
        (asked("yes", scorer="vqa"), "question 7 has 1 answers, and the scorer vqa needs more than 3"),
        (asked("yes", scorer="choice"), "question 7 has 0 choices, and the scorer choice needs 2 to 26"),
        (asked("yes", choices=("left", "right"), scorer="choice"), "the answer 'yes' is none of its choices left, right"),
        (asked("C", choices=("left", "right"), scorer="choice"), "the answer 'C' is none of its choices"),
    ],
)
def test_what_cannot_be_scored(question, sentence):
    with pytest.raises(UsageError) as refusal:
        check_scored(question)
    assert sentence in str(refusal.value)


def test_the_score_of_a_task_has_no_name_to_choose():
    check_scored(asked(scorer="task", judge=float))
    with pytest.raises(UsageError, match="belongs to no task"):
        score("x", asked("x", scorer="task"))
    with pytest.raises(UsageError, match=r"known: anls, choice, exact, normalised, relaxed, vqa\."):
        check_scorer("zzz")
