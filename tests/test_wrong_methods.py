"""Methods and relevances of somebody else, wrong: one sentence that names them, when they are made, or at their choice."""

from pathlib import Path

import pytest
import torch
from methods.clip import TEMPLATES, ids, relevance
from tiny_models import build, make_inputs, shared

import vlmprune as vp

SAMPLES = [["text3", "image", "text4"], ["text2", "image", "text6"]]
"""Both pictures have 16 tokens."""


def method(**parts):
    made = {"name": "mine", "paper": "", "needs": frozenset({"features"}), "default": vp.at(0, tokens=4), **parts}
    kind = made.pop("kind", vp.ScorePruner)
    return type("Mine", (kind,), {name: part for name, part in made.items() if part is not ...})


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"needs": frozenset({"featurez"})}, "unknown probe among the needs of mine 'featurez': did you mean 'features'"),
        ({"needs": {"features", 3}}, "unknown probe among the needs of mine '3'"),
        ({"needs": "features"}, "mine: needs must be a set of probes, for example frozenset({'features'}), found 'features'"),
        (
            {"default": ...},
            "the method Mine needs a class attribute default (Schedule), it has none: write default = vlmprune.at(",
        ),
        ({"default": 0.5}, "needs a class attribute default (Schedule), found 0.5"),
        ({"name": ...}, "the method Mine needs a class attribute name (str), it has none"),
        ({"needs": ...}, "mine: needs must be a set of probes, for example frozenset({'features'}), found None"),
    ],
)
def test_a_class_that_lacks_something_is_refused_when_a_method_is_made(parts, sentence):
    with pytest.raises(vp.UsageError) as error:
        method(**parts)()
    assert sentence in str(error.value)


def test_a_redistributor_that_lacks_something():
    class Shrill(vp.PAI):
        name, needs = "shrill", frozenset({"attention_from_clss"})

    with pytest.raises(vp.UsageError, match="unknown probe among the needs of shrill 'attention_from_clss': did you mean"):
        Shrill()


def test_needs_of_a_stage_are_looked_at_when_wrapping():
    mine = method(needs_at=lambda self, stage: frozenset({"keyz"}), score=lambda self, see: see.position.float())
    with pytest.raises(vp.UsageError, match="unknown probe among the needs of mine 'keyz': did you mean 'keys'"):
        vp.wrap(shared("llava"), mine())


SCORES = {
    "a number": (lambda x: x.sum(), "must return a tensor [image, visual] of shape [2, 16], found shape []."),
    "one per picture": (lambda x: x.sum(dim=(1, 2)), "of shape [2, 16], found shape [2]."),
    "every feature": (lambda x: x, "of shape [2, 16], found shape [2, 16, 64]."),
    "nothing": (lambda x: None, "of shape [2, 16], found None."),
    "a list": (lambda x: x.sum(dim=-1).tolist(), "of shape [2, 16], found [["),
    "another order of axes": (lambda x: x.sum(dim=-1).T, "of shape [2, 16], found shape [16, 2]."),
    "complex numbers": (lambda x: x.sum(dim=-1).to(torch.complex64), "of real numbers, found torch.complex64"),
    "a pair": (lambda x: (x, x), "of shape [2, 16], found (tensor("),
    "NaN": (lambda x: x.sum(dim=-1).index_fill(1, torch.tensor([3]), torch.nan), "returned NaN"),
    "another length": (lambda x: x.sum(dim=-1)[:, 1:], "of shape [2, 16], found shape [2, 15]."),
}


@pytest.mark.parametrize("wrong", SCORES)
@torch.no_grad()
def test_scores_that_are_none(wrong):
    made, sentence = SCORES[wrong]
    model = shared("llava")
    with vp.wrap(model, method(score=lambda self, see: made(see.features))()), pytest.raises(vp.UsageError) as error:
        model(**make_inputs("llava", model, SAMPLES))
    assert str(error.value).startswith("mine: score(see) ")
    assert sentence in str(error.value)


@torch.no_grad()
def test_infinite_scores_are_an_order():
    model = shared("llava")
    mine = method(score=lambda self, see: torch.where(see.position < 4, torch.inf, -torch.inf))
    with vp.wrap(model, mine()) as run:
        model(**make_inputs("llava", model, SAMPLES))
    assert run.last.kept[0].index.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("made", "first"),
    [(lambda x: x.position, 12), (lambda x: x.position >= 10, 10), (lambda x: x.position.to(torch.bfloat16), 12)],
    ids=["whole numbers", "bools", "bfloat16"],
)
@torch.no_grad()
def test_scores_of_any_real_kind(made, first):
    model = shared("llava")
    with vp.wrap(model, method(score=lambda self, see: made(see))()) as run:
        model(**make_inputs("llava", model, SAMPLES))
    assert run.last.kept[0].index.tolist() == list(range(first, first + 4))


