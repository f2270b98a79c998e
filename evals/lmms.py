"""The model `vlmprune` in lmms-eval: a chat class, and a simple class for tasks that are scored by likelihood.

lmms-eval finds it by the entry point `lmms_eval.models`. `vlmprune lmms …` runs it (`evals/lmms_run.py`); so does

    lmms-eval eval --model vlmprune --model_args 'pretrained=tiny,recipe="fastv:layer=2,fraction=0.25"' --tasks …

The arguments stand in `evals/lmms_arguments.py`, the columns of each sample in `evals/lmms_columns.py`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vlmprune.errors import UsageError
from vlmprune.evals.lmms_arguments import read_arguments
from vlmprune.evals.lmms_columns import mean_columns
from vlmprune.evals.lmms_prompts import Message, simple_messages
from vlmprune.evals.lmms_session import Options, Request, Session
from vlmprune.evals.store import Row

try:
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise UsageError(
        f"lmms-eval 0.7 cannot be imported here ({error}): install it as docs/lmms.md says, `pip install 'vlmprune[lmms]'` "
        "where there is a GPU."
    ) from error
from tqdm import tqdm

ROUNDS = 64
"""A conversation of more rounds is taken for one that never ends."""


def manifests() -> ModelManifest:
    """What the entry point gives: lmms-eval takes the chat class, and the simple one under `--force_simple`."""
    return ModelManifest(
        model_id="vlmprune",
        chat_class_path="vlmprune.evals.lmms.Chat",
        simple_class_path="vlmprune.evals.lmms.Simple",
    )


@dataclass
class Counts(TokenCounts):
    """Token counts with our columns beside them. lmms-eval writes them with each sample, and gathers those of all processes."""

    columns: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything that the samples file gets."""
        return {**super().to_dict(), **self.columns}

    @staticmethod
    def of(columns: Mapping[str, float]) -> Counts:
        """The counts of one answer."""
        rest = {name: value for name, value in columns.items() if name not in ("input_tokens", "output_tokens")}
        return Counts(int(columns["input_tokens"]), int(columns["output_tokens"]), columns=rest)


class _Model(lmms):
    """What the chat class and the simple class have in common."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        with _loud():
            self._arguments = read_arguments(arguments)
            self._session = Session(self._arguments)
        self._device = self._session.device
        self._ignored: set[str] = set()

    @property
    def device(self) -> Any:
        """On which the model computes; lmms-eval gathers counts there."""
        return self._device

    @property
    def chat_template(self) -> str:
        """Refused: the answer to `--apply_chat_template`."""
        raise UsageError(
            "vlmprune applies the processor's chat template to every prompt, and --apply_chat_template would apply it twice: "
            "leave it out (a system text goes into --model_args, system=…)."
        )

    apply_chat_template = tokenizer_name = chat_template

    def clean(self) -> None:
        """Restore the model and free its memory, as lmms-eval asks before it computes metrics."""
        if hasattr(self, "_session"):
            self._session.close()
            del self._session
        super().clean()

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Mean −log p of each given answer after its prompt, and whether greedy decoding gives it.

        lmms-eval takes the smallest as the best. A bare tuple would reach its tasks as a text (`unwrap_generation_output`), a
        `GenerationResult` does not.
        """
        asked = []
        for request in _real(requests):
            context, target, visuals, document, task, split = request.arguments
            doc = partial(self._document, task, split, document)
            answer = target if isinstance(target, str) else str(target(doc()))
            messages = partial(_simple, context, visuals, doc)
            asked.append(Request(messages, _where(document, task), answer=answer))
        rows = self._rows(asked, self._session.judge)
        found = iter([GenerationResult((row["loss"], row["greedy"]), Counts.of(row["columns"])) for row in rows])
        return [GenerationResult((0.0, False)) if _padding(request) else next(found) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answer to each request."""
        rows = self._rows([self._request(request) for request in _real(requests)], self._session.generate)
        found = iter([GenerationResult(row["answer"], Counts.of(row["columns"])) for row in rows])
        return [GenerationResult("") if _padding(request) else next(found) for request in requests]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers to each request, one for each round; a round of all requests is asked together."""
        talks = [self._talk(request) for request in requests]
        answers: list[list[str]] = [[] for _ in requests]
        counts: list[list[Mapping[str, float]]] = [[] for _ in requests]
        going = [number for number, request in enumerate(requests) if not _padding(request)]
        for turn in range(ROUNDS):
            wanted = {number: talks[number](turn, answers[number]) for number in going}
            going = [number for number in going if wanted[number] is not None]
            if not going:
                break
            asked = [request for number in going if (request := wanted[number]) is not None]
            for number, row in zip(going, self._rows(asked, self._session.generate), strict=True):
                answers[number].append(row["answer"])
                counts[number].append(row["columns"])
        else:
            raise UsageError(f"{_where(*_named(requests[going[0]]))}: after {ROUNDS} rounds its conversation has not ended.")
        return [
            GenerationResult(said, Counts.of(mean_columns(own)) if own else None)
            for said, own in zip(answers, counts, strict=True)
        ]

    def _request(self, request: Instance) -> Request:
        """What one request of lmms-eval asks; `Chat` and `Simple` are given it in different forms."""
        raise NotImplementedError

    def _talk(self, request: Instance) -> Callable[[int, list[str]], Request | None]:
        """A function from round and answers so far to the next request; None after the last. `Chat` and `Simple` say how."""
        raise NotImplementedError

    def _rows(self, requests: Sequence[Request], ask: Callable[..., list[Row]]) -> list[Row]:
        """Ask, show progress, and hand the throughput to lmms-eval's table."""
        begun = time.perf_counter()
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="vlmprune")
        with _loud():
            rows = ask(requests, bar.update)
        bar.close()
        took = time.perf_counter() - begun
        if rows:
            tokens = int(sum(row["columns"]["output_tokens"] for row in rows))
            log_metrics(took, tokens, tokens / took, mean_columns([row["columns"] for row in rows]))
        return rows

    def _options(self, wanted: Mapping[str, Any]) -> Options:
        options = Options.of(wanted, self._arguments.max_new_tokens)
        if new := sorted(set(options.ignored) - self._ignored):
            self._ignored |= set(new)
            print(
                f"vlmprune: note: generation_kwargs names what is no option of generate, ignored: {', '.join(new)}",
                file=sys.stderr,
            )
        return options

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]


