"""How an answer is scored, by name: 0 for wrong, 1 for right, and shares between them.

    exact        the answer's text, word for word
    normalised   without case, punctuation and articles
    vqa          ten people's answers: right if three of them gave it (VQA)
    relaxed      numbers within 5 % (ChartQA)
    anls         similar spelling counts in part (DocVQA, TextVQA)
    choice       one of several choices, by its letter or its text
    task         what a task of lmms-eval says (not to be chosen by name)

Looked at for this: `evaluate` 0.4.6 (its metrics are scripts on the hub, fetched at the first call), `torchmetrics` 1.8
(SQuAD's exact match and edit distance, no VQA, no relaxed numbers), `rapidfuzz` 3.14 (edit distance in C++; answers are short,
and ten lines of Python take microseconds), `lmms-eval` 0.7.3 (has all of them inside of tasks, and imports two gigabytes).
None is a dependency for so little.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable

from vlmprune.errors import UsageError, unknown
from vlmprune.evals.question import Question

ARTICLES = ("a", "an", "the")
WITHIN = 0.05
"""How far a number may be from the right one, relative to it."""
SIMILAR = 0.5
"""The largest normalised edit distance of a spelling that counts in part."""
PEOPLE = 3
"""How many people must have given an answer, so that it is right."""
LETTERS = string.ascii_uppercase


def exact(given: str, question: Question) -> float:
    """1 if the answer is one of the right ones, white space at its ends aside."""
    return float(given.strip() in [answer.strip() for answer in question.answers])


def normalised(given: str, question: Question) -> float:
    """1 if the answer is one of the right ones after both lost case, punctuation, articles and double spaces.

    Source: exact match of SQuAD (Rajpurkar et al., EMNLP 2016, arXiv:1606.05250).
    """
    return float(plain(given) in [plain(answer) for answer in question.answers])


def plain(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces. What has nothing else keeps them: "A" and "+" are no empty texts."""
    words = "".join(letter for letter in text.lower() if letter not in string.punctuation).split()
    return " ".join([word for word in words if word not in ARTICLES] or words) or text.strip().lower()


# -- VQA ---------------------------------------------------------------------------------------------------------------------

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(WORDS)}}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def vqa(given: str, question: Question) -> float:
    """The mean over people of min(1, how many of the *others* gave this answer / 3).

    Texts are compared in lower case, without articles and punctuation, and with digits for numbers up to ten. The official
    code also puts apostrophes into about 120 words ("dont" becomes "don't"); here all apostrophes are removed, so that both
    spellings are equal.

    Source: VQA (Antol et al., ICCV 2015, arXiv:1505.00468), in the form of its evaluation code.
    """
    said, answers = _as_vqa(given), [_as_vqa(answer) for answer in question.answers]
    same = answers.count(said)
    others = [same - (answer == said) for answer in answers]
    return sum(min(1.0, count / PEOPLE) for count in others) / len(others)


def _as_vqa(text: str) -> str:
    text = " ".join(text.lower().split())
    bare = text
    for sign in PUNCTUATION:
        joins = f"{sign} " not in text and f" {sign}" not in text and not re.search(r"\d,\d", text)
        bare = bare.replace(sign, " " if joins else "")
    text = re.sub(r"\.(?!\d)", "", bare).replace("'", "")
    return " ".join(DIGITS.get(word, word) for word in text.split() if word not in ARTICLES)


# -- numbers and spelling ----------------------------------------------------------------------------------------------------


def relaxed(given: str, question: Question) -> float:
    """1 if the answer is a number within 5 % of a right one, |given − right| / |right| ≤ 0.05, or the same text, case aside.

    A percent sign divides by 100. If the right number is 0, the texts must be equal.

    Source: relaxed accuracy of ChartQA (Masry et al., ACL Findings 2022, arXiv:2203.10244), after PlotQA.
    """
    return float(any(_close(given.strip(), answer.strip()) for answer in question.answers))


def _close(given: str, right: str) -> bool:
    said, wanted = _number(given), _number(right)
    if said is None or not wanted:
        return given.lower() == right.lower()
    return abs(said - wanted) / abs(wanted) <= WITHIN


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def anls(given: str, question: Question) -> float:
    """The largest 1 − d over the right answers, or 0 where every d > 0.5: average normalised Levenshtein similarity.

    d is the edit distance divided by the length of the longer text; case and double spaces do not count. At d = 0.5 the paper's
    formula gives 0, and the evaluation code in use (lmms-eval's) 0.5; this follows the code, so that numbers can be compared.

    Source: Biten et al., ICCV 2019, arXiv:1905.13648.
    """
    said = " ".join(given.lower().split())
    return max((_similarity(said, " ".join(answer.lower().split())) for answer in question.answers), default=0.0)


