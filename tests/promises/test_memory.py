"""No path builds an attention map: 8,192 tokens, of which 8,100 are one picture, under every method.

A whole map has n² numbers per head. Every tensor that any operation makes is looked at; the limit is a sixteenth of one head's
map, masks included. SDPA runs once in every layer of the tower and of the language model.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cases import PRUNING, REDISTRIBUTION
from oracles import Watch
from tiny_models import IMAGE, VOCAB
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune as vp

TOKENS, SIDE, PATCH = 8192, 90, 2
LAYERS, BLOCKS = 4, 3
LIMIT = TOKENS**2 // 16


@functools.cache
def model() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=BLOCKS,
        num_attention_heads=1,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2 * TOKENS,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=SIDE**2)
    return LlavaForConditionalGeneration(config).eval()


@functools.cache
def inputs() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    words = torch.randint(8, VOCAB, (TOKENS - SIDE**2,), generator=random)
    ids = torch.cat((words[:40], torch.full((SIDE**2,), IMAGE), words[40:]))[None]
    assert ids.shape[1] == TOKENS
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, SIDE * PATCH, SIDE * PATCH, generator=random)}


LONG = [
    *((row.recipe(arguments), 0) for row in PRUNING for arguments in row.long),
    *((row.recipe(row.long), row.attention_runs) for row in REDISTRIBUTION),
]


@pytest.mark.parametrize(("recipe", "more"), LONG)
def test_prefill_of_8192_tokens_builds_no_map_and_stays_with_sdpa(recipe, more):
    """Red: an attention or similarity map exists at one time, or a layer leaves SDPA."""
    # Not in inference mode, which hides what operations are made of
    with torch.no_grad(), vp.wrap(model(), recipe) as run, Watch() as seen:
        model()(**inputs(), use_cache=True, logits_to_keep=1)
    assert seen.numbers < LIMIT, seen.by
    assert seen.attention == BLOCKS + LAYERS + more
    assert run.report().prompt_tokens == TOKENS


def test_padding_needs_no_map_where_the_prompt_is_cut_at_once():
    """A stock model masks padding with a map of the whole prompt; red: it is made although no layer sees the whole prompt."""
    padded = {**inputs(), "attention_mask": (torch.arange(TOKENS) > 0)[None].long()}
    with torch.no_grad(), vp.wrap(model(), "random:layer=0,tokens=300"), Watch() as seen:
        model()(**padded, use_cache=True, logits_to_keep=1)
    assert seen.numbers < LIMIT, seen.by
    with torch.no_grad(), vp.wrap(model(), "random:layer=2,tokens=300"), Watch() as seen:
        model()(**padded, use_cache=True, logits_to_keep=1)
    assert seen.numbers >= TOKENS**2, "transformers makes no such map any more: say so in docs/architecture.md"


def test_the_watch_sees_a_map():
    with Watch() as seen:
        query = torch.zeros(1, 1, TOKENS, 1)
        (query @ query.transpose(-1, -2)).sum()
        torch.nn.functional.scaled_dot_product_attention(query[:, :, :4], query, query)
    assert seen.numbers == TOKENS**2 > LIMIT
    assert seen.attention == 1
