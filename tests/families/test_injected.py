"""Language models that add features of the tower to the visual tokens after their first layers (DeepStack)."""

from __future__ import annotations

import pytest
import torch
from families import configs
from families.oracles import TOLERANCE, masked_logits
from families.running import generate
from families.table import BATCHES, TINY, make_inputs, shared

import vlmprune as vp
from vlmprune.live.injected import Injections
from vlmprune.live.rows import Reduction

pytestmark = pytest.mark.usefixtures("no_grad")
NAMES = tuple(name for name, tiny in TINY.items() if tiny.injected)
PLACES = [[0], [1], [2], [3], [4], [0, 1], [0, 1, 2, 3], [2, 4]]
"""Features are added after layers 0, 1 and 2: stages before, among and after them."""


@pytest.mark.parametrize("layers", PLACES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_stages_around_injected_layers(name, layers):
    """Red: features are added to other tokens, twice, not at all, or in another order than the choice."""
    model, inputs = shared(name), make_inputs(name, BATCHES["ragged"])
    shares = [0.8 - 0.15 * number for number in range(len(layers))]
    recipe = f"random:layer={'|'.join(map(str, layers))},fraction={'|'.join(f'{share:g}' for share in shares)},seed=1"
    with vp.wrap(model, recipe) as run:
        _, new, logits = generate(model, inputs)
        keep = run.last.keep
    assert sorted(keep) == layers
    expected = masked_logits(name, model, inputs, keep, new[:, :-1])[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_choice_sees_what_was_added(layer):
    """Red: a stage chooses by hidden states to which the features of the layer before were not added yet."""
    seen: dict[int, torch.Tensor] = {}

    class Looks(vp.ScorePruner):
        name = "looks_at_features"
        paper = "none"
        needs = frozenset({"features"})
        default = vp.at(layer=2, fraction=0.5)

        def score(self, see):
            seen[see.layer] = see.features.clone()
            return see.features[..., 0].float()

    model, inputs = shared("qwen3_vl"), make_inputs("qwen3_vl", BATCHES["one"])
    entering: list[torch.Tensor] = []
    handle = model.model.language_model.layers[layer].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    model(**inputs)
    handle.remove()
    with vp.wrap(model, Looks(layer=layer, fraction=0.5)):
        model(**inputs)
    assert torch.equal(seen[layer][0], entering[0][0, inputs["input_ids"][0] == configs.IMAGE])


def test_kept_rows_get_their_own_features():
    """`Injections.entering` row by row, with padding."""
    places = torch.tensor([[False, True, True, False], [True, False, True, True]])
    features = torch.arange(1.0, 6.0)[:, None].expand(5, 3)
    alive = torch.tensor([[False, False, True, True], [True, False, True, True]])
    rows = Reduction.keeping(alive)
    left = Injections(places, (None, features))
    hidden = torch.zeros(2, 3, 3)
    assert left.entering(1, hidden, None) is hidden
    assert left.entering(3, hidden, None) is hidden
    assert left.entering(2, hidden, rows)[..., 0].tolist() == [[0, 2, 0], [3, 4, 5]]
    assert left.entering(2, torch.zeros(2, 4, 3), None)[..., 0].tolist() == [[0, 1, 2, 0], [3, 0, 4, 5]]


def test_features_after_the_last_layer_are_refused(monkeypatch):
    """Red: the last layer's rows get no features, and nobody notices."""
    config = configs.qwen3_vl()
    config.text_config.num_hidden_layers = 3
    model = TINY["qwen3_vl"].model(config).eval()
    inputs = make_inputs("qwen3_vl", BATCHES["one"])
    plain = model(**inputs).logits
    with vp.wrap(model, "random:layer=2,fraction=0.5") as run:
        with pytest.raises(vp.UsageError, match="adds features of the tower after each of its 3 layers"):
            model(**inputs)
        with run.override(enabled=False):
            assert torch.equal(model(**inputs).logits, plain)
