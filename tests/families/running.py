"""Runs one cell, and compares it with the oracles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.cells import STAGES, Cell, Refusal
from families.configs import IMAGE, VIDEO
from families.oracles import MOVED, TOLERANCE, Keep, dropped_row, expected_logits
from families.table import ALL_FRAMES, BATCHES, FRAMES, TINY, make_inputs, shared, visual_columns
from torch import Tensor

import vlmprune as vp

STEPS = 6
"""New tokens: the prompt's logits and five decoding steps."""
BEAMS, SAMPLES = 3, 2
Wrap = Callable[[Any, str], Any]


def generate(model: Any, inputs: dict[str, Any], steps: int = STEPS, **strategy: Any) -> tuple[Any, Tensor, Tensor]:
    """(output, new ids `[batch, n]`, raw logits `[batch, n, vocabulary]`) of `generate`."""
    strategy = {"return_dict_in_generate": True, "output_logits": True, **strategy}
    output = model.generate(**inputs, max_new_tokens=steps, **strategy)
    return output, output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


def close(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, atol=TOLERANCE, rtol=0)


def check_keep(inputs: dict[str, Any], keep: Keep, cell: Cell) -> None:
    """What a run says that it kept: all text, and of each row's pictures the share that the recipe names."""
    visual, real = visual_columns(inputs), inputs["attention_mask"].bool()
    assert list(keep) == list(STAGES[cell.stages])
    for layer, share in STAGES[cell.stages].items():
        for row, mask in enumerate(keep[layer]):
            assert torch.equal(mask[~visual[row]], real[row, ~visual[row]]), "text was dropped, or padding kept"
            whole, left = int(visual[row].sum()), int(mask[visual[row]].sum())
            # Row separators stay, and every picture, tile or crop rounds by itself.
            assert share * whole - 4 <= left < max(whole, 1), f"row {row} keeps {left} of {whole} tokens before layer {layer}"


def check_moved(name: str, model: Any, samples: list[list[str]], new: Tensor, given: Tensor) -> None:
    """Pruning changed the logits of every row with a picture."""
    unpruned = expected_logits(name, model, samples, {}, new[:, :-1])
    for row, parts in enumerate(samples):
        if "image" in parts or "video" in parts:
            assert (given[row] - unpruned[row]).abs().max() > MOVED, f"pruning changed nothing in row {row}"


def greedy(cell: Cell, model: Any, wrap: Wrap) -> None:
    samples = BATCHES[cell.batch]
    inputs = make_inputs(cell.family, samples)
    with wrap(model, cell.recipe) as run:
        _, new, logits = generate(model, inputs)
        keep = run.last.keep
    close(logits, expected_logits(cell.family, model, samples, keep, new[:, :-1]))
    if len(samples) == 1 and not TINY[cell.family].recurrent:
        close(logits, dropped_row(cell.family, model, samples, 0, keep, new[:, :-1]))
    if keep:
        check_keep(inputs, keep, cell)
        check_moved(cell.family, model, samples, new, logits)


def second_turn(cell: Cell, model: Any, wrap: Wrap) -> None:
    samples = BATCHES[cell.batch]
    inputs = make_inputs(cell.family, samples)
    words = torch.randint(8, 96, (len(samples), 5), generator=torch.Generator().manual_seed(7))
    with wrap(model, cell.recipe) as run:
        first, _, _ = generate(model, inputs, 3)
        keep = run.last.keep
        ids = torch.cat([first.sequences, words], 1)
        mask = torch.ones_like(ids)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": first.past_key_values}
        second, _, logits = generate(model, turn)
    behind = second.sequences[:, inputs["input_ids"].shape[1] : -1]
    expected = expected_logits(cell.family, model, samples, keep, behind)
    close(logits, expected[:, -logits.shape[1] :])


