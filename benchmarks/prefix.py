"""One picture and sixteen questions: on a shared prefix, against sixteen prompts of their own.

    python benchmarks/prefix.py [--rounds 9] [--questions 16] [--threads 1] [--model …] [--out docs/results/prefix-cpu]

Two models: the embedded one with its questions, and a LLaVA-shaped random one (640 wide, 4 layers, 576 visual tokens).
Every round asks all questions in five ways, in changing order: un-pruned prompts one by one, pruned prompts one by one, pruned
prompts in one batch, questions on a prefix one by one, and questions on a prefix in one batch; making the prefix counts. Every
answer has the same number of tokens. Times are CPU times of the process, because other work on the machine disturbs them less;
ratios are taken within rounds, and the table has their median over rounds, with the 95 % interval of a bootstrap over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from decoding import spread
from native import three  # benchmarks/ is no package: its scripts find each other
from prefill import llava_shaped
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import vlmprune
from vlmprune import tiny
from vlmprune.evals.results import Result, stamp
from vlmprune.show.table import code, table
from vlmprune.tiny.scenes import make_scene

STEPS = 4
EMBEDDED, SHAPED = "embedded", "LLaVA-shaped"
RECIPES = {EMBEDDED: "divprune:tokens=16", SHAPED: "divprune:tokens=64"}
COLUMNS = (
    "model",
    "recipe",
    "prefix, one by one",
    "prefix, batch",
    "CPU seconds: prefix, batch",
    "prompts, one by one",
    "prefix KiB",
    "same answers",
)

Inputs = dict[str, Any]


class Asked:
    """A model, a picture, and questions about it.

    Args:
        model: to wrap.
        beginning: what the processor gives for the prompt up to the question.
        questions: ids `[1, n]` of what follows in each prompt.
    """

    def __init__(self, model: Any, beginning: Inputs, questions: list[Tensor]) -> None:
        self.model, self.beginning, self.questions = model, beginning, questions
        self._pad = torch.tensor([[0]])

    def _answers(self, given: Inputs) -> Tensor:
        output: Tensor = self.model.generate(**given, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
        return output[:, -STEPS:]

    def _prompts(self, questions: list[Tensor]) -> Inputs:
        """Whole prompts, padded on the left, each with the picture."""
        begin, width = self.beginning["input_ids"], max(question.shape[1] for question in questions)
        rows, masks = [], []
        for question in questions:
            pad = self._pad.expand(1, width - question.shape[1])
            rows.append(torch.cat((pad, begin, question), dim=1))
            masks.append(torch.cat((torch.zeros_like(pad), torch.ones_like(begin), torch.ones_like(question)), dim=1))
        pixels = self.beginning["pixel_values"].expand(len(questions), -1, -1, -1)
        return {"input_ids": torch.cat(rows), "attention_mask": torch.cat(masks), "pixel_values": pixels}

    def separate(self, run: vlmprune.Run) -> Tensor:
        return torch.cat([self._answers(self._prompts([question])) for question in self.questions])

    def unpruned(self, run: vlmprune.Run) -> Tensor:
        with run.override(enabled=False):
            return self.separate(run)

    def batch(self, run: vlmprune.Run) -> Tensor:
        return self._answers(self._prompts(self.questions))

    def one_by_one(self, run: vlmprune.Run) -> Tensor:
        prefix = run.encode(**self.beginning)
        return torch.cat([self._answers(prefix.ask(question)) for question in self.questions])

    def together(self, run: vlmprune.Run) -> Tensor:
        width = max(question.shape[1] for question in self.questions)
        pads = [self._pad.expand(1, width - question.shape[1]) for question in self.questions]
        ids = torch.cat([torch.cat(both, dim=1) for both in zip(pads, self.questions, strict=True)])
        mask = torch.cat(
            [torch.cat((torch.zeros_like(pad), torch.ones_like(q)), dim=1) for pad, q in zip(pads, self.questions, strict=True)]
        )
        return self._answers(run.encode(**self.beginning).ask(ids, mask))


WAYS: dict[str, Callable[[Asked, vlmprune.Run], Tensor]] = {
    "unpruned": Asked.unpruned,
    "separate": Asked.separate,
    "batch": Asked.batch,
    "one by one": Asked.one_by_one,
    "together": Asked.together,
}


def embedded(count: int) -> Asked:
    """A scene whose questions are those of several: what they ask about need not be there."""
    model, processor = tiny.load()
    scenes = [make_scene(seed) for seed in range(count)]
    begin, _, _ = tiny.prompt("").partition("\n")
    beginning = processor(text=begin, images=scenes[0].image, return_tensors="pt")
    texts = [scene.questions[seed % len(scene.questions)].text for seed, scene in enumerate(scenes)]
    rest = [tiny.prompt(text).partition("\n")[2] for text in texts]
    ids = [processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in rest]
    return Asked(model, dict(beginning), ids)


def shaped(count: int) -> Asked:
    model, inputs = llava_shaped(dim=640, mlp=1728, layers=4)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    random = torch.Generator().manual_seed(1)
    questions = [torch.randint(10, 4096, (1, 10 + number % 8), generator=random) for number in range(count)]
    ids = inputs["input_ids"][:, :-25]  # up to the picture's end
    return Asked(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]}, questions)


MODELS: dict[str, Callable[[int], Asked]] = {EMBEDDED: embedded, SHAPED: shaped}


def measure(asked: Asked, name: str, rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    """One row of the table."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    answers: dict[str, Tensor] = {}
    with vlmprune.wrap(asked.model, RECIPES[name]) as run:
        for turn in range(rounds + 1):  # the first warms up
            order = list(WAYS)[turn % len(WAYS) :] + list(WAYS)[: turn % len(WAYS)]
            for way in order:
                begun = time.process_time()
                answers[way] = WAYS[way](asked, run)
                if turn:
                    seconds[way].append(time.process_time() - begun)
                tick()
        kib = run.encode(**asked.beginning).bytes / 1024
    ratios = {
        f"{way} over {other}": spread([a / b for a, b in zip(seconds[other], seconds[way], strict=True)])
        for way, other in (
            ("one by one", "separate"),
            ("together", "separate"),
            ("together", "batch"),
            ("one by one", "unpruned"),
            ("together", "unpruned"),
        )
    }
    same = {way: int((answers[way] == answers["separate"]).all(dim=1).sum()) for way in ("batch", "one by one", "together")}
    return {
        "model": name,
        "recipe": RECIPES[name],
        "questions": len(asked.questions),
        "rounds": rounds,
        "ratios": ratios,
        "seconds": {way: median(times) for way, times in seconds.items()},
        "kib": kib,
        "same": same,
    }


