"""Deliberate bugs: each is planted in a copy of the repository, and the tests that guard against it must turn red.

    python tests/planted.py                       # all bugs, about 15 minutes on one core
    python tests/planted.py --only rotary         # those whose name contains the word
    python tests/planted.py --check               # only whether each bug still applies, in a second
    python tests/planted.py --table               # the table of docs/guards.md

A bug is a replacement of text in one file. Where the text is no longer there, the bug must be written again for the code as it
is now, or taken out with the code it was about: "NO LONGER APPLIES" counts as a failure. So does a bug that no test notices.
`docs/guards.md` has the table by guard.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = (
    "torch._dynamo",
    "torch.nn.attention.flex_attention",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")),
)
"""Loaded once, before the first bug."""


@dataclass(frozen=True)
class Bug:
    """One deliberate bug.

    Attributes:
        guard: what the tests promise.
        name: what is broken.
        file: where, from the root of the repository.
        old: text that stands there exactly once.
        new: what takes its place.
        red: names of the test functions that must fail, wherever they are.
        only: pytest's `-k`, to run few of their cases.
    """

    guard: str
    name: str
    file: str
    old: str
    new: str
    red: tuple[str, ...]
    only: str = ""


LIVE, METHODS = "vlmprune/live", "vlmprune/methods"
MASKED = ("test_generation_equals_masked",)
BATCHED = ("test_a_batch_equals_its_rows_alone",)
FEW_LLAVA = "llava and not llava_next and (fastv or random or mustdrop) and not eager"

BUGS = (
    # --- keeping everything -------------------------------------------------------------------------------------------
    Bug(
        "keep-all is bit-identical",
        "a stage that keeps everything gathers all the same",
        f"{LIVE}/pruning.py",
        "        if not changed:\n            call.section",
        "        if False:\n            call.section",
        ("test_keep_all_does_not_touch_the_cache",),
    ),
    Bug(
        "keep-all is bit-identical",
        "a merging method merges where nothing is dropped",
        f"{LIVE}/choosing.py",
        "        elif keep == len(first) and not bound.adaptive:\n",
        "        elif False:\n",
        ("test_keeping_everything_is_bit_identical",),
        "llava and (visionzip or tome)",
    ),
    # --- pruned equals masked -----------------------------------------------------------------------------------------
    Bug(
        "pruned equals masked, prefill",
        "rotary embeddings are those of the first rows",
        f"{LIVE}/pruning.py",
        "        hidden, cos, sin = stays.gather_all(hidden, *rotary())\n",
        "        hidden, cos, sin = stays.gather(hidden), *(part[:, : stays.rows.shape[1]] for part in rotary())\n",
        MASKED,
        FEW_LLAVA,
    ),
    Bug(
        "pruned equals masked, prefill",
        "kept rows stand in falling order",
        f"{LIVE}/rows.py",
        "[:, alive.shape[1] - most :]\n",
        "[:, alive.shape[1] - most :].flip(1)\n",
        MASKED,
        FEW_LLAVA,
    ),
    Bug(
        "pruned equals masked, prefill",
        "places are not looked up in the sequence that an earlier stage shortened",
        f"{LIVE}/rows.py",
        "        if earlier is None:\n            return self\n",
        "        if earlier is None or True:\n            return self\n",
        MASKED,
        "pdrop and llava",
    ),
    Bug(
        "pruned equals masked, prefill",
        "padding counts as kept",
        f"{LIVE}/rows.py",
        "return Reduction(rows, alive.gather(1, rows), fewest == most)",
        "return Reduction(rows, torch.ones_like(rows, dtype=torch.bool), True)",
        MASKED,
        FEW_LLAVA,
    ),
    Bug(
        "pruned equals masked, prefill",
        "rotary embeddings of an earlier stage stay",
        f"{LIVE}/pruning.py",
        "tuple(counts), rows, shift, newlines)\n        return True\n",
        "tuple(counts), rows, shift, newlines, _rotary=section._rotary)\n        return True\n",
        MASKED,
        "pdrop and compact",
    ),
    Bug(
        "pruned equals masked, decoding",
        "a ragged batch decodes without a mask",
        f"{LIVE}/masks.py",
        "    if dense and window is None and (queries == 1 or queries == keys)",
        "    if queries == 1 or dense and window is None and (queries == 1 or queries == keys)",
        MASKED,
        FEW_LLAVA,
    ),
    Bug(
        "pruned equals masked, decoding",
        "a later token stands at its place in the cache",
        f"{LIVE}/cache.py",
        "return self.recorded.tokens + stored + self.lost - self.recorded.slots.shape[1]",
        "return stored",
        (*MASKED, "test_the_cache_holds_what_was_kept"),
        FEW_LLAVA,
    ),
    Bug(
        "masks between stages",
        "a section is given the mask of the one before",
        f"{LIVE}/pruning.py",
        "            again = call.section.at(index)\n",
        "            again = replace(call.section.at(index), _mask=call.sections[-1]._mask)\n",
        MASKED,
        "pdrop and llava",
    ),
    Bug(
        "masks between stages",
        "the mask is not causal",
        f"{LIVE}/masks.py",
        "visible = visible & (key_slots[:, None, :] <= query_slots[:, :, None])",
        "visible = visible & (key_slots[:, None, :] <= query_slots[:, :, None] + 99)",
        MASKED,
        FEW_LLAVA,
    ),
    Bug(
        "masks of eager models",
        "an eager model gets no mask",
        f"{LIVE}/masks.py",
        ' and implementation != "eager"',
        "",
        ("test_generate_equals_masked", "test_additive_mask_says_the_same"),
        "eager or additive",
    ),
    Bug(
        "masks of flex attention",
        "blocks with padding count as full",
        f"{LIVE}/masks.py",
        "    full = valid.all(dim=2)[:, None] & ",
        "    full = valid.any(dim=2)[:, None] & ",
        ("test_generation_equals_masked_in_flex_attention", "test_blocks_are_those_of_torch"),
    ),
    Bug(
        "physical KV lengths",
        "the cache stage forgets nothing",
        f"{LIVE}/cache.py",
        "        layer.refill(moved[2 * number], moved[2 * number + 1], shorter)\n",
        "        pass\n",
        ("test_the_cache_holds_what_was_kept",),
        "llava and mustdrop",
    ),
    Bug(
        "physical KV lengths",
        "reported bytes are those before the cache stage",
        f"{LIVE}/pruning.py",
        "                record.resident[index] = entries\n",
        "                pass\n",
        ("test_reported_bytes_are_the_caches",),
        "mustdrop",
    ),
    # --- the cache and generate ---------------------------------------------------------------------------------------
    Bug(
        "beams",
        "slots do not follow the rows",
        f"{LIVE}/cache_layer.py",
        "        self.recorded = None if self.recorded is None else self.recorded.select(beam_idx)\n",
        "        pass\n",
        ("test_slots_follow_their_rows",),
    ),
    Bug(
        "beams",
        "slots are not repeated with the rows",
        f"{LIVE}/entries.py",
        "repeat_interleave(repeats))\n\n    def crop",
        "repeat(repeats))\n\n    def crop",
        ("test_slots_are_repeated_with_their_rows",),
    ),
    Bug(
        "assisted decoding",
        "cropping forgets the logical length",
        f"{LIVE}/entries.py",
        "self.valid[:, :kept], self.dense, tokens, self.unpadded, self.shift)",
        "self.valid[:, :kept], self.dense, self.tokens, self.unpadded, self.shift)",
        ("test_prompt_lookup_equals_greedy", "test_prompt_lookup_after_a_cut"),
        "llava or fastv",
    ),
    Bug(
        "assisted decoding",
        "guesses are taken for the prompt",
        f"{LIVE}/prompt_rows.py",
        "tokens - 1 - call.tail)",
        "tokens - 1)",
        ("test_prompt_lookup_after_a_cut", "test_prompt_lookup_equals_greedy"),
    ),
    Bug(
        "plain calls",
        "logits_to_keep is taken for guesses",
        f"{LIVE}/hooks.py",
        'max(wanted - 1, 0) if kwargs.get("mm_encoder_outputs") else 0',
        "max(wanted - 1, 0)",
        ("test_logits_to_keep_changes_nothing_else",),
    ),
    Bug(
        "several turns",
        "validity of the earlier turn is forgotten",
        f"{LIVE}/entries.py",
        "            torch.cat((self.valid, later.valid), dim=1),\n            self.dense and later.dense,\n",
        "            torch.cat((self.valid | True, later.valid), dim=1),\n            later.dense,\n",
        ("test_a_second_turn_equals_one_forward",),
        "llava and fastv",
    ),
    Bug(
        "several turns",
        "what a later turn hides is seen",
        f"{LIVE}/section.py",
        "        if call.past and call.mask is not None and call.mask.shape[1] > call.past:\n",
        "        if False:\n",
        ("test_a_later_turn_may_hide_more",),
    ),
    Bug(
        "several turns",
        "moved positions of the earlier turn are forgotten",
        f"{LIVE}/entries.py",
        "shift = self.shift if later.shift is None else later.shift + (0 if self.shift is None else self.shift)",
        "shift = None",
        ("test_a_second_turn_equals_one_forward",),
        "compact and fastv",
    ),
    Bug(
        "a new picture",
        "FastV looks at columns of the earlier turn",
        f"{LIVE}/attention_probes.py",
        "attention_mask, scaling, last)[..., -here:]",
        "attention_mask, scaling, last)[..., :here]",
        ("test_fastv_of_a_new_image_looks_at_the_new_image",),
    ),
    Bug(
        "positions",
        "what was dropped behind a token counts, too",
        f"{LIVE}/pruning.py",
        "    moved = dropped.cumsum(dim=1)\n",
        "    moved = dropped.sum(dim=1, keepdim=True).expand(dropped.shape)\n",
        MASKED,
        "compact and fastv",
    ),
    Bug(
        "packed samples",
        "the last token of a row speaks for all its samples",
        f"{LIVE}/prompt_rows.py",
        "    if prompt.tokens.segments is None:\n        return prompt_end(call, tokens)[:, None]\n",
        "    if True:\n        return prompt_end(call, tokens)[:, None].expand(-1, 9)\n",
        ("test_each_sample_is_as_if_it_were_alone",),
        "fastv",
    ),
    # --- coming and going ---------------------------------------------------------------------------------------------
    Bug(
        "removal",
        "the config of an attention module stays ours",
        f"{LIVE}/attention.py",
        "            module.config = route.original\n",
        "            pass\n",
        ("test_remove_leaves_no_trace",),
        "llava",
    ),
    Bug(
        "removal",
        "the model's own config is changed in place",
        f"{LIVE}/attention.py",
        "    config: Any = copy.copy(original)\n",
        "    config: Any = original\n",
        ("test_remove_leaves_no_trace",),
        "llava",
    ),
    Bug(
        "removal",
        "a hook stays",
        f"{LIVE}/attachment.py",
        "                self._places.pop(name).remove()\n",
        "                self._places.pop(name)\n",
        ("test_remove_leaves_no_trace",),
        "llava",
    ),
    Bug(
        "threads",
        "what the tower saw is shared by threads",
        f"{LIVE}/hooks.py",
        "class _PerThread(threading.local):\n",
        "class _PerThread:\n",
        ("test_cls_attention_stays_in_its_thread", "test_one_model_in_two_threads"),
    ),
    Bug(
        "batch equals samples alone",
        "random draws by the row of the batch",
        f"{METHODS}/pruning/random.py",
        "self._draw(identity, see.layer, see.visual)[:keep].sort().values for identity in see.identity]",
        "self._draw(number, see.layer, see.visual)[:keep].sort().values for number, _ in enumerate(see.identity)]",
        BATCHED,
        "random",
    ),
    Bug(
        "batch equals samples alone",
        "the last prompt token is the last column",
        f"{LIVE}/layout.py",
        "        end = np.where(real, np.arange(real.shape[1]), 0).max(axis=1) - tail\n",
        "        end = np.full(len(real), real.shape[1] - 1 - tail)\n",
        ("test_padding_on_the_right_equals_masked", "test_padding_side_does_not_matter"),
        "fastv",
    ),
    Bug(
        "batch equals samples alone",
        "what the tower recorded is found by order, not by content",
        f"{LIVE}/feature_index.py",
        "                    rows = entry.order.to(place.device)[place]\n",
        "                    rows = torch.arange(len(place), device=place.device)\n",
        ("test_cls_keeps_what_the_towers_eager_attention_says",),
    ),
    Bug(
        "crops that look alike",
        "the second gets what the tower recorded of the first",
        f"{LIVE}/feature_index.py",
        "twin = (places[number] + _repetition(wanted[number]))",
        "twin = (places[number] + 0 * _repetition(wanted[number]))",
        ("test_crops_that_look_alike_are_decided_separately",),
    ),
    # --- what methods select ------------------------------------------------------------------------------------------
    Bug(
        "FastV",
        "columns of attention are one place off",
        f"{LIVE}/source.py",
        "return self._prompt.attention[self._layer - 1]",
        "return self._prompt.attention[self._layer - 1].roll(1, -1)",
        ("test_fastv_keeps_what_eager_attention_says",),
    ),
    Bug(
        "FastV",
        "the highest head instead of the mean",
        f"{METHODS}/pruning/fastv.py",
        "see.attention_from_last.mean(dim=1)",
        "see.attention_from_last.amax(dim=1)",
        ("test_fastv_keeps_what_eager_attention_says", "test_fastv"),
        "fastv",
    ),
    Bug(
        "FastV",
        "lowest scores are kept",
        f"{METHODS}/base.py",
        "    ranked = score.float().argsort(dim=-1, descending=True, stable=True)\n",
        "    ranked = score.float().argsort(dim=-1, descending=False, stable=True)\n",
        ("test_fastv_keeps_what_eager_attention_says",),
    ),
    Bug(
        "FastV",
        "a second stage is not addressed in what the first left",
        f"{LIVE}/source.py",
        "self.visual = places if shortened is None else shortened.places(self.samples, places)",
        "self.visual = places.clamp(max=hidden.shape[1] - 1)",
        ("test_fastv_second_stage_sees_the_pruned_attention", "test_divprune_after_a_stage"),
    ),
    Bug(
        "ties",
        "equal scores go anywhere",
        f"{METHODS}/base.py",
        "    ranked = score.float().argsort(dim=-1, descending=True, stable=True)\n",
        "    ranked = score.shape[-1] - 1 - score.float().flip(-1).argsort(dim=-1, descending=True, stable=True)\n",
        ("test_equal_scores_go_to_the_lower_index", "test_small_helpers"),
    ),
    Bug(
        "fp32 scores",
        "similarities are computed in the model's dtype, on a CPU",
        "kernels/select_diverse/cpu.py",
        "    unit = normalize(features.detach().to(wide(features)), dim=-1)\n",
        "    unit = normalize(features.detach(), dim=-1).to(wide(features))\n",
        ("test_divprune_computes_in_fp32",),
    ),
    Bug(
        "DivPrune",
        "duplicates are picked again, by the equations",
        "kernels/select_diverse/reference.py",
        "        apart[rows, pick] = -torch.inf\n",
        "        pass\n",
        ("test_divprune_takes_no_token_twice",),
    ),
    Bug(
        "DivPrune",
        "duplicates are picked again, on a CPU",
        "kernels/select_diverse/cpu.py",
        "        apart[pick] = -torch.inf\n        standing = apart\n",
        "        standing = apart\n",
        ("test_divprune_takes_no_token_twice",),
    ),
    Bug(
        "DivPrune",
        "the first pick is token 0",
        "kernels/select_diverse/reference.py",
        "    pick = _nearest_other(unit).argmax(dim=-1)\n",
        "    pick = 0 * _nearest_other(unit).argmax(dim=-1)\n",
        ("test_the_cpus_picks_are_the_references",),
    ),
    Bug(
        "CLS",
        "attention of CLS is one patch off",
        f"{LIVE}/tower.py",
        "state.carried[name] = FROM_BLOCK[name](block)",
        "state.carried[name] = FROM_BLOCK[name](block).roll(1, 1)",
        ("test_cls_keeps_what_the_towers_eager_attention_says",),
    ),
    Bug(
        "DART",
        "the remainder goes to no pivot",
        f"{METHODS}/pruning/dart.py",
        "    share = total // count + (real.cumsum(dim=1) <= total % count)\n",
        "    share = total // count + (real.cumsum(dim=1) > count - total % count)\n",
        ("test_dart",),
    ),
    Bug(
        "EVS",
        "a token is compared with the frame after it",
        f"{METHODS}/pruning/evs.py",
        "torch.inf), (1, 0), value=torch.inf)",
        "torch.inf), (0, 1), value=torch.inf)",
        ("test_evs",),
    ),
    Bug(
        "EVS",
        "cells are not told apart",
        f"{METHODS}/pruning/evs.py",
        "cell[:, 1:] != cell[:, :-1]",
        "cell[:, 1:] < cell[:, :-1]",
        ("test_evs",),
    ),
    Bug(
        "VidCom2",
        "every frame has the same share",
        f"{METHODS}/pruning/vidcom2.py",
        "(base * (1 + weight - 1 / frames))",
        "(base * (1 + 0 * weight))",
        ("test_vidcom2", "test_unusual_frames"),
    ),
    Bug(
        "VidCom2",
        "the dimensions that vary most count",
        f"{METHODS}/pruning/vidcom2.py",
        "calm = x.var(dim=1, correction=0).argsort(",
        "calm = x.var(dim=1, correction=0).neg().argsort(",
        ("test_vidcom2", "test_vidcom2_as_vllm"),
    ),
    Bug(
        "FastVID",
        "tokens join anchors of other segments",
        f"{METHODS}/pruning/fastvid.py",
        ".masked_fill(mine[:, :, None] != theirs[:, None], -torch.inf)",
        "",
        ("test_fastvid", "test_alike_frames_are_merged"),
    ),
    Bug(
        "FastVID",
        "anchors are in other frames",
        f"{METHODS}/pruning/fastvid.py",
        ".masked_fill(after % every != 0, 0)",
        ".masked_fill((after + 1) % every != 0, 0)",
        ("test_fastvid", "test_alike_frames_are_merged"),
    ),
    Bug(
        "frames that are compared",
        "frames with other numbers of tokens are compared all the same",
        f"{LIVE}/videos.py",
        "if image.frame is not None and not _alike(",
        "if image.frames < 0 and not _alike(",
        ("test_frames_that_are_not_alike_are_refused",),
    ),
    Bug(
        "frames without torchvision",
        "rows and columns change places in a square of patches",
        "vlmprune/loading/frames.py",
        "permute(0, 3, 6, 4, 7, 2, 1, 5, 8)",
        "permute(0, 3, 6, 7, 4, 2, 1, 5, 8)",
        ("test_frames_become_what_transformers_makes_of_them",),
    ),
    Bug(
        "frames of a folder",
        "names are sorted as text",
        "vlmprune/loading/videos.py",
        "int(part) if place % 2 else part for place",
        "part for place",
        ("test_frames_of_a_folder",),
    ),
    Bug(
        "HoloV",
        "variance is not scaled to attention",
        f"{METHODS}/pruning/holov.py",
        "0.09 * variance * scale)",
        "0.09 * variance)",
        ("test_holov",),
    ),
    Bug(
        "ToMe",
        "merged tokens weigh one each",
        f"{METHODS}/pruning/tome.py",
        "    weight_b = weight_b.scatter_add(1, home, moved)\n",
        "    weight_b = weight_b + 0 * weight_b.scatter_add(1, home, moved)\n",
        ("test_tome",),
    ),
    Bug(
        "VisionZip",
        "contextual tokens pass the projector before merging",
        f"{METHODS}/pruning/visionzip.py",
        "see.project(zipped)",
        "rows(see.features, targets)",
        ("test_visionzip",),
    ),
    Bug(
        "VScan",
        "windows are those of the tokens' order",
        f"{METHODS}/pruning/vscan.py",
        "row, column = see.cell // see.side, see.cell % see.side",
        "row, column = see.position // see.side, see.position % see.side",
        ("test_vscan_on_part_of_a_view",),
    ),
    Bug(
        "SparseVLM",
        "every word rates",
        f"{METHODS}/pruning/sparsevlm.py",
        "    return torch.where(above.any(dim=-1, keepdim=True), above, valid)\n",
        "    return valid\n",
        ("test_sparsevlm_1_5", "test_sparsevlm_2"),
    ),
    Bug(
        "CDPruner",
        "relevance is scaled over the batch",
        f"{METHODS}/pruning/cdpruner.py",
        "low, high = relevance.amin(dim=-1, keepdim=True), relevance.amax(dim=-1, keepdim=True)",
        "low, high = relevance.amin(), relevance.amax()",
        ("test_cdpruner_scaling", "test_cdpruner_embeddings"),
    ),
    Bug(
        "AdaptInfer",
        "the diagonal counts twice",
        f"{METHODS}/pruning/adaptinfer.py",
        " - among.diagonal(dim1=-2, dim2=-1).diag_embed()",
        "",
        ("test_adaptinfer",),
    ),
    Bug(
        "MustDrop",
        "the key set is 8 % of what is left",
        f"{METHODS}/pruning/mustdrop.py",
        "math.ceil(0.08 * see.entered)",
        "math.ceil(0.08 * see.visual)",
        ("test_mustdrop_counts", "test_mustdrop_thresholds"),
    ),
    Bug(
        "MustDrop",
        "a window is merged into its first patch",
        f"{METHODS}/pruning/mustdrop.py",
        "    return window, window[:, WINDOW**2 // 2]\n",
        "    return window, window[:, 0]\n",
        ("test_mustdrop_merge",),
    ),
    Bug(
        "FlowCut",
        "scores are not smoothed over blocks",
        f"{METHODS}/pruning/flowcut.py",
        "flow if past is None else 0.5 * past + 0.5 * flow",
        "flow if past is None else flow",
        ("test_flowcut_watches_cls", "test_flowcut_watches_units"),
    ),
    Bug(
        "FlowCut",
        "patches go behind every block",
        f"{METHODS}/pruning/flowcut.py",
        "        if remaining < 0 or remaining % 2 or patches <= state.target:\n",
        "        if remaining < 0 or patches <= state.target:\n",
        ("test_flowcut_stages",),
    ),
    Bug(
        "the tower",
        "restored patches stand in the first rows",
        f"{LIVE}/tower_sequence.py",
        "            return full.scatter(1, target[..., None].expand_as(projected), projected)[:, :-1]\n",
        "            full[:, : projected.shape[1]] = projected\n            return full[:, :-1]\n",
        ("test_flowcut_drops_patches_in_the_tower",),
    ),
    Bug(
        "the tower",
        "padding of shorter crops is visible",
        f"{LIVE}/tower_sequence.py",
        "        state.valid = None if reduction.dense else reduction.valid\n",
        "        state.valid = None\n",
        ("test_flowcut_drops_patches_in_the_tower", "test_flowcut_pads_views_only_as_far_as_it_must"),
    ),
    # --- model families -----------------------------------------------------------------------------------------------
    Bug(
        "injected layers",
        "features are added to nobody",
        f"{LIVE}/injected.py",
        "return hidden + (whole if rows is None else rows.gather(whole))",
        "return hidden",
        ("test_stages_around_injected_layers", "test_kept_rows_get_their_own_features"),
        "qwen3_vl-layers0 or own_features",
    ),
    Bug(
        "injected layers",
        "those of the first layer are forgotten",
        f"{LIVE}/injected.py",
        "self.features[layer - 1] if 0 < layer",
        "self.features[layer - 1] if 1 < layer",
        ("test_stages_around_injected_layers",),
        "qwen3_vl and 0",
    ),
    Bug(
        "towers of squares",
        "probes are means over lines of patches",
        f"{LIVE}/tower.py",
        "(side // unit, unit, side // unit, unit)",
        "(side // unit, side // unit, unit, unit)",
        ("test_cls_attention_is_the_towers_own", "test_flow_of_units_is_the_mean_over_their_patches"),
    ),
    Bug(
        "towers of squares",
        "patches are dropped that the tower needs",
        f"{METHODS}/pruning/flowcut.py",
        "whole = facts.windows or facts.whole",
        "whole = facts.windows",
        ("test_flow_keeps_whole_units_without_a_stage_inside",),
    ),
    Bug(
        "crops and pictures",
        "every crop is a picture",
        f"{LIVE}/layout.py",
        "pictures[-1] += count",
        "pictures.append(count)",
        ("test_crops_without_a_gap_are_one_picture", "test_crops_with_words_between_them_are_one_picture"),
    ),
    Bug(
        "crops and pictures",
        "an entry without a token is a picture",
        f"{LIVE}/layout.py",
        "[count for count in counts if count]",
        "list(counts)",
        ("test_entries_without_a_token_are_no_pictures",),
    ),
    Bug(
        "attention one layer ahead",
        "the layer's own factor is left out",
        f"{LIVE}/attention_probes.py",
        "return attention_rows(query, key, own.scaling, visible)",
        "return attention_rows(query, key, 1.0, visible)",
        ("test_attention_ahead_is_the_layers_own",),
        "internvl",
    ),
    Bug(
        "keys as if a sample began at position 0",
        "neighbours are turned back as halves",
        f"{LIVE}/source.py",
        "(left == right).all(), halves, neighbours",
        "(left == right).all(), halves, halves",
        ("test_turning_back_undoes_the_turn", "test_keys_of_a_shifted_prompt_are_those_of_the_plain_one"),
    ),
    Bug(
        "processors without torchvision",
        "rows of a picture have no end",
        "vlmprune/loading/pixtral.py",
        " + self.image_end_token",
        "",
        ("test_rows_of_mistral_end_with_a_break",),
    ),
    # --- videos -------------------------------------------------------------------------------------------------------
    Bug(
        "videos",
        "videos come behind all pictures of the batch",
        f"{LIVE}/layout.py",
        "            images.sort(key=lambda image: (image.sample, image.places[0]))\n",
        "",
        ("test_pictures_and_videos_are_counted_in_the_order_of_the_prompt",),
    ),
    Bug(
        "videos",
        "frames that are written apart are one",
        "adapters/videos.py",
        "np.diff(clip.places, prepend=clip.places[:1]) > 1",
        "np.diff(clip.places, prepend=clip.places[:1]) > 9",
        ("test_frames_of_every_token",),
        "qwen3_vl",
    ),
    Bug(
        "videos",
        "frames of one row of tokens are one",
        "adapters/videos.py",
        "(np.diff(row) < 0) | ((np.diff(row) == 0) & (np.diff(column) <= 0))",
        "np.diff(row) < 0",
        ("test_frames_from_rotary_positions",),
    ),
    Bug(
        "videos",
        "the separator behind a video is a token of its last frame",
        f"{LIVE}/layout.py",
        "image.frame[stays]",
        "image.frame",
        ("test_the_separator_behind_a_video_counts_as_text",),
    ),
    Bug(
        "videos",
        "frames need not match the prompt",
        f"{LIVE}/videos.py",
        "len(sizes) != given",
        "len(sizes) < 0",
        ("test_frames_that_do_not_match_the_prompt_are_refused",),
    ),
    Bug(
        "videos",
        "times are those of another video",
        "adapters/qwen_vl.py",
        "vision_config.tokens_per_second) >= 1",
        "vision_config.tokens_per_second) >= 1000",
        ("test_times_are_unknown_where_generate_mixed_them_up",),
    ),
    Bug(
        "budgets per frame",
        "a frame keeps the share of the whole video",
        f"{LIVE}/choosing.py",
        "budget.resolve(candidates), frame=frame",
        "budget.resolve(len(video)), frame=frame",
        ("test_budgets_of_frames_are_exact",),
        "qwen2_vl",
    ),
    Bug(
        "budgets per frame",
        "random draws the same tokens in every frame",
        f"{LIVE}/source.py",
        'f"{ordinal}" if frame is None else f"{ordinal}.{frame}"',
        'f"{ordinal}"',
        ("test_every_frame_is_like_a_picture_where_it_is_decided_by_itself",),
    ),
    Bug(
        "budgets per frame",
        "a picture takes one",
        f"{LIVE}/prefill.py",
        "    check_budgets(plan.pruning.stages, prompt.layout, merged is not None)\n",
        "",
        ("test_budgets_of_frames_are_refused_for_pictures",),
    ),
    Bug(
        "the tower",
        "patches of a video are not averaged into tokens",
        f"{LIVE}/tower.py",
        "isqrt(self.facts.patches_per_token) * self.pooled",
        "isqrt(self.facts.patches_per_token)",
        ("test_attention_of_the_cls_token_is_the_mean_of_the_patches_of_a_token",),
    ),
    # --- ways of generating -------------------------------------------------------------------------------------------
    Bug(
        "static caches",
        "places without an entry are seen",
        f"{LIVE}/static_cache.py",
        "part.masked_fill(~seen[:, None, None], False if given.dtype == torch.bool else torch.finfo(given.dtype).min)",
        "part",
        ("test_the_same_as_in_a_cache_that_grows",),
        "llava",
    ),
    Bug(
        "static caches",
        "a cache of other rows goes on",
        f"{LIVE}/owners.py",
        "        check_rows(conversation_layer(cache), len(tokens_of(args, kwargs)))\n",
        "",
        ("test_another_number_of_rows_is_refused",),
    ),
    Bug(
        "static caches",
        "a step too many is taken",
        f"{LIVE}/owners.py",
        "        check_room(cache.layers, 1)\n",
        "",
        ("test_too_short",),
    ),
    Bug(
        "prefixes",
        "padding stays behind the question",
        f"{LIVE}/prefix.py",
        "mask.long().argsort(dim=1, stable=True)",
        "torch.arange(mask.shape[1]).expand(mask.shape)",
        ("test_sixteen_questions_have_the_answers_of_sixteen_runs",),
    ),
    Bug(
        "prefixes",
        "the question is not needed by anybody",
        f"{LIVE}/prefix.py",
        "sorted(bound.needs & OF_QUESTION)",
        "()",
        ("test_methods_that_need_the_question",),
    ),
    Bug(
        "pictures among embeddings",
        "all pictures of a row are one",
        f"{LIVE}/merged.py",
        "np.where(table, begins.cumsum(axis=1), 0)",
        "np.where(table, 1, 0)",
        ("test_the_same_as_from_ids",),
    ),
    Bug(
        "pictures among embeddings",
        "a video is taken for a picture",
        f"{LIVE}/videos.py",
        "if name is not None and said:",
        "if name is not None and not said and not layout.images:",
        ("test_frames_among_embeddings_are_not_known",),
    ),
    # --- budgets, records, reports ------------------------------------------------------------------------------------
    Bug(
        "sizes",
        "a share is of what an earlier stage left",
        f"{LIVE}/choosing.py",
        "            parts += _parts(bound, call, prompt, image, bound.keeps(budget, prompt, image))\n",
        "            parts += _parts(bound, call, prompt, image, budget.resolve(len(call.section.remaining[image])))\n",
        ("test_budgets_are_exact_for_every_picture", "test_second_budget_is_of_the_original_of_each_picture"),
        "llava and pdrop or second_budget",
    ),
    Bug(
        "rounding",
        "half goes to the even number",
        "vlmprune/schedule.py",
        "        kept = math.floor(self.fraction * visual + 0.5)\n",
        "        kept = round(self.fraction * visual)\n",
        ("test_rounding",),
    ),
    Bug(
        "rounding",
        "a small share keeps nothing",
        "vlmprune/schedule.py",
        "1 if self.fraction > 0 else 0",
        "0",
        ("test_rounding",),
    ),
    Bug(
        "schedules",
        "a later stage may keep more",
        "vlmprune/schedule.py",
        "second is not None and second > first:",
        "second is not None and second > first and False:",
        ("test_contradictions_are_refused",),
    ),
    Bug(
        "schedules",
        "two stages at one layer pass",
        "vlmprune/schedule.py",
        "            if after.order <= before.order:\n",
        "            if after.order < before.order:\n",
        ("test_bad_schedules",),
    ),
    Bug(
        "hygiene",
        "padding rows see nothing",
        f"{LIVE}/masks.py",
        "        visible[:, torch.arange(queries, device=visible.device), own] |= ~query_valid\n",
        "        pass\n",
        ("test_bool_mask_is_causal_and_hides_padding",),
    ),
    Bug(
        "hygiene",
        "padding overwrites what was scattered",
        f"{LIVE}/rows.py",
        "        target = torch.where(valid, rows, sequence)[..., None].expand_as(x)\n",
        "        target = rows[..., None].expand_as(x)\n",
        ("test_scatter_overwrites_nothing",),
    ),
    Bug(
        "hygiene",
        "padding is a dropped token",
        f"{LIVE}/rows.py",
        "return gather_tokens(x, self.rows.to(x.device), None if self.dense else self.valid.to(x.device))",
        "return gather_tokens(x, self.rows.to(x.device), None)",
        ("test_padding_is_zero_even_beside_nan",),
    ),
    Bug(
        "arithmetic",
        "FLOPs of the MLP lack the gate",
        "vlmprune/cost.py",
        " + 6 * tokens * self.dim * self.mlp",
        " + 4 * tokens * self.dim * self.mlp",
        ("test_llava_7b_by_hand", "test_llava_report_by_hand"),
    ),
    Bug(
        "arithmetic",
        "values are not counted in KV bytes",
        "vlmprune/cost.py",
        "        return 2 * keys * self.kv_heads",
        "        return keys * self.kv_heads",
        ("test_reported_bytes_are_the_caches",),
        "llava and fastv",
    ),
    Bug(
        "waiting",
        "FastV looks at a value",
        f"{METHODS}/pruning/fastv.py",
        "        return see.attention_from_last.mean(dim=1)  # over heads\n",
        "        return see.attention_from_last.mean(dim=1) if bool(see.position.min() >= 0) else see.position\n",
        ("test_a_prompt_is_read_once",),
        "fastv",
    ),
    Bug(
        "memory",
        "ToMe compares all tokens with all",
        f"{METHODS}/merging.py",
        "return x.split(max(CHUNK // max(len(x) * columns, 1), 1), dim=1)",
        "return (x,)",
        ("test_prefill_of_8192_tokens_builds_no_map_and_stays_with_sdpa",),
        "tome",
    ),
    Bug(
        "memory",
        "a padded prompt gets a map of all tokens although no layer sees them all",
        f"{LIVE}/pruning.py",
        "        for bound in self._running.get(0, ()):\n",
        "        for bound in ():\n",
        ("test_padding_needs_no_map_where_the_prompt_is_cut_at_once",),
    ),
    Bug(
        "defaults",
        "decoding forgets what was dropped later, although nobody asked for it",
        f"{METHODS}/base.py",
        "cache_layer: int = number(-1, low=-1, whole=True)\n    newlines",
        "cache_layer: int = number(0, low=-1, whole=True)\n    newlines",
        ("test_the_cache_holds_what_was_kept", "test_generation_equals_masked"),
        "fastv",
    ),
    # --- redistribution -----------------------------------------------------------------------------------------------
    Bug(
        "VAR",
        "text sinks give nothing",
        f"{METHODS}/redistribution/var.py",
        "        moved = (1 - self.keep) * (visual_sink + text_sink)\n",
        "        moved = (1 - self.keep) * visual_sink\n",
        ("test_var_equals_the_loops", "test_var_equals_softmax_then_edit"),
        "",
    ),
    Bug(
        "VAR",
        "heads are selected by the share of others",
        f"{METHODS}/redistribution/var.py",
        "visual_sink <= self.max_sink_share * image",
        "visual_sink >= self.max_sink_share * image",
        ("test_var_equals_the_loops", "test_var_equals_softmax_then_edit"),
        "",
    ),
    Bug(
        "ACT",
        "the first token counts as a sink",
        f"{METHODS}/redistribution/act.py",
        "return groups if see.first is None else groups.scatter(",
        "return groups if True or see.first is None else groups.scatter(",
        ("test_act_equals_the_loops",),
        "act",
    ),
    Bug(
        "PAI",
        "words are raised, too",
        f"{METHODS}/redistribution/pai.py",
        "        return see.visual.to(torch.int8)[:, None]\n",
        "        return see.prompt.to(torch.int8)[:, None]\n",
        ("test_pai_equals_the_loops",),
        "pai",
    ),
    Bug(
        "PAINT",
        "the summary set takes everything above the third quartile",
        f"{METHODS}/redistribution/paint.py",
        "late > high + 1.5 * (high - low)",
        "late > high",
        ("test_paint_equals_the_loops",),
        "paint",
    ),
    Bug(
        "ZeroTuning",
        "rows are not divided",
        f"{METHODS}/redistribution/zerotuning.py",
        "total = torch.add(others, first, alpha=self.gain)",
        "total = torch.add(others, first)",
        ("test_zerotuning_equals_the_loops", "test_zerotuning_rows_sum_to_one"),
        "zerotuning",
    ),
    Bug(
        "VHR",
        "no outlier is removed",
        f"{METHODS}/redistribution/vhr.py",
        "        outlier = _exceptional(differs) & _exceptional(alone)\n",
        "        outlier = _exceptional(differs) & False\n",
        ("test_vhr_outliers",),
    ),
    Bug(
        "redistribution",
        "rows before the picture's end are edited",
        f"{LIVE}/edited_rows.py",
        "        begin = np.where(tokens_of.visual, place + 1, 0).max(axis=1)\n",
        "        begin = np.where(tokens_of.visual, place, 0).max(axis=1) // 2\n",
        ("test_var_equals_the_loops",),
        "var",
    ),
    Bug(
        "redistribution",
        "padding rows are overwritten",
        f"{LIVE}/edited_rows.py",
        "    if not rows.dense:\n        new = torch.where(rows.valid[:, :, None, None], new, own)\n",
        "",
        ("test_batch_equals_singles", "test_var_equals_the_loops"),
        "var or pai",
    ),
    Bug(
        "redistribution",
        "marks are made anew when the prompt runs again",
        f"{LIVE}/cache_layer.py",
        "            self.marks.batch(beam_idx)\n",
        "            pass\n",
        ("test_marks_follow_the_cache",),
    ),
    Bug(
        "found families",
        "arguments that nobody knows are no danger",
        f"{LIVE}/finder.py",
        "if strange := _arguments(text_model) - TO_TEXT_MODEL - FLAGS - known:",
        "if strange := set():",
        ("test_what_might_be_silently_wrong_is_stopped",),
        "qwen3_vl and silently",
    ),
    Bug(
        "found families",
        "token types are no danger",
        f"{LIVE}/finder.py",
        'if "token_type_ids" in given or (',
        "if False and (",
        ("test_what_might_be_silently_wrong_is_stopped",),
        "gemma3 and silently",
    ),
    Bug(
        "found families",
        "any method may read anything of a found model",
        f"{LIVE}/refusals.py",
        "if family.reads is not None and (more := sorted(needs - family.reads)):",
        "if more := []:",
        ("test_methods_that_look_at_more_than_features_are_refused",),
        "fastv",
    ),
    Bug(
        "forced families",
        "the family of a known model may be another one",
        f"{LIVE}/finder.py",
        "if kind in FAMILIES or kind in REFUSED:",
        "if kind in REFUSED:",
        ("test_a_family_forced_upon_a_model_of_another_known_family_is_refused",),
        "another_known",
    ),
    Bug(
        "patched models",
        "nobody looks where a forward method comes from",
        f"{LIVE}/parts.py",
        'if kind.__module__.startswith("transformers.") and not origin.startswith("transformers."):',
        "if not kind.__module__:",
        ("test_a_patched_class_is_refused",),
        "patched and layer",
    ),
    Bug(
        "check",
        "the judge hides nothing",
        f"{LIVE}/judge.py",
        "queries[..., : self.prompt] &= mask[:, None, None, : self.prompt].to(hidden.device)",
        "pass",
        ("test_every_family_is_exact_in_its_own_judgement",),
        "judgement and internvl",
    ),
    Bug(
        "check",
        "every difference is allowed",
        f"{LIVE}/check.py",
        'verdict: Any = "exact" if difference <= tolerance and not lost else "not exact"',
        'verdict: Any = "exact"',
        ("test_a_fault_is_found",),
        "fault and llava",
    ),
    Bug(
        "check",
        "a prompt that says nothing is a proof",
        f"{LIVE}/check.py",
        'if verdict == "exact" and moved < MEANINGFUL * tolerance:',
        'if verdict == "never":',
        ("test_where_pruning_moves_nothing_the_verdict_is_undecided",),
    ),
    Bug(
        "the family matrix",
        "keys are turned back by another layer's rotary embedding",
        f"{LIVE}/choosing.py",
        "config.layer_types[layer - 1]",
        "config.layer_types[layer]",
        ("test_pruning",),
        "gemma4_moe-dart",
    ),
    Bug(
        "the family matrix",
        "what a layer is given for each token is not shortened",
        f"{LIVE}/plan.py",
        "    return tuple(rows.gather(x) if isinstance(x, Tensor) else x for x in args)\n",
        "    return args\n",
        ("test_cell",),
        "gemma4_e and greedy and blind and long",
    ),
    Bug(
        "the family matrix",
        "what a layer is given for each token is that of the first rows",
        f"{LIVE}/plan.py",
        "    return tuple(rows.gather(x) if isinstance(x, Tensor) else x for x in args)\n",
        "    return tuple(x[:, : rows.rows.shape[1]] if isinstance(x, Tensor) else x for x in args)\n",
        ("test_cell",),
        "gemma4_e and greedy and blind and long",
    ),
    Bug(
        "windows",
        "a layer that is taken over counts its entries from the first token",
        f"{LIVE}/section.py",
        "        call.complete = Entries.complete(batch, length, layer.device, call.mask, unpadded).last(stored)\n",
        "        call.complete = Entries.complete(batch, stored, layer.device, call.mask, unpadded)\n",
        ("test_a_picture_comes_late",),
        "late and aya_vision",
    ),
    Bug(
        "windows",
        "padding is taken to stand on the left",
        f"{LIVE}/layout.py",
        "            real = seen != 0\n",
        "            real = np.sort(seen != 0, axis=1)\n",
        ("test_padding_on_the_right",),
        "gemma3 and right",
    ),
    Bug(
        "recurrent layers",
        "they are given the kept rows in falling order",
        f"{LIVE}/rows.py",
        "[:, alive.shape[1] - most :]\n",
        "[:, alive.shape[1] - most :].flip(1)\n",
        ("test_dropped_equals_native",),
    ),
    Bug(
        "recurrent layers",
        "closed gaps leave positions as they are",
        f"{LIVE}/pruning.py",
        "            shift = _moved(prompt, section.alive & ~alive) + (0 if shift is None else shift)\n",
        "            shift = shift\n",
        ("test_dropped_equals_native",),
        "lfm2_vl",
    ),
    Bug(
        "pictures that are not encoded before generation",
        "every token is generated under another choice",
        f"{LIVE}/prefill.py",
        "    _refuse_unencoded(plan, call, cache)\n    known",
        "    known",
        ("test_pictures_that_are_not_encoded_beforehand",),
    ),
    Bug(
        "pictures that are not encoded before generation",
        "one greedy answer is refused, too",
        f"{LIVE}/prefill.py",
        "    elif (copies := how.num_beams or 1) > 1 or (how.num_return_sequences or 1) > 1:\n",
        "    elif copies := how.num_beams or 1:\n",
        ("test_what_is_exact_without_encoding_beforehand",),
    ),
    Bug(
        "what a batch costs",
        "a prompt without a picture leaves the record of the one before",
        f"{LIVE}/context.py",
        "        self._records[threading.current_thread()] = record\n",
        "        if record is not None and record.visual:\n            self._records[threading.current_thread()] = record\n",
        ("test_a_text_batch_after_one_with_pictures_costs_nothing_of_it",),
    ),
)


def lost(bugs: Iterable[Bug]) -> list[str]:
    """What is wrong with bugs that no longer apply: their text does not stand in its file exactly once, or a test is gone."""
    there, found = functions(ROOT).keys(), []
    for bug in bugs:
        file = ROOT / bug.file
        count = file.read_text().count(bug.old) if file.exists() else 0
        gone = sorted(set(bug.red) - there)
        if count != 1 or gone:
            why = f"its text stands {count} times in {bug.file}" if count != 1 else f"no test is called {', '.join(gone)}"
            found.append(f"NO LONGER APPLIES: {bug.guard}: {bug.name} ({why})")
    return found


def functions(tree: Path) -> dict[str, list[str]]:
    """Test functions of the suite: name -> files."""
    found: dict[str, list[str]] = {}
    for file in sorted((tree / "tests").rglob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(str(file.relative_to(tree)))
    return found


def copied(to: Path) -> Path:
    """The repository's files, without what git ignores."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, to / name
        if source.exists() or source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return to


