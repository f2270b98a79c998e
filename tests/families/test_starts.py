"""Queries and keys are those of a sample that begins at position 0, whichever numbers a rotary embedding turns together."""

from __future__ import annotations

import pytest
import torch
from families.table import BATCHES, make_inputs, shared

import vlmprune as vp
from vlmprune.live.source import unrotated

pytestmark = pytest.mark.usefixtures("no_grad")
seen: list[torch.Tensor] = []


class LooksAtKeys(vp.ScorePruner):
    name = "looks_at_keys"
    paper = "none"
    needs = frozenset({"keys"})
    default = vp.at(layer=2, fraction=0.5)

    def score(self, see):
        seen.append(see.keys.clone())
        return see.keys[:, 0, :, 0]


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_turning_back_undoes_the_turn(pairs):
    random = torch.Generator().manual_seed(0)
    x, angle = torch.randn(1, 2, 3, 12, generator=random), torch.tensor([[0.3, 1.1, -0.7, 2.0]])
    if pairs == "halves":
        cos, sin = (torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
        first, second = x[..., :8].chunk(2, -1)
        turned = x[..., :8] * cos + torch.cat((-second, first), -1) * sin
    else:
        cos, sin = (part.repeat_interleave(2, -1) for part in (angle.cos(), angle.sin()))
        turned = x[..., :8] * cos + torch.stack((-x[..., 1:8:2], x[..., 0:8:2]), -1).flatten(-2) * sin
    turned = torch.cat((turned, x[..., 8:]), -1)
    torch.testing.assert_close(unrotated(turned, 1.5 * cos, 1.5 * sin), x)


@pytest.mark.parametrize("name", ["glm4v", "mistral3", "internvl", "cohere2_vision"])
def test_keys_of_a_shifted_prompt_are_those_of_the_plain_one(name):
    """Red: GLM and Cohere turn neighbours together, and are turned back as if these were half the width apart."""
    model, inputs = shared(name), make_inputs(name, BATCHES["one"])
    plain = torch.arange(inputs["input_ids"].shape[1])[None]
    found = []
    for start in (0, 37):
        seen.clear()
        with vp.wrap(model, LooksAtKeys()):
            positions = plain + start if name != "glm4v" else (plain + start)[None].expand(4, -1, -1)
            model(**inputs, position_ids=positions)
        found.append(seen[0])
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[0].abs().max()
