"""What is measured beside each answer: times, visual tokens, operations and memory, for wrapped and un-pruned models alike.

    batch                       prompts that were computed together; the times are those of the whole batch
    input_tokens                of the prompt, without padding
    output_tokens               of the answer, with its end-of-text token
    prefill_ms                  time in the language model for the prompt
    ttft_ms, tpot_ms            time to the first token (vision tower and prefill); time for each later one, mean
    visual_tokens               that the pictures became, without row separators
    kept_tokens                 of them, at the end of the prompt
    kept_entering_layers        that enter a decoder layer, mean over layers (compute average)
    kept_leaving_layers         that leave one (nominal average)
    selection_share_of_ttft     our own part of ttft_ms: choosing and dropping tokens
    prefill_gflops              of the language model for the prompt, by the formulas of `vlmprune.cost`
    kv_mib                      keys and values after the prompt

`prefill_gflops` and `kv_mib` are a sample's share of its batch, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune.adapters.registry import family_of
from vlmprune.cost import DecoderShape, compute_average, nominal_average
from vlmprune.evals.stopwatch import PrefillClock, Stamps, cache_bytes

Columns = dict[str, float]
MIB = 1 << 20


def columns(
    model: Any,
    run: vlmprune.Run | None,
    inputs: Mapping[str, Any],
    pictures: Sequence[int],
    output: Any,
    begun: float,
    clock: PrefillClock,
    stamps: Stamps,
) -> list[Columns]:
    """The columns of every prompt of a batch.

    Args:
        model: the model.
        run: the handle that pruned this batch; None if nothing did.
        inputs: of the model: the whole batch.
        pictures: number of pictures of each prompt.
        output: what `generate` returned (`return_dict_in_generate`).
        begun: seconds of the host's clock at which `generate` was called.
        clock, stamps: as they stood during the call.
    """
    rows, length = inputs["input_ids"].shape
    shape = DecoderShape.of(model.config.get_text_config())
    report = None if run is None else run.report()
    flops = shape.layers * shape.layer_flops(length, length) if report is None else report.flops / rows
    ttft = (stamps.at[0] - begun) * 1e3
    shared: Columns = {
        "batch": rows,
        "prefill_ms": (clock.end - clock.begin) * 1e3,
        "ttft_ms": ttft,
        "selection_share_of_ttft": 0.0 if report is None else sum(ms for _, ms in report.overhead) / ttft,
        "prefill_gflops": flops / 1e9,
        "kv_mib": cache_bytes(output.past_key_values, len(stamps.at) - 1) / rows / MIB,
    }
    if len(stamps.at) > 1:
        shared["tpot_ms"] = (stamps.at[-1] - stamps.at[0]) / (len(stamps.at) - 1) * 1e3
    visual = _visual(model, inputs, pictures)
    kept = [{} for _ in range(rows)] if run is None else _kept(run, rows)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    answers = output_tokens(model, output.sequences[:, length:])
    return [
        {
            "input_tokens": lengths[row],
            "output_tokens": answers[row],
            "visual_tokens": visual[row],
            "kept_tokens": kept[row][max(kept[row])] if kept[row] else visual[row],
            "kept_entering_layers": compute_average(visual[row], shape.layers, kept[row]),
            "kept_leaving_layers": nominal_average(visual[row], shape.layers, kept[row]),
            **shared,
        }
        for row in range(rows)
    ]


def mean_columns(rows: Sequence[Mapping[str, float]]) -> Columns:
    """The mean of every column over the samples that have it, in the order in which columns first occur."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def output_tokens(model: Any, new: Tensor) -> list[int]:
    """Tokens of each answer, its end-of-text token included.

    Args:
        model: whose `generation_config` names the end-of-text tokens.
        new: `[batch, token]` what was generated, padded.
    """
    ends = model.generation_config.eos_token_id
    if ends is None:
        return [new.shape[1]] * len(new)
    ended = torch.isin(new, torch.tensor(ends, device=new.device))
    return torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, new.shape[1]).tolist()


def _visual(model: Any, inputs: Mapping[str, Any], pictures: Sequence[int]) -> list[int]:
    """Visual tokens of each prompt."""
    if not sum(pictures):
        return [0] * len(pictures)
    grids = family_of(model.config).cells(inputs, model.config)
    counts = iter([sum(int((crop >= 0).sum()) for row in crops for crop in row) for crops in grids])
    return [sum(next(counts) for _ in range(number)) for number in pictures]


def _kept(run: vlmprune.Run, rows: int) -> list[dict[int, float]]:
    """Per prompt, the visual tokens that are kept, by the first layer that computes only them."""
    kept: list[dict[int, float]] = [{} for _ in range(rows)]
    stages: dict[tuple[int, int], str] = {}
    for entry in run.last.kept if run.last else ():
        if entry.site == "cache":
            continue
        place = (entry.sample, entry.layer)
        if stages.get(place) != f"{entry.site} {entry.method}":  # of two stages that act at one layer, the last one decides
            stages[place] = f"{entry.site} {entry.method}"
            kept[entry.sample][entry.layer] = 0
        kept[entry.sample][entry.layer] += len(entry.index)
    return kept