def table() -> str:
    """The table of `docs/guards.md`."""
    lines = ["| guard | broken by | red |", "|---|---|---|"]
    for guard in dict.fromkeys(bug.guard for bug in BUGS):
        bugs = [bug for bug in BUGS if bug.guard == guard]
        tests = dict.fromkeys(name for bug in bugs for name in bug.red)
        lines.append(f"| {guard} | {'; '.join(bug.name for bug in bugs)} | {', '.join(f'`{name}`' for name in tests)} |")
    return "\n".join(lines)


def verdict(tree: Path, bug: Bug, there: dict[str, list[str]]) -> str:
    """ "red", or what is wrong."""
    tests = [f"{file}::{name}" for name in bug.red for file in there.get(name, ())]
    if not tests:
        return f"NO SUCH TEST: {', '.join(bug.red)}"
    file = tree / bug.file
    text = file.read_text() if file.exists() else ""
    if text.count(bug.old) != 1:
        return f"NO LONGER APPLIES: its text stands {text.count(bug.old)} times in {bug.file}"
    file.write_text(text.replace(bug.old, bug.new))
    try:
        code, said = run_tests(tree, [*tests, *(["-k", bug.only] if bug.only else [])])
    finally:
        file.write_text(text)
    if code == 1:
        first = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return f"red: {first[1] if first else 'a test'}"
    return "SURVIVED" if code == 0 else f"DID NOT RUN (pytest {code}): {said[-300:]}"


