"""Runs one cell, and compares it with the oracles."""

from __future__ import annotations

import copy
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from families.oracles import MOVED, expected_logits, positions_of
from families.running import Wrap, close, generate, not_wrapped
from families.table import BATCHES, TINY, build, extended, make_inputs, shared, visual_columns
from generation.elsewhere import offloading
from generation.inputs import beginning, merged, padded, with_later, words
from generation.oracles import alone_logits, embedded_logits, stored_logits
from generation.ways import Cell
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.generation.streamers import BaseStreamer

STEPS = 5


def check_question(
    cell: Cell, model: Any, inputs: dict[str, Any], keep: Any, question: Tensor, new: Tensor, logits: Any
) -> None:
    """Logits of one question `[1, steps, vocabulary]` are those of the whole prompt, in which nothing else is seen."""
    behind = torch.cat([question, new[:, :-1]], 1)
    close(logits, alone_logits(cell.family, model, inputs, keep, behind, new.shape[1]))
    if not TINY[cell.family].recurrent and keep:
        unpruned = alone_logits(cell.family, model, inputs, {}, behind, new.shape[1])
        assert (logits - unpruned).abs().max() > MOVED, "pruning changed nothing"


def prefix(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Questions one after the other on one prefix; each as a prompt of its own, run by the same recipe."""
    inputs, questions = beginning(cell.family), [words(3, 1), words(5, 2)]
    found = []
    with wrap(model, cell.recipe) as run:
        shared_by_all = run.encode(**inputs)
        keep, before = run.last.keep, shared_by_all.bytes
        for question in questions:
            output, _, logits = generate(model, shared_by_all.ask(question), STEPS)
            alone, _, expected = generate(model, extended(cell.family, inputs, question), STEPS)
            assert torch.equal(output.sequences, alone.sequences)
            close(logits, expected)
            assert all(torch.equal(mask, run.last.keep[layer][:, : mask.shape[1]]) for layer, mask in keep.items())
            found.append((question, output.sequences[:, -STEPS:], logits))
    assert shared_by_all.bytes == before, "a question changed what the others share"
    for question, new, logits in found:
        check_question(cell, model, inputs, keep, question, new, logits)


def prefix_batch(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Questions in one batch, of different lengths where the family allows padding behind a picture."""
    inputs, tiny = beginning(cell.family), TINY[cell.family]
    lengths = (4, 4, 4) if tiny.recurrent or tiny.window else (5, 2, 7)
    questions = [words(count, seed) for seed, count in enumerate(lengths)]
    with wrap(model, cell.recipe) as run:
        together = run.encode(**inputs)
        keep = run.last.keep
        output, _, logits = generate(model, together.ask(*padded(questions)), STEPS)
        new = output.sequences[:, -STEPS:]
    for row, question in enumerate(questions):
        check_question(cell, model, inputs, keep, question, new[row : row + 1], logits[row : row + 1])


def shared_cache(cell: Cell, model: Any, wrap: Wrap) -> None:
    """The same by transformers' own means: a copy of a filled cache, repeated; or one that is cropped after every question."""
    inputs, tiny = beginning(cell.family), TINY[cell.family]
    questions = [words(4, seed) for seed in range(2)]
    with wrap(model, cell.recipe) as run:
        output, _, _ = generate(model, inputs, 1)
        keep, cache = run.last.keep, output.past_key_values
        both = {
            name: value.expand(2, -1) for name, value in extended(cell.family, inputs, questions[0]).items() if name in _IDS
        }
        both["input_ids"] = torch.cat([extended(cell.family, inputs, question)["input_ids"] for question in questions])
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        output, _, logits = generate(model, {**both, "past_key_values": repeated}, STEPS)
        again = []
        for row in range(2) if not tiny.window else ():  # what left a window cannot come back
            one = {name: value[row : row + 1] for name, value in both.items()}
            asked, _, of_one = generate(model, {**one, "past_key_values": cache}, STEPS)
            cache.crop(-(cache.get_seq_length() - inputs["input_ids"].shape[1]))
            again.append((asked.sequences, of_one))
    for row, question in enumerate(questions):
        new = output.sequences[row : row + 1, -STEPS:]
        check_question(cell, model, inputs, keep, question, new, logits[row : row + 1])
        if again:
            assert torch.equal(again[row][0], output.sequences[row : row + 1])
            close(again[row][1], logits[row : row + 1])


_IDS = ("input_ids", "attention_mask")


def later_picture(cell: Cell, model: Any, wrap: Wrap) -> None:
    """A second turn brings another picture; all that is given of it is its own."""
    inputs = make_inputs(cell.family, [["text4", "image", "text5"]])
    later = make_inputs(cell.family, [["text3", "image", "text4"]], seed=5)
    with wrap(model, cell.recipe) as run:
        first, answer, _ = generate(model, inputs, 3)
        keep, past = run.last.keep, first.past_key_values.get_seq_length()
        whole = with_later(cell.family, inputs, answer, later)
        turn = {
            name: whole[name] if name in whole and value.ndim == 2 and name in _TURN else value for name, value in later.items()
        }
        positions = positions_of(model, whole)
        if positions.ndim == 3:  # transformers wants the grids of all pictures, and the pixels of the new one only
            turn["position_ids"] = positions
        _, new, logits = generate(model, {**turn, "past_key_values": first.past_key_values}, STEPS)
        both = {
            layer: torch.cat([mask, torch.ones(1, past - mask.shape[1], dtype=torch.bool), run.last.keep[layer]], 1)
            for layer, mask in keep.items()
        }
    close(logits, alone_logits(cell.family, model, whole, both, new[:, :-1], STEPS))
    if not TINY[cell.family].recurrent and keep:
        only = alone_logits(cell.family, model, whole, keep, new[:, :-1], STEPS)
        assert (logits - only).abs().max() > MOVED, "the later picture was not pruned"


_TURN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def embeddings(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Pictures that the embeddings hold already, in rows of different lengths; their caller says where they are."""
    samples = BATCHES["pictures"] if TINY[cell.family].recurrent else BATCHES["ragged"]
    inputs = make_inputs(cell.family, samples)
    given = merged(cell.family, model, inputs)
    with wrap(model, cell.recipe) as run:
        if wrap is not_wrapped:
            output, keep = model.generate(**given, max_new_tokens=STEPS, **_LOGITS), {}
        else:
            with run.override(image_positions=visual_columns(inputs)):
                output = model.generate(**given, max_new_tokens=STEPS, **_LOGITS)
                keep = run.last.keep
    new, logits = output.sequences[:, -STEPS:], torch.stack(output.logits, 1)
    if TINY[cell.family].recurrent:
        close(logits, expected_logits(cell.family, model, samples, keep, new[:, :-1]))
    else:
        close(logits, embedded_logits(cell.family, model, inputs, given, keep, new[:, :-1])[:, -STEPS:])
        if keep:
            unpruned = embedded_logits(cell.family, model, inputs, given, {}, new[:, :-1])[:, -STEPS:]
            assert (logits - unpruned).abs().amax((1, 2)).min() > MOVED


_LOGITS = {"output_logits": True, "return_dict_in_generate": True}


def quantised(cell: Cell, model: Any, wrap: Wrap) -> None:
    """What is kept is quantised as a cache of its own would be: the stock model, whose dropped rows are really cut out."""
    inputs = make_inputs(cell.family, BATCHES["one"])
    with wrap(model, cell.recipe) as run:
        strategy = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
        output, new, logits = generate(model, inputs, STEPS, **strategy)
        keep = run.last.keep
    stock = QuantizedCache(backend="fp8", config=model.config)
    close(logits, stored_logits(cell.family, model, inputs, keep, new[:, :-1], stock))
    assert [layer.cumulative_length for layer in stock.layers] == [
        layer.cumulative_length for layer in output.past_key_values.layers
    ]
    exact = stored_logits(cell.family, model, inputs, keep, new[:, :-1], DynamicCache(config=model.config))
    assert (logits - exact)[:, 1:].abs().max() > 1e-3, "nothing was quantised"


def offloaded(cell: Cell, model: Any, wrap: Wrap) -> None:
    samples = BATCHES["ragged"]
    inputs = make_inputs(cell.family, samples)
    with wrap(model, cell.recipe) as run, offloading() as counts:
        _, new, logits = generate(model, inputs, STEPS, cache_implementation="offloaded")
        keep = run.last.keep
    assert counts["fetched"] > STEPS
    assert counts["offloaded"] >= counts["fetched"]
    close(logits, expected_logits(cell.family, model, samples, keep, new[:, :-1]))


def chunked(cell: Cell, model: Any, wrap: Wrap) -> None:
    with wrap(model, cell.recipe):
        generate(model, make_inputs(cell.family, BATCHES["one"]), STEPS, prefill_chunk_size=8)


def assistant(cell: Cell, model: Any, wrap: Wrap, recipe: str | None = None) -> None:
    """Guesses of another model of the same weights: most of them are right."""
    inputs, other = make_inputs(cell.family, BATCHES["one"]), _assistant(cell.family)
    with wrap(model, cell.recipe) as run:
        _, plain, _ = generate(model, inputs, 8)
        keep = run.last.keep
        if recipe is None:
            _, guessed, logits = generate(model, inputs, 8, assistant_model=other)
        else:
            with wrap(other, recipe) as its_own:
                _, guessed, logits = generate(model, inputs, 8, assistant_model=other)
                assert wrap is not_wrapped or its_own.last.visual == 0, "transformers shows assistants pictures now: say so"
    assert torch.equal(plain, guessed)
    close(logits, alone_logits(cell.family, model, inputs, keep, guessed[:, :-1], 8))


def pruned_assistant(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Transformers shows an assistant the places of pictures, and no picture: a recipe on it finds nothing to drop."""
    assistant(cell, model, wrap, "random:layer=1,fraction=0.3")


@functools.cache
def _assistant(family: str) -> Any:
    return build(family, TINY[family].attentions[0])


class _Queue(BaseStreamer):
    """What `TextIteratorStreamer` does, without words: another thread generates, and this one takes its tokens."""

    def __init__(self) -> None:
        self.tokens: queue.Queue[Any] = queue.Queue()

    def put(self, value: Tensor) -> None:
        self.tokens.put(value.flatten().tolist())

    def end(self) -> None:
        self.tokens.put(None)


def streaming(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Tokens come one by one from a thread that this one starts; its settings are those of this thread."""
    inputs = make_inputs(cell.family, BATCHES["one"])
    with wrap(model, cell.recipe) as run:
        output, _, logits = generate(model, inputs, STEPS)
        keep, streamer = run.last.keep, _Queue()
        kwargs = {**inputs, "max_new_tokens": STEPS, "streamer": streamer}
        thread = threading.Thread(target=torch.no_grad()(model.generate), kwargs=kwargs)
        thread.start()
        streamed = [token for tokens in iter(lambda: streamer.tokens.get(timeout=120), None) for token in tokens]
        thread.join()
    assert streamed == output.sequences[0].tolist()
    close(logits, alone_logits(cell.family, model, inputs, keep, output.sequences[:, -STEPS:-1], STEPS))


def guidance(cell: Cell, model: Any, wrap: Wrap) -> None:
    """Classifier-free guidance runs words alone beside the prompt; the prompt is pruned, and the other is not its record."""
    samples = BATCHES["one"]
    inputs = make_inputs(cell.family, samples)
    with wrap(model, cell.recipe) as run:
        _, new, logits = generate(model, inputs, STEPS, guidance_scale=1.5)
        keep = run.last.keep
        assert wrap is not_wrapped or run.last.visual > 0
    close(logits, expected_logits(cell.family, model, samples, keep, new[:, :-1]))


RUN: dict[str, Callable[[Cell, Any, Wrap], None]] = {
    "prefix": prefix,
    "prefix, batch": prefix_batch,
    "shared cache": shared_cache,
    "later picture": later_picture,
    "embeddings": embeddings,
    "quantised": quantised,
    "offloaded": offloaded,
    "chunked": chunked,
    "assistant": assistant,
    "pruned assistant": pruned_assistant,
    "streaming": streaming,
    "guidance": guidance,
}


@torch.no_grad()
def run(cell: Cell, wrap: Wrap) -> None:
    """Run a cell.

    Args:
        cell: what to run.
        wrap: `vlmprune.wrap`; or `not_wrapped`, which tells whether transformers itself can do what is compared.

    Raises:
        UsageError: vlmprune refuses it.
        AssertionError: it computes something else.
    """
    RUN[cell.way](cell, shared(cell.family, cell.attention), wrap)