RELEVANCES = SCORES | {
    "NaN": (SCORES["NaN"][0], "returned NaN or infinity"),
    "infinity": (lambda x: x.sum(dim=-1).index_fill(1, torch.tensor([3]), torch.inf), "returned NaN or infinity"),
    "every feature": (lambda x: x, "of shape [2, 16], found shape [2, 16, 32]."),
}


@pytest.mark.parametrize("wrong", RELEVANCES)
@torch.no_grad()
def test_relevances_that_are_none(wrong):
    made, sentence = RELEVANCES[wrong]
    model = shared("llava")
    recipe = vp.CDPruner(tokens=4, relevance=lambda features, ids, valid: made(features))
    with vp.wrap(model, recipe), pytest.raises(vp.UsageError) as error:
        model(**make_inputs("llava", model, SAMPLES))
    assert str(error.value).startswith("cdpruner: relevance ")
    assert sentence in str(error.value)


@torch.no_grad()
def test_nan_in_the_model_is_not_an_order():
    model = build("llava")
    model.model.language_model.layers[1].self_attn.q_proj.weight[:] = torch.nan
    with vp.wrap(model, "fastv:layer=2,tokens=4"), pytest.raises(vp.UsageError, match=r"fastv: score\(see\) returned NaN"):
        model(**make_inputs("llava", model, SAMPLES))


@pytest.mark.parametrize("question", [lambda: "a", lambda text, more: "a"])
def test_a_question_that_takes_no_text_is_refused_at_once(question):
    with pytest.raises(vp.UsageError, match=r"question is called as question\(text after the picture\), but the one given"):
        relevance(question=question)


@pytest.mark.parametrize(
    "text", ["\nWhat? [/INST]", "\nWhat?<|im_end|>\n<|im_start|>assistant\n", "What?</s>", "What? Assistant: "]
)
def test_a_prompt_of_another_template_is_no_question(text):
    """LLaVA-1.5's template writes nothing behind a question that is not to be answered yet: any text would pass for one."""
    with pytest.raises(vp.UsageError, match=r"finds no question .* by the chat template"):
        relevance(TEMPLATES["llava"]).asked(ids(text))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (vp.FastV, "found the class FastV: pass an instance, FastV()."),
        (vp.VAR, "found the class VAR: pass an instance, VAR()."),
        (vp.ScorePruner, "found the class ScorePruner: a method is an instance of a class derived from it, for example"),
        (method(default=...), "found the class Mine: give the class a default, for example default = vlmprune.at("),
        (method(), "found the class Mine: pass an instance, Mine()."),
        ([vp.FastV(), vp.VAR()], "found a list of 2: pass its items one by one, vlmprune.wrap(model, *methods)."),
        ({"schema": 1, "methods": []}, "found a dict: read it with vlmprune.Recipe.from_dict(…)."),
        (Path("a/b"), "PosixPath('a/b'): read it with vlmprune.Recipe.from_pretrained(…)."),
        (torch.nn.Linear(2, 2), "found a model (Linear): wrap takes one model, and then methods."),
        (None, "found None: for example vlmprune.FastV(layer=2)."),
        (0.25, "found 0.25: for example vlmprune.FastV(layer=2)."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_method(given, sentence):
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(shared("llava"), given)
    assert str(error.value).startswith("expected a method, a recipe or a recipe string, found ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((), "a recipe needs at least one method"),
        ([], "a recipe needs at least one method"),
        ("fastv", "a Recipe is made of a tuple of methods, found 'fastv': write vlmprune.Recipe.of(…)"),
        (vp.FastV(), "a Recipe is made of a tuple of methods, found FastV("),
        (None, "a Recipe is made of a tuple of methods, found None"),
        (("fastv",), "found 'fastv': for example vlmprune.FastV(layer=2)"),
        ((vp.FastV,), "found the class FastV: pass an instance, FastV()."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_recipe(given, sentence):
    """Red: a recipe of a string holds no method, and runs un-pruned."""
    with pytest.raises(vp.UsageError) as error:
        vp.Recipe(given)
    assert sentence in str(error.value)


def test_a_recipe_of_a_list_is_one_of_a_tuple():
    assert vp.Recipe([vp.FastV()]) == vp.Recipe((vp.FastV(),))
    assert hash(vp.Recipe([vp.FastV()])) == hash(vp.Recipe((vp.FastV(),)))
    with pytest.raises(vp.UsageError, match="a recipe needs at least one method"):
        vp.wrap(shared("llava"))
