"""`vlmprune.check` says "exact" where the oracles do, and finds faults that are planted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families.oracles import language_model
from families.table import BATCHES, NAMES, TINY, build, make_inputs, make_single, shared

import vlmprune as vp
from vlmprune.adapters.registry import FAMILIES
from vlmprune.live.pruning import Pruning

pytestmark = pytest.mark.usefixtures("no_grad")

RECIPE = "random:layer=0|2,fraction=0.6|0.3,seed=0"


@pytest.mark.parametrize("name", [name for name in NAMES if TINY[name].model_type in FAMILIES])
def test_every_family_is_exact_in_its_own_judgement(name):
    """Red: a family's masks, kinds of new tokens or injected features are not what the judge takes them for."""
    batch = "long" if TINY[name].recurrent else "text row"
    verdict = vp.check(shared(name), make_inputs(name, BATCHES[batch]), RECIPE)
    assert verdict.passed, str(verdict)
    assert verdict.judge == ("dropped" if TINY[name].recurrent else "masked")
    assert verdict.moved > 0.1
    assert list(verdict.kept) == [0, 2]


OTHER_RECIPES = [
    "tome:layer=1,fraction=0.5",
    "flowcut:fraction=0.4",
    "mustdrop:layer=2|4,fraction=0.5|0.3,merge=0.3,cache_layer=1",
    "sparsevlm:layer=2,fraction=0.4,positions=compact",
    "visionzip:fraction=0.5",
    "divprune:fraction=0.6 + random:layer=4,fraction=0.2,cache_layer=2",
    "uniform:fraction=0.8,positions=compact + fastv:layer=3,fraction=0.4,cache_layer=0",
]


@pytest.mark.parametrize("recipe", OTHER_RECIPES)
def test_merging_towers_closed_positions_and_cache_stages(recipe):
    verdict = vp.check(shared("llava"), make_inputs("llava", BATCHES["one"]), recipe)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize(
    "recipe",
    [
        "tome:layer=1,fraction=0.5",
        "random:layer=2,fraction=0.5",
        "random:layer=2,fraction=0.3,positions=compact",
        "uniform:layer=0|3,fraction=0.6|0.3,positions=compact",
        "random:layer=4,fraction=0.3,cache_layer=1,seed=0",
        "tome:layer=1,fraction=0.5 + random:layer=4,fraction=0.3,positions=compact,cache_layer=0,seed=0",
    ],
)
def test_recurrent_layers_follow_merged_tokens_and_several_stages(recipe):
    assert vp.check(shared("lfm2_vl"), make_inputs("lfm2_vl", BATCHES["pictures"]), recipe).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_by_its_own_rounding(dtype):
    model = build("qwen3_vl").to(dtype)
    inputs = make_inputs("qwen3_vl", BATCHES["pictures"])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    verdict = vp.check(model, inputs, RECIPE)
    assert verdict.passed, str(verdict)
    assert 1e-4 < verdict.tolerance < 0.5
    assert verdict.tolerance == verdict.noise
    assert str(dtype).removeprefix("torch.") in str(verdict)


class Faulty:
    """While a prompt is pruned, something goes wrong in one decoder layer: it is given the wrong rows."""

    def __init__(self, model, layer: int, wrong) -> None:
        self.layer, self.wrong, self.whole = language_model(model).layers[layer], wrong, 0

    def __enter__(self):
        def hook(module, args, kwargs):
            short = 1 < args[0].shape[1] < self.whole
            self.whole = max(self.whole, args[0].shape[1])
            return ((self.wrong(args[0]), *args[1:]), kwargs) if short else None

        self.handle = self.layer.register_forward_pre_hook(hook, with_kwargs=True)

    def __exit__(self, *error):
        self.handle.remove()