def result(numbers: Mapping[str, Any]) -> Result:
    """The table, and what was asked."""
    cells = [
        [
            row["model"],
            code(row["recipe"]),
            three(row["ratios"]["one by one over separate"]),
            three(row["ratios"]["together over separate"]),
            f"{row['seconds']['together']:.2f}",
            f"{row['seconds']['separate']:.2f}",
            f"{row['kib']:.0f}",
            f"{min(row['same'].values())} of {row['questions']}",
        ]
        for row in numbers["rows"]
    ]
    others = [
        [
            row["model"],
            three(row["ratios"]["together over batch"]),
            three(row["ratios"]["one by one over unpruned"]),
            three(row["ratios"]["together over unpruned"]),
        ]
        for row in numbers["rows"]
    ]
    first = numbers["rows"][0]
    said = (
        f"{first['questions']} questions about one picture, {STEPS} new tokens each; {first['rounds']} rounds. How many times "
        "as fast as the same prompts, pruned by the same recipe, one by one (95 %). The same answers: token by token, in every "
        "way."
    )
    more = "The prefix against the same prompts in one batch, and against un-pruned prompts one by one (95 %)."
    columns = ("model", "batch over a batch of prompts", "one by one over un-pruned", "batch over un-pruned")
    return Result(numbers, [said, table(COLUMNS, cells), more, table(columns, others)])


def main(
    rounds: Annotated[int, typer.Option(min=3)] = 9,
    questions: Annotated[int, typer.Option(min=2)] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    model: Annotated[list[str] | None, typer.Option(help=f"{EMBEDDED} or {SHAPED}; both by default.")] = None,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path("docs/results/prefix-cpu"),
) -> None:
    torch.set_num_threads(threads)
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.inference_mode():
        names = model or list(MODELS)
        task = progress.add_task("questions", total=len(names) * (rounds + 1) * len(WAYS))
        rows = [measure(MODELS[name](questions), name, rounds, lambda: progress.advance(task)) for name in names]
    command = f"python benchmarks/prefix.py --rounds {rounds} --questions {questions} --threads {threads}"
    command += "".join(f" --model {name}" for name in model or ())
    out.parent.mkdir(parents=True, exist_ok=True)
    result({**stamp(command), "rows": rows}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