def run_tests(tree: Path, arguments: list[str]) -> tuple[int, str]:
    """Pytest's exit status and output, in a fork of this process, which has loaded torch and transformers but not vlmprune."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(tree)
            sys.path.insert(0, str(tree))
            os._exit(int(pytest.main(["-q", "-x", "-n0", "-p", "no:cacheprovider", *arguments])))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", default="", help="bugs whose guard or name contains this")
    arguments.add_argument("--check", action="store_true", help="look at the texts only, run nothing")
    arguments.add_argument("--table", action="store_true", help="print the table of docs/guards.md")
    given = arguments.parse_args()
    if given.table:
        print(table())
        return 0
    chosen = [bug for bug in BUGS if given.only in f"{bug.guard}: {bug.name}"]
    if given.check:
        found = lost(chosen)
        print("\n".join(found) or f"{len(chosen)} bugs apply")
        return bool(found)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in PRELOADED:
        importlib.import_module(name)
    assert "vlmprune" not in sys.modules
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        there = functions(tree)
        for number, bug in enumerate(chosen, start=1):
            begun = time.monotonic()
            found = verdict(tree, bug, there)
            wrong += not found.startswith("red")
            seconds = time.monotonic() - begun
            print(f"{number:3}/{len(chosen)}  {bug.guard}: {bug.name}  {seconds:.0f} s  {found}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} red")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
