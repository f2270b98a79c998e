"""Attention of the layer that a stage is before ("one layer ahead") is what the layer itself computes, in every family."""

from __future__ import annotations

import pytest
import torch
from families.configs import IMAGE
from families.table import BATCHES, TINY, make_inputs, shared

import vlmprune as vp
from vlmprune.adapters.registry import FAMILIES

pytestmark = pytest.mark.usefixtures("no_grad")
NAMES = [name for name, tiny in TINY.items() if tiny.model_type in FAMILIES and not tiny.recurrent and not tiny.blocks]
TOLERANCE = 1e-6
"""Absolute, for attention in [0, 1] in fp32."""
seen: list[torch.Tensor] = []


class LooksAhead(vp.ScorePruner):
    """Keep what the stage's own layer will attend to; the probe is noted."""

    name = "looks_ahead"
    paper = "none"
    needs = frozenset({"attention_of_layer"})
    default = vp.at(layer=2, fraction=0.5)

    def score(self, see):
        seen.append(see.attention_of_layer.clone())
        return see.attention_of_layer.mean(dim=1)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_attention_ahead_is_the_layers_own(name, layer):
    """Oracle: the stock model's eager attention. Red: norms of queries and keys, a partial or interleaved rotary embedding or
    the factor on scores are left out."""
    model, inputs = shared(name, "eager"), make_inputs(name, BATCHES["one"])
    stock = model(**inputs, output_attentions=True).attentions[layer]
    seen.clear()
    with vp.wrap(model, LooksAhead(layer=layer, fraction=0.5)):
        model(**inputs)
    assert stock.shape[-1] == inputs["input_ids"].shape[1]
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    theirs = stock[0, :, -1, visual]
    (mine,) = seen
    if mine.shape[-1] < len(visual):  # row separators are text
        columns = [int((theirs - mine[0, :, token, None]).abs().amax(dim=0).argmin()) for token in range(mine.shape[-1])]
        assert columns == sorted(set(columns))
        theirs = theirs[:, columns]
    torch.testing.assert_close(mine[0], theirs, atol=TOLERANCE, rtol=0)
    assert theirs.std() > 1e-3, "attention is flat"