def _similarity(one: str, other: str) -> float:
    if not one and not other:
        return 1.0
    distance = _edits(one, other) / max(len(one), len(other))
    return 1.0 - distance if distance <= SIMILAR else 0.0


def _edits(one: str, other: str) -> int:
    """Letters to insert, delete or replace (Levenshtein 1966)."""
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        line = [row]
        for column, against in enumerate(other, start=1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (letter != against)))
        above = line
    return above[-1]


# -- multiple choice ---------------------------------------------------------------------------------------------------------


def choice(given: str, question: Question) -> float:
    """1 if the answer means a right choice: by its text, by its letter, or as the only choice whose text is in the answer.

    Letters are "B", "(B)", "B.", "B: …" or "the answer is B". A letter A before a word ("A dog") is an article.

    Source: the rules by which MMBench reads answers without a language model (Liu et al., ECCV 2024, arXiv:2307.06281).
    """
    said = chosen(given, question.choices)
    return float(said is not None and said in [chosen(answer, question.choices) for answer in question.answers])


LETTER = (
    re.compile(r"^\(?([A-Z])\)?$"),
    re.compile(r"^\(([A-Z])\)"),
    re.compile(r"^([A-Z])[.:),]"),
    re.compile(r"\b[Aa]nswer(?: is)?:? *\(?([A-Z])\)?(?:[.,]|$)"),
)


def chosen(text: str, choices: tuple[str, ...]) -> int | None:
    """The number of the choice that a text means; None if it means none, or several."""
    for form in (str.strip, plain):  # as it is first: -5 and 5 differ in punctuation alone
        said, known = form(text), [form(entry) for entry in choices]
        if said in known and (form is str.strip or known.count(said) == 1):
            return known.index(said)
    for pattern in LETTER:
        if (found := pattern.search(text.strip())) and (number := LETTERS.index(found[1])) < len(choices):
            return number
    within = [number for number, entry in enumerate(known) if entry and f" {entry} " in f" {said} "]
    return within[0] if len(within) == 1 else None


def task(given: str, question: Question) -> float:
    """What the question's own task gives the answer (lmms-eval)."""
    if question.judge is None:
        raise UsageError(f"question {question.id} belongs to no task that scores its answers: take another scorer.")
    return question.judge(given)


SCORERS: dict[str, Callable[[str, Question], float]] = {
    "exact": exact,
    "normalised": normalised,
    "vqa": vqa,
    "relaxed": relaxed,
    "anls": anls,
    "choice": choice,
    "task": task,
}


def score(given: str, question: Question) -> float:
    """The score of an answer by the question's own scorer."""
    return SCORERS[question.scorer](given, question)


def check_scorer(name: str) -> None:
    """Refuse a name that no scorer has.

    Raises:
        UsageError: names the nearest.
    """
    if name not in SCORERS:
        raise unknown("scorer", name, [known for known in SCORERS if known != "task"])


def check_scored(question: Question) -> None:
    """Refuse a question that its scorer cannot score.

    Raises:
        UsageError: no such scorer; no right answer; too few answers for `vqa`; no choices, or a right answer that is none.
    """
    check_scorer(question.scorer)
    if question.judge is not None:
        return
    if not question.answers:
        raise UsageError(f"question {question.id} has no right answer to compare with: give it one.")
    if question.scorer == "vqa" and len(question.answers) <= PEOPLE:
        raise UsageError(
            f"question {question.id} has {len(question.answers)} answers, and the scorer vqa needs more than {PEOPLE} (one for "
            "each person asked): give them all, or take another scorer."
        )
    if question.scorer == "choice":
        if not 2 <= len(question.choices) <= len(LETTERS):
            raise UsageError(
                f"question {question.id} has {len(question.choices)} choices, and the scorer choice needs 2 to {len(LETTERS)}: "
                "give them, or take another scorer."
            )
        for answer in question.answers:
            if chosen(answer, question.choices) is None:
                raise UsageError(
                    f"question {question.id}: the answer {answer!r} is none of its choices {', '.join(question.choices)}: give "
                    "the text or the letter of one."
                )
