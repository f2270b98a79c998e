"""lmms-eval's evaluator in this process, without its 1985 stock tasks: they take seven seconds to index."""

from __future__ import annotations

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from vlmprune.evals.lmms_arguments import Arguments, write_arguments
from vlmprune.evals.lmms_tasks import OURS


def evaluate(task, recipe="none", batch=8, limit=None, include=OURS, simple=False, **arguments):
    """The results of one task, with its samples."""
    return simple_evaluate(
        model="vlmprune",
        model_args=write_arguments(Arguments("tiny", recipe=recipe, **arguments)),
        tasks=[task],
        batch_size=batch,
        limit=limit,
        device="cpu",
        task_manager=TaskManager("ERROR", include_path=str(include), include_defaults=False, model_name="vlmprune"),
        bootstrap_iters=0,
        force_simple=simple,
    )


def answers(results):
    """The answers to the documents of the only task, in the order of the documents."""
    (samples,) = results["samples"].values()
    return [sample["filtered_resps"][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def counts(results):
    """What stands beside each answer, in the order of the documents."""
    (samples,) = results["samples"].values()
    return [sample["token_counts"][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