FAULTS = {
    "two rows change places": lambda hidden: hidden[:, [1, 0, *range(2, hidden.shape[1])]],
    "a token too many": lambda hidden: torch.cat([hidden[:, :1], hidden[:, :-1]], 1),
    "all rows by a thousandth": lambda hidden: hidden + 0.001 * hidden.roll(1, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_5"])
def test_a_fault_is_found(name, fault):
    """Red: check says exact, whatever is computed."""
    model = build(name)
    inputs = make_inputs(name, BATCHES["one"])
    with Faulty(model, 3, FAULTS[fault]):
        verdict = vp.check(model, inputs, "random:layer=2,fraction=0.5")
    assert verdict.verdict == "not exact"
    assert not verdict.passed
    assert "NOT EXACT" in str(verdict)
    assert verdict.difference > verdict.tolerance
    assert vp.check(model, inputs, "random:layer=2,fraction=0.5").passed


def test_text_that_is_dropped_is_a_fault(monkeypatch):
    """Red: the judge hides the same words, and finds no difference."""
    drop = Pruning._drop

    def drops_a_word(self, bound, call, prompt, chosen, first):
        alive = call.section.alive.clone()
        alive[0, 1] = False
        call.section = replace(call.section, alive=alive, counts=(call.section.counts[0] - 1,))
        return drop(self, bound, call, prompt, chosen, first)

    with monkeypatch.context() as patch:
        patch.setattr(Pruning, "_drop", drops_a_word)
        verdict = vp.check(shared("internvl"), make_inputs("internvl", BATCHES["one"]), "random:layer=2,fraction=0.4,seed=0")
    assert (verdict.verdict, verdict.text_lost) == ("not exact", 1)
    assert "TEXT TOKENS LOST     1" in str(verdict)


def test_keeping_everything_is_compared_bit_for_bit(monkeypatch):
    """Red: a difference in the last bit of a recipe that keeps everything is not seen."""
    from vlmprune.live import check

    model, wrap = build("llava"), check.wrap

    def wrapped(given, recipe, **options):
        run = wrap(given, recipe, **options)
        if "fraction=1" in str(recipe):
            given.lm_head.weight.mul_(1 + 2**-22)
        return run

    monkeypatch.setattr(check, "wrap", wrapped)
    verdict = check.check(model, make_inputs("llava", BATCHES["one"]), RECIPE)
    assert verdict.keep_all is False
    assert verdict.restored is False  # the weights stay changed
    assert not verdict.passed
    assert str(verdict).count("NOT bit-identical") == 2


def test_a_model_that_does_not_repeat_itself_is_not_judged_bit_for_bit():
    model = build("llava")
    model.lm_head.register_forward_hook(lambda module, args, out: out + 1e-6 * torch.randn_like(out))
    verdict = vp.check(model, make_inputs("llava", BATCHES["one"]), RECIPE)
    assert verdict.keep_all is None
    assert verdict.restored is None
    assert verdict.passed
    assert "gives other numbers each time" in str(verdict)


def test_where_pruning_moves_nothing_the_verdict_is_undecided():
    """Red: a prompt on which every fault would go unseen counts as a proof."""
    model = build("llava")
    for layer in language_model(model).layers:
        layer.self_attn.o_proj.weight.zero_()  # no token sees another one
    verdict = vp.check(model, make_inputs("llava", BATCHES["one"]), RECIPE)
    assert verdict.verdict == "undecided"
    assert not verdict.passed


def test_the_model_stays_as_it_was():
    model = build("internvl")
    inputs = make_inputs("internvl", BATCHES["one"])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(**inputs).logits
    vp.check(model, inputs, RECIPE)
    assert torch.equal(model(**inputs).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in language_model(model).layers)


def test_a_found_family_is_checked():
    verdict = vp.check(shared("mistral3"), make_inputs("mistral3", BATCHES["ragged"]), RECIPE, family="auto")
    assert verdict.passed


def test_the_verdict_as_json():
    verdict = vp.check(shared("llava"), make_inputs("llava", BATCHES["ragged"]), "fastv:layer=2,tokens=3", new_tokens=2)
    told = json.loads(json.dumps(verdict.to_dict()))
    assert told["verdict"] == "exact"
    assert told["passed"] is True
    assert (told["rows"], told["steps"], told["kept"]["2"]) == (3, 2, [12, 36])


def refused(told: str, *args, **kwargs) -> None:
    with pytest.raises(vp.UsageError, match=told) as refusal:
        vp.check(*args, **kwargs)
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_checked_is_refused():
    model = build("llava")
    one, ragged = (make_inputs("llava", BATCHES[batch]) for batch in ("one", "ragged"))
    with vp.wrap(model, RECIPE):
        refused("the model is wrapped", model, one, RECIPE)
    refused("pai redistributes attention", model, one, "pai:alpha=0.5")
    refused("keeps every token of this prompt", model, one, "random:layer=0,fraction=1.0")
    refused("makes features of its own", model, ragged, "tome:layer=1,fraction=0.5")
    refused("has no picture", model, make_inputs("llava", [["text5"]]), RECIPE)
    refused("pad the batch on the left", model, make_inputs("llava", BATCHES["ragged"], pad="right"), RECIPE)
    refused("pass input_ids", model, {"inputs_embeds": torch.zeros(1, 3, 32)}, RECIPE)
    refused("one sample", shared("qwen3_5"), make_inputs("qwen3_5", BATCHES["ragged"]), RECIPE)
    refused("fastv prunes at layer 9", model, one, "fastv:layer=9,fraction=0.5")
    refused("training mode", model.train(), one, RECIPE)
    model.eval().set_attn_implementation("flex_attention")
    refused("does not take: call model.set_attn_implementation", model, one, RECIPE)


def test_one_row_of_a_batch_is_a_sample():
    assert vp.check(shared("qwen3_5_moe"), make_single("qwen3_5_moe", BATCHES["ragged"], 1), RECIPE).passed


def test_the_command(tmp_path, monkeypatch, capsys):
    """Red: the command says nothing of what was found, or a failed check ends like a passed one."""
    from vlmprune.__main__ import main
    from vlmprune.live import check
    from vlmprune.tiny.scenes import make_scene

    make_scene(1).image.save(tmp_path / "scene.png")
    given = ["vlmprune", "check", "--image", str(tmp_path / "scene.png"), "--prompt", "what colour is the circle ?"]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "exact: divprune" in capsys.readouterr().out
    monkeypatch.setattr(check, "RELATIVE", 0.0)  # no rounding is allowed
    monkeypatch.setattr("sys.argv", [*given, "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "not exact"
