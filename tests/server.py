"""A server in small: worker threads answer requests with one wrapped model, whose recipe another thread replaces under load.

What is true of a request is what the same request gives alone, on a model of its own, under one recipe and one override.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import build, make_inputs, warm_up
from transformers import TextIteratorStreamer

import vlmprune as vp

FAMILY = "llava"
NEW_TOKENS = 5
PATIENCE = 60
"""Seconds after which a thread that does not answer is a failure."""
RECIPES = (
    "divprune:layer=0,fraction=0.5",
    "cls:layer=0,fraction=0.4",
    "fastv:layer=2,fraction=0.25",
    "visionzip:fraction=0.5",
    "flowcut:fraction=0.3",
    "random:layer=2,fraction=0.6,seed=1 + zerotuning:gain=3,layers=1|3:",
)
"""Each has one stage, so that it can be overridden: before the model, with the tower's knowledge, with attention, merging,
cutting inside the tower, beside redistribution."""
OVERRIDES: tuple[dict[str, Any], ...] = ({}, {"tokens": 3}, {"fraction": 0.75})
PROMPTS: tuple[tuple[list[list[str]], int], ...] = (
    *(([["text4", "image", "text5"]], seed) for seed in range(4)),
    ([["text2", "image", "text3", "image", "text4"]], 4),
    ([["text7", "image", "text4"], ["text2", "image", "text3"]], 5),
    ([["text7"], ["text2", "image", "text3"]], 6),
    *(([[words]], seed) for seed, words in enumerate(("text9", "text6"), start=7)),
    ([["text5"], ["text8"]], 9),
)
"""Samples and seed: a picture, two, batches with and without a row of words, words alone."""


class Words:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f"{token} " for token in tokens)


@dataclass(frozen=True)
class Request:
    prompt: int
    override: int = 0
    stream: bool = False

    def inputs(self) -> dict:
        samples, seed = PROMPTS[self.prompt]
        return make_inputs(FAMILY, None, samples, seed)

    @property
    def pictures(self) -> int:
        return sum(part == "image" for row in PROMPTS[self.prompt][0] for part in row)


@dataclass(frozen=True)
class Answer:
    """What a request gave: tokens, which tokens every stage kept of every picture, and what the report says."""

    tokens: tuple[int, ...]
    kept: tuple[Any, ...]
    batch: int
    prompt_tokens: int
    visual_tokens: int
    stages: int


def answer_of(tokens: torch.Tensor | Sequence[int], run: vp.Run) -> Answer:
    kept = tuple((k.site, k.layer, k.sample, k.ordinal, tuple(k.index.tolist())) for k in run.last.kept)
    said = run.report()
    flat = tuple(torch.as_tensor(tokens).flatten().tolist())
    return Answer(flat, kept, said.batch, said.prompt_tokens, said.visual_tokens, len(said.stages))


def serve_one(model, run: vp.Run, request: Request) -> tuple[Sequence[int] | torch.Tensor, Answer | None]:
    """As a server does it: with a budget of its own, or streamed from a plain thread that is started in the block.

    Requests that need no block run without one, and only tokens are returned; whose recipe they had is the handles' to say.
    """
    budget = OVERRIDES[request.override]
    if not budget and not request.stream:
        return generate(model, request), None
    with run.override(**budget):
        tokens = stream(model, request) if request.stream else generate(model, request)
        return tokens, answer_of(tokens, run)


@torch.inference_mode()
def generate(model, request: Request) -> torch.Tensor:
    return model.generate(**request.inputs(), max_new_tokens=NEW_TOKENS)[:, -NEW_TOKENS:]


def stream(model, request: Request) -> list[int]:
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=PATIENCE)
    told: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**request.inputs(), max_new_tokens=NEW_TOKENS, streamer=streamer)
        except BaseException as error:
            told.append(error)
            streamer.end()

    thread = threading.Thread(target=work)
    thread.start()
    tokens = [int(word) for word in "".join(streamer).split()]
    thread.join(PATIENCE)
    if told:
        raise told[0]
    return tokens


class Alone:
    """The serial answers, from a model of the same weights that nobody else uses."""

    def __init__(self) -> None:
        self.model = build(FAMILY)
        warm_up(self.model, FAMILY)
        self._known: dict[tuple[Any, ...], Answer] = {}

    def answer(self, recipe: str, prompt: int, override: int) -> Answer:
        key = recipe, prompt, override
        if key not in self._known:
            with vp.wrap(self.model, recipe) as run:
                tokens, answer = serve_one(self.model, run, Request(prompt, override))
                self._known[key] = answer or answer_of(tokens, run)
        return self._known[key]


@dataclass
class Served:
    """One request: its answer by every recipe whose handle has a record of it (it must be one), and how late that recipe was:
    0 for the one in force when the request came, n for the n-th that replaced it meanwhile."""

    request: Request
    answers: tuple[tuple[str, int, Answer], ...] = ()
    error: BaseException | None = None


@dataclass
class Server:
    """Answers requests in `threads` workers; after every `every` of them the recipe is replaced."""

    threads: int = 8
    every: int = 25
    model: Any = field(default_factory=lambda: build(FAMILY))

    def serve(self, requests: Sequence[Request]) -> list[Served]:
        """Every request once, and the recipe replaced under load; in the end the model is as before."""
        waiting: queue.Queue[Request] = queue.Queue()
        for request in requests:
            waiting.put(request)
        names = itertools.cycle(RECIPES)
        handles: list[tuple[str, vp.Run]] = []
        served: list[Served] = []
        turn, replacing = threading.Condition(), threading.Lock()

        def replace() -> None:
            name = next(names)
            with replacing:
                handles.append((name, vp.wrap(self.model, name)))

        def since(first: int) -> list[tuple[str, vp.Run]]:
            with replacing:
                return handles[first:]

        def work() -> None:
            while True:
                try:
                    request = waiting.get_nowait()
                except queue.Empty:
                    return
                first = len(handles) - 1
                known = [run.last for _, run in since(first)]
                try:
                    name, run = handles[first]
                    try:
                        tokens, answer = serve_one(self.model, run, request)
                    except vp.UsageError as refusal:
                        if "replaced by another wrap" not in str(refusal):
                            raise
                        waiting.put(request)  # the recipe went before the block was opened: once more, with the new one
                        continue
                    if answer is not None:
                        done = Served(request, ((name, 0, answer),))
                    else:  # the handle that did it has a new record; those that the thread has of others are what they were
                        known += [None] * (len(handles) - first)
                        late = [(n, *handle) for n, handle in enumerate(since(first)) if handle[1].last is not known[n]]
                        done = Served(request, tuple((name, n, answer_of(tokens, run)) for n, name, run in late))
                except BaseException as failure:
                    done = Served(request, error=failure)
                with turn:
                    served.append(done)
                    turn.notify_all()

        replace()
        workers = [threading.Thread(target=work) for _ in range(self.threads)]
        for worker in workers:
            worker.start()
        next_one = self.every
        while any(worker.is_alive() for worker in workers):
            with turn:
                turn.wait(timeout=0.2)
            if len(served) >= next_one and not waiting.empty():
                replace()
                next_one = len(served) + self.every
        for worker in workers:
            worker.join(PATIENCE)
        handles[-1][1].remove()
        self.replaced = len(handles) - 1
        return served


def requests(count: int) -> list[Request]:
    """A mixed load; single rows are streamed every other time. The same for the same number."""
    random = torch.Generator().manual_seed(count)
    load = []
    for prompt, override, stream in torch.randint(10**6, (count, 3), generator=random).tolist():
        samples, _ = PROMPTS[prompt % len(PROMPTS)]
        load.append(Request(prompt % len(PROMPTS), override % len(OVERRIDES), len(samples) == 1 and stream % 2 == 1))
    return load
