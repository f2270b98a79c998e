"""VHR: a whole model against the loops of its paper, and its formula at the ends of its range."""

from __future__ import annotations

import pytest
import torch
from oracles import TOLERANCE
from redistribution.loops.vhr import vhr_heads
from tiny_models import LAYERS, implementations_of, make_inputs, shared

import vlmprune as vp


@torch.no_grad()
@pytest.mark.parametrize(("family", "attn"), implementations_of(("llava", "llava_next", "qwen2_5_vl")))
def test_vhr_equals_algorithm_1(family, attn):
    """Red: the text-only stream sees pictures, other positions, or un-reinforced layers; or heads are chosen otherwise."""
    model = shared(family, attn)
    inputs = make_inputs(family, model, [["text6", "image", "text5"]])
    ids = inputs["input_ids"]
    words = ids[:, ids[0] != model.config.image_token_id]
    texts = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    if "mm_token_type_ids" in inputs:
        texts["mm_token_type_ids"] = torch.zeros_like(words)
    chosen, expected = vhr_heads(model, inputs, texts, vp.VHR().layers_of(LAYERS))
    with vp.wrap(model, "vhr") as run:
        logits = model(**inputs).logits
        cache = model(**inputs, use_cache=True).past_key_values
        report = run.report()
    for layer, factors in chosen.items():
        assert cache.layers[layer].marks.heads[0].tolist() == factors.tolist(), layer
    assert "vhr" in str(report)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    if family != "qwen2_5_vl":
        return
    deltas = model.model.rope_deltas
    assert deltas is not None, "the text-only stream must not touch the model's own positions"


def factors(distance, *far):
    """VHR's, of heads whose outputs differ by `far`; the last is loud without the picture too."""
    blind = torch.tensor([1.0, 1.0, 1.0, 10.0])[None, :, None]
    return vp.VHR(distance=distance).scale(blind + torch.tensor(far)[None, :, None], blind)[0].tolist()


def test_vhr_outliers():
    """Red: the sample's standard deviation, which is larger, or another bound. By hand: mean 2.3625 + 0.9456 = 3.308."""
    assert factors("l2", 1.0, 2.0, 3.0, 3.45) == [1, 2, 2, 1], "3.45 is an outlier: the median of 0, 1, 2, 3 is 1.5"
    assert factors("l2", 1.0, 2.0, 3.0, 3.2) == [1, 2, 2, 1], "3.2 > 3.177"
    assert factors("l2", 1.0, 2.0, 3.0, 3.1) == [1, 1, 2, 2], "3.1 < 3.128"


def test_vhr_squared_distance():
    """Red: `distance` is not heeded. 9.61 > 5.9025 + 3.570 = 9.473."""
    assert factors("l2sq", 1.0, 2.0, 3.0, 3.1) == [1, 2, 2, 1]
