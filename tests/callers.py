"""How tests call a model: turns of a conversation, several threads, calls that are counted."""

from __future__ import annotations

import threading

import torch
from oracles import (
    decoder_layers,
)
from tiny_models import (
    FIRST_WORD,
    IMAGE,
    VOCAB,
    make_inputs,
)

ONE = [["text6", "image", "text8"]]

RAGGED = [["text7", "image", "text4"], ["text2", "image", "image", "text3"], ["text3", "image", "text9"]]


def generate(model, inputs: dict, new_tokens: int = 8, **strategy):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, **strategy)


def one_row_per_sample(keep: dict, rows: int) -> dict:
    """Beams and returned sequences repeat a sample's row: all must have made the same decision."""
    out = {}
    for layer, mask in keep.items():
        copies = mask.view(rows, -1, mask.shape[1])
        assert (copies == copies[:, :1]).all(), "copies of one sample kept different tokens"
        out[layer] = copies[:, 0]
    return out


class CountQueries:
    """Context manager that notes how many tokens every call of the first decoder layer gets."""

    def __init__(self, model):
        self.model, self.queries = model, []

    def __enter__(self):
        def hook(module, args, kwargs):
            self.queries.append(args[0].shape[1])

        layer = decoder_layers(self.model)[0]
        self.handle = layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)  # before any pruning
        return self

    def __exit__(self, *error):
        self.handle.remove()


def words(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(FIRST_WORD, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


def next_turn(inputs: dict, sequences: torch.Tensor, cache, new_ids: torch.Tensor) -> dict:
    """Inputs of the next turn: everything so far and `new_ids`; the cache knows all but the last generated token."""
    ids = torch.cat([sequences, new_ids], 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    turn = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    if "mm_token_type_ids" in inputs:
        turn["mm_token_type_ids"] = (ids == IMAGE).long()
    return turn


def interleaved(first: dict, later: dict, rows: int) -> dict:
    """Pictures of two turns, one per row and turn, in the order of the rows of the whole conversation."""
    if "image_grid_thw" not in first:
        return {"pixel_values": torch.stack([first["pixel_values"], later["pixel_values"]], 1).flatten(0, 1)}
    pixels, grids = [], []
    for row in range(rows):
        for turn in (first, later):
            pixels.append(turn["pixel_values"].split(turn["image_grid_thw"].prod(1).tolist())[row])
            grids.append(turn["image_grid_thw"][row])
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)}


def in_threads(*jobs, meet_in=()):
    """Results of the jobs, run at the same time; the first exception is raised here.

    In every forward of the modules `meet_in`, the threads wait for each other, so that they are surely inside the same
    model at once: all jobs must then call these modules equally often.
    """
    results: list = [None] * len(jobs)
    errors: list[BaseException] = []
    meeting = threading.Barrier(len(jobs), timeout=60)

    def work(index):
        try:
            meeting.wait()
            results[index] = jobs[index]()
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]

    def meet(module, args, output):
        meeting.wait()

    handles = [module.register_forward_hook(meet) for module in meet_in]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    if errors:
        raise errors[0]
    return results


def several_generations(family, model, seeds, **strategy):
    out = []
    for seed in seeds:
        inputs = make_inputs(family, model, RAGGED if seed % 2 else ONE, seed)
        out.append(model.generate(**inputs, max_new_tokens=6, **strategy))
    return out


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