def repeated(cell: Cell, model: Any, keep: Keep, new: Tensor, times: int) -> Tensor:
    """`expected_logits` of `times` sequences per sample: `[batch · times, 1 + n, vocabulary]`."""
    samples = BATCHES[cell.batch]
    if any(len(mask) == len(samples) for mask in keep.values()):  # decided before the rows were repeated
        keep = {layer: mask.repeat_interleave(times, 0) for layer, mask in keep.items()}
    for mask in keep.values():
        copies = mask.view(len(samples), times, -1)
        assert (copies == copies[:, :1]).all(), "copies of one sample kept different tokens"
    alone = {layer: mask[::times] for layer, mask in keep.items()}
    per_copy = [
        expected_logits(cell.family, model, samples, alone, new.view(len(samples), times, -1)[:, copy]) for copy in range(times)
    ]
    return torch.stack(per_copy, 1).flatten(0, 1)


def beams(cell: Cell, model: Any, wrap: Wrap) -> None:
    """The score of every returned beam is what the oracle gives its tokens."""
    inputs = make_inputs(cell.family, BATCHES[cell.batch])
    with wrap(model, cell.recipe) as run:
        strategy = {"num_beams": BEAMS, "num_return_sequences": BEAMS, "output_scores": True}
        output, new, _ = generate(model, inputs, **strategy)
        keep = run.last.keep
    logits = repeated(cell, model, keep, new[:, :-1], BEAMS)
    taken = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0].sum(1) / new.shape[1]
    torch.testing.assert_close(output.sequences_scores, taken, atol=TOLERANCE, rtol=0)


def sampling(cell: Cell, model: Any, wrap: Wrap) -> None:
    samples = BATCHES[cell.batch]
    inputs = make_inputs(cell.family, samples)
    torch.manual_seed(3)
    with wrap(model, cell.recipe) as run:
        _, new, logits = generate(model, inputs, do_sample=True, num_return_sequences=SAMPLES)
        keep = run.last.keep
    assert not torch.equal(new[0], new[1])
    close(logits, repeated(cell, model, keep, new[:, :-1], SAMPLES))


def no_cache(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Every step runs the whole sequence again, with the arguments that `generate` gives it."""
    samples = BATCHES[cell.batch]
    inputs = make_inputs(cell.family, samples)
    with wrap(model, cell.recipe) as run:
        _, new, logits = generate(model, inputs, 4, use_cache=False)
        keep = {layer: mask[:, : inputs["input_ids"].shape[1]] for layer, mask in run.last.keep.items()}
    close(logits, expected_logits(cell.family, model, samples, keep, new[:, :-1]))


def prompt_lookup(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Assisted decoding says the same, whatever was guessed right."""
    inputs = make_inputs(cell.family, BATCHES[cell.batch])
    with wrap(model, cell.recipe) as run:
        _, plain, _ = generate(model, inputs, 8)
        _, guessed, logits = generate(model, inputs, 8, prompt_lookup_num_tokens=3)
        keep = {layer: mask[:, : inputs["input_ids"].shape[1]] for layer, mask in run.last.keep.items()}
    assert torch.equal(plain, guessed)
    close(logits, expected_logits(cell.family, model, BATCHES[cell.batch], keep, guessed[:, :-1]))


def untouched(cell: Cell, model: Any) -> tuple[Tensor, ...]:
    """Logits of every step, sequences, and logits of a plain forward of the model as it is; padding left out."""
    inputs = make_inputs(cell.family, BATCHES[cell.batch])
    output, _, logits = generate(model, inputs)
    return logits, output.sequences, model(**inputs).logits[inputs["attention_mask"].bool()]


def equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(mine, stock) for mine, stock in zip(ours, theirs, strict=True))


