"""A model that answers the requests of a benchmark: in batches, each answer kept in a folder, none asked twice.

The key of an answer is a hash of the whole prompt, its pixels and the options of `generate`. What all answers have in common
(weights, recipe, versions) stands in the folder's settings, and other settings are refused.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmprune.errors import UsageError, shown
from vlmprune.evals.fingerprints import (
    code_fingerprint,
    processor_fingerprint,
    recipe_fingerprint,
    versions,
    weights_fingerprint,
)
from vlmprune.evals.lmms_arguments import Arguments
from vlmprune.evals.lmms_asking import Asker
from vlmprune.evals.lmms_prompts import Message, Prompt, check_system, make_prompt
from vlmprune.evals.store import Row, Store
from vlmprune.loading.models import open_model

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
OPTIONS = (
    *("do_sample", *SAMPLING, "num_beams", "max_new_tokens", "min_new_tokens", "repetition_penalty"),
    *("no_repeat_ngram_size", "length_penalty", "early_stopping"),
)
"""What a task may ask of `generate`."""


@dataclass(frozen=True)
class Options:
    """How an answer is generated.

    Attributes:
        generate: keyword arguments of `generate`, sorted.
        until: texts at which an answer ends.
        ignored: names that are no option of `generate`.
    """

    generate: tuple[tuple[str, Any], ...]
    until: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @staticmethod
    def of(wanted: Mapping[str, Any], longest: int) -> Options:
        """The options of a task's `generation_kwargs`.

        Args:
            wanted: as the task states them.
            longest: answer, in tokens, where the task states none.
        """
        said = {name: value for name, value in wanted.items() if value is not None}
        until = said.pop("until", ())
        said.setdefault("max_new_tokens", said.pop("max_gen_toks", longest))
        said.setdefault("do_sample", float(said.get("temperature", 0)) > 0)
        known = {name: said[name] for name in OPTIONS if name in said and (said["do_sample"] or name not in SAMPLING)}
        ignored = tuple(sorted(set(said) - set(OPTIONS)))
        return Options(
            tuple(sorted(known.items())), (until,) if isinstance(until, str) else tuple(filter(None, until)), ignored
        )

    def cut(self, text: str) -> str:
        """A text up to the first of the texts at which it ends."""
        for end in self.until:
            text = text.split(end)[0]
        return text.strip()


@dataclass(frozen=True)
class Request:
    """One question of a benchmark.

    Attributes:
        messages: returns the conversation; called when it is asked, so that only the pictures of a batch are in memory.
        where: the document, for errors.
        options: how the answer is generated.
        answer: a given answer whose likelihood is wanted instead.
    """

    messages: Callable[[], Sequence[Message]]
    where: str
    options: Options = field(default_factory=lambda: Options(()))
    answer: str | None = None


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A request that has no answer yet: its number, prompt and key."""

    number: int
    prompt: Prompt
    key: tuple[str | int, ...]
    request: Request


