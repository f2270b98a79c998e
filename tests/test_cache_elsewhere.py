"""The cache of a pruned conversation in another model, which is not wrapped, while the first one still is."""

import copy

import pytest
import torch
from tiny_models import build, make_inputs

import vlmprune as vp


@pytest.mark.parametrize("recipe", ["fastv:layer=2,tokens=4", "divprune:layer=0,tokens=4", "uniform:layer=3,fraction=0.5"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [True, False])
@torch.no_grad()
def test_another_model_is_refused_several_tokens(recipe, attn, mask):
    model, other = build("llava", attn=attn), build("llava", attn=attn)
    inputs = make_inputs("llava", model, [["text3", "image", "text4"]])
    turn = {"input_ids": torch.tensor([[9, 10, 11]])}
    if mask:
        turn["attention_mask"] = torch.ones(1, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
    with vp.wrap(model, recipe):
        cache = model(**inputs, use_cache=True).past_key_values
        if attn == "sdpa":
            one = torch.tensor([[9]])
            wanted = model(input_ids=one, past_key_values=copy.deepcopy(cache)).logits
            assert torch.equal(other(input_ids=one, past_key_values=copy.deepcopy(cache)).logits, wanted)
        with pytest.raises(vp.UsageError, match="was pruned by a wrapped model; an un-wrapped model cannot continue it"):
            other(**turn, past_key_values=copy.deepcopy(cache))
        model(**turn, past_key_values=cache)