def keep_all(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Bit for bit."""
    stock = untouched(cell, model)
    with wrap(model, cell.recipe) as run:
        ours = untouched(cell, model)
        assert run.last is not None
        assert run.last.visual > 0
    equal(ours, stock)


def removed(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Bit for bit."""
    stock = untouched(cell, model)
    with wrap(model, cell.recipe):
        pruned = untouched(cell, model)
    assert not torch.equal(pruned[0], stock[0])
    equal(untouched(cell, model), stock)


def static(cell: Cell, model: Any, wrap: Wrap) -> None:
    """The cache has its final size from the start."""
    inputs = make_inputs(cell.family, BATCHES[cell.batch])
    with wrap(model, cell.recipe) as run:
        _, new, logits = generate(model, inputs, cache_implementation="static", disable_compile=True)
        keep = run.last.keep
    close(logits, expected_logits(cell.family, model, BATCHES[cell.batch], keep, new[:, :-1]))


def per_frame(cell: Cell, model: Any, wrap: Wrap) -> None:
    """As greedy; and every frame of every video keeps what the budget says."""
    samples = BATCHES[cell.batch]
    inputs = make_inputs(cell.family, samples)
    with wrap(model, cell.recipe) as run:
        _, new, logits = generate(model, inputs)
        keep, kept = run.last.keep, run.last.kept
    close(logits, expected_logits(cell.family, model, samples, keep, new[:, :-1]))
    check_moved(cell.family, model, samples, new, logits)
    tokens = [(count, frames) for row, parts in enumerate(samples) for count, frames in videos_of(cell.family, parts, row)]
    shares = [(layer, share, video) for layer, share in STAGES[cell.stages].items() for video in tokens]
    for stage, (layer, share, (count, frames)) in zip(kept, shares, strict=True):
        assert (stage.layer, stage.original) == (layer, count * frames)
        of_frame = torch.bincount(stage.index // count, minlength=frames)
        assert of_frame.tolist() == [max(int(share * count + 0.5), 1)] * frames


def videos_of(family: str, parts: list[str], row: int) -> list[tuple[int, int]]:
    """(tokens of a frame, frames) of each video of a row, from the placeholders that the table writes."""
    tiny, visual = TINY[family], [part for part in parts if part in ("image", "video")]
    found = []
    for number, part in enumerate(visual):
        if part == "video":
            ids = torch.tensor(tiny.video(torch.Generator().manual_seed(0), row + number).ids)
            frames, rows, columns = FRAMES[(row + number) % 2]
            placeholders = int(((ids == IMAGE) | (ids == VIDEO)).sum())
            if placeholders != frames * rows * columns:  # frames of one size
                frames, rows, columns = ALL_FRAMES, placeholders // ALL_FRAMES, 1
            found.append((rows * columns, frames))
    return found


RUN: dict[str, Callable[[Cell, Any, Wrap], None]] = {
    "greedy": greedy,
    "second turn": second_turn,
    "beams": beams,
    "sampling": sampling,
    "no cache": no_cache,
    "prompt lookup": prompt_lookup,
    "keep all": keep_all,
    "removed": removed,
    "static": static,
    "per frame": per_frame,
}


@contextmanager
def not_wrapped(model: Any, recipe: str) -> Iterator[Any]:
    """In the place of `vlmprune.wrap`: the stock model, which drops nothing."""
    yield SimpleNamespace(last=SimpleNamespace(keep={}))


@torch.no_grad()
def run(cell: Cell, stock: bool = False) -> None:
    """Run a cell.

    Args:
        cell: what to run.
        stock: without vlmprune; tells whether transformers itself can do what is compared.

    Raises:
        UsageError: vlmprune refuses it.
        AssertionError: it computes something else.
    """
    RUN[cell.way](cell, shared(cell.family, cell.attention, cell.seed), not_wrapped if stock else vp.wrap)


def run_or_refuse(cell: Cell, refusal: Refusal | None, record: Callable[[str, object], None]) -> None:
    """Run a cell that must pass; of one that is refused, check the words, record the reason, and skip.

    Args:
        refusal: the one that the cell must meet.
        record: pytest's `record_property`.
    """
    if refusal is None:
        return run(cell)
    if refusal.words:
        with pytest.raises(vp.UsageError) as found:
            run(cell)
        assert refusal.words in str(found.value)
        assert "\n" not in str(found.value)
    else:
        with pytest.raises((ValueError, AssertionError)):
            run(cell, stock=True)
    record("reason", refusal.reason)
    pytest.skip(refusal.reason)
