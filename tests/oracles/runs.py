"""Runs of a pruned model, and what they must equal."""

from __future__ import annotations

import torch

from oracles.mask import TOLERANCE, Claims, Effect, Keep, masked_logits
from oracles.places import columns_of_image, image_columns, visual_columns


@torch.no_grad()
def generate_logits(model, inputs: dict, new_tokens: int = 6, **strategy):
    """`generate` with its raw logits; returns (output, generated ids [batch, n], logits [batch, n, vocabulary])."""
    output = model.generate(**inputs, max_new_tokens=new_tokens, return_dict_in_generate=True, output_logits=True, **strategy)
    return output, output.sequences[:, -new_tokens:], torch.stack(output.logits, 1)


def rows_with_pictures(model, inputs: dict) -> torch.Tensor:
    return image_columns(model, inputs["input_ids"]).any(1)


def assert_equals_masked(model, inputs: dict, keep: Claims, generated: torch.Tensor, logits: torch.Tensor) -> None:
    """Every step's `logits` equal the masked oracle's, and the un-pruned model's do not."""
    prompt = inputs["input_ids"].shape[1]
    expected = masked_logits(model, inputs, keep, generated[:, :-1])[:, prompt - 1 :]
    unpruned = masked_logits(model, inputs, {}, generated[:, :-1])[:, prompt - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    for row in rows_with_pictures(model, inputs).nonzero()[:, 0]:
        assert (logits[row] - unpruned[row]).abs().max() > 0.1, f"pruning changed nothing in row {row}"


def expected_counts(lengths: list[list[int]], budget: float | int) -> list[list[int]]:
    """Tokens kept of each image: a whole number, or a fraction of the image's tokens rounded half up."""
    if isinstance(budget, int):
        return [[min(budget, n) for n in row] for row in lengths]
    return [[int(budget * n + 0.5) for n in row] for row in lengths]


def keep_from_record(model, inputs: dict, last) -> Keep:
    """`last.keep` rebuilt from `last.kept` (indices per image) and the prompt alone.

    LLaVA-NeXT's row separators are text, which nothing but `newlines_kept = False` drops.
    """
    real = inputs["attention_mask"].bool()
    keep = {}
    for layer in last.keep:
        keep[layer] = real.clone()
        for image in (image for image in last.kept if image.layer == layer and image.site != "cache"):
            whole = columns_of_image(model, inputs, image.sample, image.ordinal)
            visual = visual_columns(model, inputs, image.sample, image.ordinal)
            stays = torch.zeros_like(real[0])
            stays[visual[image.index]] = True
            if last.newlines_kept:
                stays[whole[~torch.isin(whole, visual)]] = True
            keep[layer][image.sample, whole] &= stays[whole]
    return keep


def kept_sets(last) -> dict[tuple[int, int, int], list[int]]:
    """(layer, row, ordinal) -> kept in-image indices."""
    return {(image.layer, image.sample, image.ordinal): image.index.tolist() for image in last.kept}


def physical_lengths(cache) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


def scheduled_lengths(keep: Keep, real: torch.Tensor, layers: int) -> list[int]:
    """Entries that each layer's cache must hold after prefill: the longest row of what the layer still computes."""
    lengths = []
    for layer in range(layers):
        passed = [stage for stage in keep if stage <= layer]
        lengths.append(int(keep[max(passed)].sum(1).max()) if passed else real.shape[1])
    return lengths


def resident_lengths(effect: Effect, layers: int) -> list[int]:
    """Entries that each layer's cache must hold when prefill is over: the longest row of what is still visible there.

    While nothing is dropped the sequence stays as it is, padding too.
    """
    lengths = []
    for layer in range(layers):
        left = effect.real.clone()
        for stage, mask in (*effect.keep.items(), *effect.keep_cache.items()):
            if stage <= layer:
                left &= mask
        lengths.append(left.shape[1] if torch.equal(left, effect.real) else int(left.sum(1).max()))
    return lengths


def decisions(last) -> dict[tuple[str, int, int, int], list[int]]:
    """(site, layer, row, ordinal) -> kept in-image indices."""
    return {(image.site, image.layer, image.sample, image.ordinal): image.index.tolist() for image in last.kept}
