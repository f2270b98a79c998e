"""`torch.compile` of a wrapped model: hooks run as they are, what lies between is compiled, once for all prompts of a shape."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from tiny_models import build, make_inputs
from torch._dynamo.testing import CompileCounter

import vlmprune as vp

SAMPLES = [["text3", "image", "text4"]]


@pytest.fixture(autouse=True)
def dynamo(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set where flex attention runs un-compiled
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", ["random:layer=0,tokens=4", "fastv:layer=2,tokens=4"])
@torch.no_grad()
def test_compiled_equals_plain(recipe):
    model = build("llava")
    prompts = [make_inputs("llava", model, SAMPLES, seed=seed) for seed in range(3)]
    word = torch.full((1, 1), 20)
    with vp.wrap(model, recipe) as run:
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        graphs = []
        for inputs in prompts:
            expected, answer = model(**inputs), compiled(**inputs)
            assert torch.equal(answer.logits, expected.logits)
            assert run.report().stages[0].kept == (4,)
            mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
            step = {"input_ids": word, "attention_mask": mask}
            one = model(**step, past_key_values=expected.past_key_values).logits
            assert torch.equal(compiled(**step, past_key_values=answer.past_key_values).logits, one)
            graphs.append(counter.frame_count)
    assert graphs[0] > 0  # the counter counts
    assert graphs[2] == graphs[1], "a prompt of a known shape was compiled again"


@pytest.mark.parametrize("recipe", ["random:layer=0,fraction=1", "fastv:layer=2,fraction=1"])
@torch.no_grad()
def test_whole_graph_where_nothing_is_dropped(recipe):
    """Red: a recipe that keeps everything refuses a compilation that the plain model takes; or ignores a budget inside it."""
    model = build("llava")
    words = model.get_input_embeddings()(torch.tensor([[20, 30, 40]]))
    plain = model.model.language_model(inputs_embeds=words).last_hidden_state
    with vp.wrap(model, recipe) as run:
        compiled = torch.compile(model.model.language_model.forward, fullgraph=True, backend="eager")
        assert torch.equal(compiled(inputs_embeds=words).last_hidden_state, plain)
        whole = torch.compile(model, fullgraph=True, backend="eager")
        whole(input_ids=torch.tensor([[20, 30, 40]]))
        with run.override(tokens=4), pytest.raises(torch._dynamo.exc.Unsupported):  # hooks must act now, and cannot
            whole(input_ids=torch.tensor([[20, 30, 40]]))
    with vp.wrap(model, "random:layer=0,fraction=0.5"), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="eager")(input_ids=torch.tensor([[20, 30, 40]]))