class Session:
    """A loaded model and its answers.

    Args:
        arguments: what was asked for.

    Attributes:
        asked: number of requests that the model answered; all others were in the folder.
        device: on which the model computes.

    Raises:
        UsageError: the model cannot be loaded, the recipe does not fit it, the chat template has no place for the system text,
            or the folder holds answers of other settings.
    """

    def __init__(self, arguments: Arguments) -> None:
        recipe = arguments.open_recipe()
        model, processor = _load(arguments)
        if arguments.system:
            check_system(processor, arguments.system)
        self._arguments, self.asked = arguments, 0
        self._asker = Asker(model, processor, recipe)
        self.device = self._asker.device
        settings = {
            "pretrained": arguments.pretrained,
            "weights": weights_fingerprint(model),
            "processor": processor_fingerprint(processor),
            "recipe": "none" if recipe is None else str(recipe),
            "own methods": recipe_fingerprint(recipe),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "system": arguments.system,
            "versions": versions(),
        }
        self._store = Store(arguments.resume, settings, code_fingerprint("lmms_session"))

    def close(self) -> None:
        """Restore the model, and close the file of answers."""
        self._asker.close()
        self._store.close()

    def generate(self, requests: Iterable[Request], tick: Callable[[int], object] = lambda number: None) -> list[Row]:
        """Rows with `answer` and `columns`, in the order of the requests.

        Args:
            requests: what is asked.
            tick: called with the number of requests that were just answered.
        """

        def ask(waiting: Sequence[_Waiting]) -> list[Row]:
            found = self._asker.answer([one.prompt for one in waiting], dict(waiting[0].request.options.generate))
            return [{"answer": answer.text, "columns": answer.columns} for answer in found]

        requests = list(requests)
        rows = self._answered(requests, ask, tick)
        return [{**row, "answer": request.options.cut(row["answer"])} for request, row in zip(requests, rows, strict=True)]

    def judge(self, requests: Iterable[Request], tick: Callable[[int], object] = lambda number: None) -> list[Row]:
        """Rows with `loss`, `greedy` and `columns` for the requests' given answers, in the order of the requests."""

        def ask(waiting: Sequence[_Waiting]) -> list[Row]:
            found = self._asker.likelihood([one.prompt for one in waiting], [str(one.request.answer) for one in waiting])
            return [{"loss": one.loss, "greedy": one.greedy, "columns": one.columns} for one in found]

        return self._answered(list(requests), ask, tick)

    def _answered(
        self, requests: Sequence[Request], ask: Callable[[Sequence[_Waiting]], list[Row]], tick: Callable[[int], object]
    ) -> list[Row]:
        rows: dict[int, Row] = {}
        waiting: dict[Any, list[_Waiting]] = defaultdict(list)
        seen: Counter[str] = Counter()

        def flush(group: Any) -> None:
            batch = waiting.pop(group)
            found = ask(batch)
            self._store.add_all({one.key: row for one, row in zip(batch, found, strict=True)})
            self.asked += len(batch)
            rows.update({one.number: row for one, row in zip(batch, found, strict=True)})
            tick(len(batch))

        for number, request in enumerate(requests):
            prompt = make_prompt(self._asker.processor, request.messages(), self._arguments.system, request.where)
            generate = request.options.generate
            digest = prompt.digest(generate, request.answer)
            # Greedy answers to one prompt are alike. Where answers are drawn, each repetition has a draw of its own.
            key = (digest, seen[digest]) if dict(generate).get("do_sample") else (digest,)
            seen[digest] += 1
            if (row := self._store.get(key)) is not None:
                rows[number] = row
                tick(1)
                continue
            group = (generate, bool(prompt.images))  # not all processors take prompts with and without pictures together
            waiting[group].append(_Waiting(number, prompt, key, request))
            if len(waiting[group]) == self._arguments.batch_size:
                flush(group)
        for group in list(waiting):
            flush(group)
        return [rows[number] for number in range(len(requests))]


def _load(arguments: Arguments) -> tuple[Any, Any]:
    device = "cpu" if arguments.device_map else _device(arguments.device)  # the map says where the model goes
    processor, read_weights = open_model(arguments.pretrained, device, arguments.device_map, arguments.dtype)
    return read_weights(), processor


def _device(wanted: str | None) -> str:
    """The device of this process: of several processes, each takes a GPU of its own."""
    if wanted not in (None, "cuda"):
        return str(wanted)
    count = torch.cuda.device_count()
    return f"cuda:{local_rank() % count}" if count else wanted or "cpu"


def local_rank() -> int:
    """The number of this process on its machine, as torchrun says it; 0 if there is only one.

    Raises:
        UsageError: LOCAL_RANK is no number.
    """
    found = os.environ.get("LOCAL_RANK", "0")
    if not found.isdigit():
        raise UsageError(f"LOCAL_RANK must be a number, found {shown(found)}: torchrun sets it.")
    return int(found)