class Chat(_Model):
    """The class for tasks that generate: prompts come as messages."""

    is_simple = False

    def _request(self, request: Instance) -> Request:
        _, messages, options, document, task, split = request.arguments
        return Request(lambda: messages(self._document(task, split, document)), _where(document, task), self._options(options))

    def _talk(self, request: Instance) -> Callable[[int, list[str]], Request | None]:
        _, messages, options, document, task, split = request.arguments
        said: dict[str, Any] = {"info": None}

        def next_request(turn: int, answers: list[str]) -> Request | None:
            doc = self._document(task, split, document)
            if turn == 0:
                asked = messages(doc)
            else:
                found = messages(doc, round_idx=turn, previous_output=list(answers), previous_round_info=said["info"])
                if not isinstance(found, tuple):
                    return None
                asked, ended, _, said["info"] = found
                if ended:
                    return None
            return Request(lambda: asked, _where(document, task), self._options(options))

        return next_request


class Simple(_Model):
    """The class for tasks that are scored by likelihood, and for `--force_simple`: prompts come as text and pictures."""

    is_simple = True

    def _request(self, request: Instance) -> Request:
        context, options, visuals, document, task, split = request.arguments
        doc = partial(self._document, task, split, document)
        return Request(partial(_simple, context, visuals, doc), _where(document, task), self._options(options))

    def _talk(self, request: Instance) -> Callable[[int, list[str]], Request | None]:
        context, options, visuals, text, document, task, split = request.arguments
        doc = partial(self._document, task, split, document)
        said: dict[str, Any] = {"info": None}

        def next_request(turn: int, answers: list[str]) -> Request | None:
            if turn == 0:
                return Request(partial(_simple, context, visuals, doc), _where(document, task), self._options(options))
            found = text(doc(), previous_output=list(answers), round_idx=turn, previous_round_info=said["info"])
            if not isinstance(found, tuple):
                return None
            pictures, asked, ended, _, said["info"] = found
            if ended:
                return None
            return Request(partial(simple_messages, asked, pictures), _where(document, task), self._options(options))

        return next_request


def _simple(context: str, visuals: Callable[[Any], Sequence[Any] | None] | None, doc: Callable[[], Any]) -> list[Message]:
    return simple_messages(context, None if visuals is None else visuals(doc()))


def _where(document: Any, task: Any) -> str:
    return f"document {document} of {task}"


def _named(request: Instance) -> tuple[Any, Any]:
    """Number of the document, and name of the task."""
    document, task, _ = request.arguments[-3:]
    return document, task


def _padding(request: Instance) -> bool:
    """Whether a request only makes all processes call equally often, and counts nowhere."""
    return bool(request.metadata.get("__padding_only__"))


def _real(requests: Sequence[Instance]) -> list[Instance]:
    return [request for request in requests if not _padding(request)]


@contextmanager
def _loud() -> Iterator[None]:
    """Under torchrun, end the process on an error. lmms-eval catches every error and returns 0, and the other processes would
    wait for this one."""
    try:
        yield
    except Exception as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        traceback.print_exc()
        raise SystemExit(1) from error
