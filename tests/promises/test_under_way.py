"""What happens in the midst of something else: a graph that ends while a model is wrapped, a recipe that comes or goes while a
pass runs, a tower pass that fails, a step whose mask hides something where the first stage dropped nothing."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from oracles import TOLERANCE
from oracles.mask import LiveMaskOracle
from tiny_models import build, make_inputs
from transformers import DynamicCache

import vlmprune as vp
from vlmprune.live import attention
from vlmprune.live.attachment import attachment_of

PLAIN = [["text4", "image", "text6"]]


def waiting(recipe: str):
    """A model whose hooks wait for a graph, and what holds that graph."""
    model = build("llava").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with vp.wrap(model, recipe):
        loss = model(**make_inputs("llava", model, PLAIN), use_cache=False).logits.sum()
    assert attachment_of(model.model) is not None
    return model, [loss]


@pytest.mark.parametrize("same", [False, True], ids=["another model", "the same model"])
def test_a_graph_that_ends_while_a_model_is_wrapped(same, monkeypatch):
    """Red: the garbage collector, which runs anywhere, waits for a lock that its own thread holds."""
    model, graph = waiting("pai:alpha=0.5")
    other = model if same else build("llava")
    original = copy.copy

    def collecting(thing):
        graph.clear()
        gc.collect()
        return original(thing)

    done = []

    def work() -> None:
        with vp.wrap(other, "pai:alpha=0.5"):
            done.append(1)
        done.append(2)

    monkeypatch.setattr(attention.copy, "copy", collecting)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(30)
    assert done == [1, 2]
    monkeypatch.undo()
    gc.collect()
    assert attachment_of(model.model) is None
    assert attachment_of(other.model) is None


@pytest.mark.parametrize(
    "recipe",
    [
        "pdrop:layer=4,fraction=0.25",
        "pdrop:layer=2|4,fraction=1.0|0.25",
        "divprune:tokens=16 + fastv:layer=3,tokens=4",  # pictures of 16 tokens: the first stage drops nothing
    ],
)
@torch.no_grad()
def test_a_step_of_a_batch_may_hide_what_was_seen(recipe):
    """Red: the later stage's layers do not look at the mask where the first stage's store everything."""
    model = build("llava")
    inputs = make_inputs("llava", model, [["text7", "image", "text4"], ["text5", "image", "text6"]], seed=5)

    def step():
        cache = DynamicCache()
        model(**inputs, past_key_values=cache)
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)), dim=1)
        mask[0, -4:-2] = 0
        return model(input_ids=torch.tensor([[9], [10]]), attention_mask=mask, past_key_values=cache).logits

    with vp.wrap(model, recipe) as run:
        found, keep = step(), dict(run.last.keep)
    with LiveMaskOracle(model, keep):
        assert (found - step()).abs().max() < TOLERANCE


@torch.no_grad()
def test_attention_finds_its_own_config_when_the_route_was_just_taken_away():
    """Red: KeyError, where another thread closes `observe` between two look-ups of transformers."""
    model = build("llava")
    module = model.model.language_model.layers[0].self_attn
    states = torch.randn(1, 4, 5, 16)
    own = attention.ALL_ATTENTION_FUNCTIONS["sdpa"](module, states, states, states, None, scaling=0.25)[0]
    found = attention.routed_attention(module, states, states, states, None, scaling=0.25)[0]
    assert torch.equal(found, own)


@torch.no_grad()
def test_other_threads_run_while_observe_comes_and_goes():
    model = build("llava")
    inputs, wrong = make_inputs("llava", model, PLAIN), []
    expected, stop = model(**inputs).logits, threading.Event()

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    wrong.extend([] if torch.equal(model(**inputs).logits, expected) else ["another answer"])
                except Exception as error:
                    wrong.append(repr(error))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with vp.observe(model, attention=True):
                pass
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong, wrong[:3]


@torch.no_grad()
def test_a_pass_that_began_before_wrap_ends_as_it_began():
    """Red: its language model is taken for one that was called by itself."""
    model = build("llava")
    inputs, inside, go, found = make_inputs("llava", model, PLAIN), threading.Event(), threading.Event(), []
    expected = model(**inputs).logits

    def wait(*_: object) -> None:
        inside.set()
        go.wait(30)

    handle = model.model.vision_tower.register_forward_pre_hook(wait)

    def work() -> None:
        with torch.no_grad():
            found.append(model(**inputs).logits)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(30)
    with vp.wrap(model, "fastv:layer=2,tokens=4"):
        go.set()
        thread.join()
    handle.remove()
    assert torch.equal(found[0], expected)


@torch.no_grad()
def test_a_pass_through_the_tower_that_fails_leaves_nothing():
    """Red: the projector, called by itself afterwards, is taken for the end of that pass."""
    model = build("llava")
    projector, features = model.model.multi_modal_projector, torch.randn(1, 16, 32)
    expected = projector(features)

    def fail(*_: object) -> None:
        raise KeyError("in the tower")

    with vp.wrap(model, "flowcut:fraction=0.3"):
        handle = model.model.vision_tower.encoder.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="in the tower"):
            model(**make_inputs("llava", model, PLAIN))
        handle.remove()
        assert torch.equal(projector(features), expected)


@dataclass(frozen=True, kw_only=True)
class Told(vp.Pruner):
    """Returns what it is given."""

    name = "told"
    paper = ""
    needs = frozenset({"features"})
    default = vp.at(0, tokens=4)
    given: object = None

    def select(self, see, keep):
        return self.given


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (torch.tensor([[3, 5, 5, 9]]), "rising indices from 0 to 15, each once, found [3, 5, 5, 9]"),
        (torch.tensor([[9, 5, 3, 1]]), "rising indices from 0 to 15, each once, found [9, 5, 3, 1]"),
        (torch.tensor([[-4, -3, -2, -1]]), "rising indices from 0 to 15, each once, found [-4, -3, -2, -1]"),
        (torch.tensor([[1, 2, 3, 16]]), "rising indices from 0 to 15, each once, found [1, 2, 3, 16]"),
        (torch.tensor([[1, 2, 3]]), "chose [3] tokens of 1 pictures, expected 4 of each"),
        (torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "whole numbers [image, keep], found torch.float32"),
        (torch.tensor([1, 2, 3, 4]), "whole numbers [image, keep], found torch.int64 of shape []"),
        ([[1, 2, 3, 4]], "whole numbers [image, keep], found [1, 2, 3, 4]"),
        (None, "whole numbers [image, keep], found None"),
        (vp.Choice(torch.tensor([[1, 2, 3, 4]]), torch.zeros(1, 4, 3)), "of shape [1, 4, 64], found [1, 4, 3]"),
    ],
    ids=range(10),
)
@torch.no_grad()
def test_what_a_method_chose_is_looked_at(given, sentence):
    """Red: logits of another set of tokens, or an error out of torch."""
    model = build("llava")
    with vp.wrap(model, Told(given=given)), pytest.raises(vp.UsageError) as found:
        model(**make_inputs("llava", model, PLAIN))
    assert sentence in str(found.value)


@torch.no_grad()
def test_a_recipe_without_stages_cannot_go_on_with_a_pruned_conversation():
    model = build("llava")
    with vp.wrap(model, "divprune:tokens=4"):
        cache = model(**make_inputs("llava", model, PLAIN), use_cache=True).past_key_values
    with vp.wrap(model, "pai"), pytest.raises(vp.UsageError, match="this recipe prunes nothing: go on"):
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)
