"""Ask what a store lacks, alone or together with other processes, and put all answers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import vlmprune
from vlmprune.evals.answers import UNPRUNED, Answered, Answers, Asked
from vlmprune.evals.asking import Asking, under
from vlmprune.evals.fingerprints import processor_fingerprint, recipe_fingerprint, versions, weights_fingerprint
from vlmprune.evals.question import Question, QuestionSet
from vlmprune.evals.scorers import score
from vlmprune.evals.shards import ALONE, USUAL_WAIT, Shard, wait_for_others
from vlmprune.evals.store import Key, Store
from vlmprune.loading.placement import execution_device

Plan = Sequence[tuple[int, "vlmprune.Recipe | None"]]
"""Which set of questions each recipe is asked; None is the un-pruned model."""


def recipe_name(recipe: vlmprune.Recipe | None) -> str:
    """A recipe's string, or "un-pruned"."""
    return UNPRUNED if recipe is None else str(recipe)


def settings_of(name: str, model: Any, processor: Any, questions: QuestionSet, batch_size: int, **more: Any) -> dict[str, Any]:
    """Everything beside the recipe and the code that an answer depends on.

    Args:
        name: of the model, as the user wrote it.
        questions: the first set.
        more: what says in words how the questions were chosen, for the sentence that refuses others.
    """
    return {
        "model": Path(name).name,
        "weights": weights_fingerprint(model),
        "processor": processor_fingerprint(processor),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": execution_device(model).type,
        "data": Path(questions.name).name,
        "questions": questions.fingerprint,
        "batch": batch_size,
        "max_new_tokens": questions.max_new_tokens,
        "versions": versions(),
        **more,
    }


def answer(
    model: Any,
    asked: Sequence[Asking],
    plan: Plan,
    store: Store,
    shard: Shard = ALONE,
    minutes: float = USUAL_WAIT,
    tick: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Answered | None:
    """Ask all questions of a plan that have no answer yet.

    Args:
        model: un-wrapped.
        asked: the sets of questions.
        plan: (number of the set, recipe) pairs.
        store: where answers are kept, and other processes add theirs.
        shard: which parts are this process's; a part is one batch under one recipe.
        minutes: how long rank 0 waits for other processes without a new answer.
        tick: called before every part with its recipe, the number of parts that have answers, and their total; and at the end.

    Returns:
        All answers; None for another rank than 0.

    Raises:
        UsageError: a recipe cannot be applied, or the other processes' answers do not come.
    """
    parts = {part.key: part for number, recipe in plan for part in _parts(asked[number], number, recipe)}
    keys = list(parts)
    own = [key for number, key in enumerate(keys) if shard.mine(number)]

    def progress(step: str) -> None:
        tick(step, sum(key in store for key in keys), len(keys))

    for _, group in groupby(store.to_do(own), key=lambda key: key[:3]):
        first = next(group)
        with under(model, parts[first].recipe) as run:
            for key in chain([first], group):
                part = parts[key]
                progress(recipe_name(part.recipe))
                got = asked[part.asked].measure_batch(model, part.batch, run)
                row = {"given": got.given, "entered": got.entered, "visual": got.visual, "kept": got.kept}
                store.add(key, {**row, "seconds": got.seconds})
    if not shard.first:
        return None
    wait_for_others(store, keys, shard, minutes, progress)
    progress("")
    merged = (_merged(asked[number], number, recipe, store) for number, recipe in plan)
    return Answered([asked_of(one.questions) for one in asked], merged)


class Part(NamedTuple):
    """One batch of one set of questions under one recipe."""

    recipe: vlmprune.Recipe | None
    asked: int
    batch: int

    @property
    def key(self) -> Key:
        return recipe_name(self.recipe), recipe_fingerprint(self.recipe), self.asked, self.batch


def _parts(asking: Asking, number: int, recipe: vlmprune.Recipe | None) -> list[Part]:
    """All batches of a set under a recipe."""
    return [Part(recipe, number, batch) for batch in range(len(asking.batches))]


def asked_of(questions: Iterable[Question]) -> Asked:
    """Questions as statistics need them. Those without a group are one named "all"; "mean" is taken by the mean over groups."""
    names = {"": "all", "mean": "mean (group)"}
    rows = [(one.id, one.text, list(one.answers), names.get(one.group, one.group), one.unit or one.id) for one in questions]
    ids, texts, answers, groups, units = (list(column) for column in zip(*rows, strict=True))
    return Asked(ids, texts, answers, groups, units)


def _merged(asking: Asking, number: int, recipe: vlmprune.Recipe | None, store: Store) -> Answers:
    """One recipe's answers to one set, from the rows of its batches."""
    questions = asking.questions
    given, kept = [""] * len(questions), [0] * len(questions)
    entered, visual, seconds = 0.0, 0, 0.0
    for batch, part in zip(asking.batches, _parts(asking, number, recipe), strict=True):
        row = store[part.key]
        for index, said, left in zip(batch, row["given"], row["kept"], strict=True):
            given[index], kept[index] = said, left
        entered, visual, seconds = entered + row["entered"], visual + row["visual"], seconds + row["seconds"]
    scores = [score(said, one) for said, one in zip(given, questions, strict=True)]
    return Answers(recipe_name(recipe), number, given, scores, entered / visual if visual else 1.0, kept, seconds)
