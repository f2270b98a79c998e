"""The information horizon: measured as one masked group at a time would, found where it was planted, and asked for in words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from command_line import vlmprune
from oracles import image_columns, masked_logits, visual_columns
from PIL import Image
from tiny_models import LAYERS, make_inputs, make_single, shared

import vlmprune as vp
from vlmprune import tiny
from vlmprune.cost import compute_average, nominal_average
from vlmprune.evals import calibration, horizon, horizon_groups, horizon_report
from vlmprune.evals.budgets import compose
from vlmprune.evals.calibration import Sample
from vlmprune.evals.horizon import Horizon, SampleCurves, estimate, find_horizon
from vlmprune.evals.horizon_groups import Only
from vlmprune.evals.question import Question
from vlmprune.evals.questions import open_questions

ANSWERS = (40, 71)
PROMPTS = {
    "llava": [["text3", "image", "text5"], ["image", "text2"]],
    "qwen2_5_vl": [["text3", "image", "text5"], ["image", "text2"]],  # grids 4×4 and 4×6
    "llava, two pictures": [["image", "text2", "image", "text4"]],  # of one size: a view shows both
    "qwen2_5_vl, two pictures": [["image", "text2", "image", "text4"]],
}


def markdown(found: Horizon) -> str:
    return horizon_report.result(found.to_dict()).markdown()


def samples(family, model, prompts):
    return [Sample(make_single(family, model, prompts, row), (ANSWERS[row],), f"row {row}") for row in range(len(prompts))]


def by_hand(model, sample, layer, index_of_picture):
    """Probabilities `[vocabulary]` when only some tokens of some picture are visible from a layer on."""
    ids = sample.inputs["input_ids"]
    keep = ~image_columns(model, ids)
    for picture, index in index_of_picture.items():
        keep[0, visual_columns(model, sample.inputs, 0, picture)[index]] = True
    return masked_logits(model, sample.inputs, {layer: keep})[0, -1].softmax(-1)


def windows_by_hand(rows, columns, side):
    cells = {}
    for place in range(rows * columns):
        cells.setdefault((place // columns // side, place % columns // side), []).append(place)
    return [cells[cell] for cell in sorted(cells)]


# -- against the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "window"), [*((case, 2) for case in PROMPTS), ("llava", 3)])
def test_metric_equals_one_masked_group_at_a_time(case, window):
    """Windows of 3×3 on 4×4 tokens make groups of 9, 3, 3 and 1: a ragged batch."""
    family = case.partition(",")[0]
    model = shared(family)
    layers = (0, 2, LAYERS - 1)
    for row, sample in enumerate(samples(family, model, PROMPTS[case])):
        found, depth = horizon.measure(model, sample, layers, window, chunk=7)
        side = (4, 4) if family == "llava" else (4, 6)
        grids = [(4, 4), side] if "two" in case else [[(4, 4), side][row]]
        cells = [(picture, cell) for picture, grid in enumerate(grids) for cell in windows_by_hand(*grid, window)]
        full = masked_logits(model, sample.inputs, {})[0, -1].softmax(-1)
        assert depth == LAYERS
        assert found.full == pytest.approx(float(full[sample.answer[0]]), abs=1e-5)
        assert found.information.shape == (len(layers), len(cells))
        assert found.information.std() > 1e-3, "nothing to be wrong about"
        for n, layer in enumerate(layers):
            nothing = by_hand(model, sample, layer, {})
            expected = [
                float(by_hand(model, sample, layer, {picture: cell})[sample.answer[0]] - nothing[sample.answer[0]])
                for picture, cell in cells
            ]
            np.testing.assert_allclose(found.information[n], expected, atol=2e-5)
            assert found.text[n] == pytest.approx(float(nothing[sample.answer[0]]), abs=1e-5)
            divergence = float((full * (full / nothing).log()).sum())
            assert found.divergence[n] == pytest.approx(divergence, abs=1e-4)
        assert found.blind == found.divergence[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_later_tokens_follow_the_right_ones(family):
    """Token by token behind the answer's own beginning; groups side by side, divergences added."""
    model = shared(family)
    one = Sample(make_single(family, model, [["text3", "image", "text5"]], 0), (40, 71, 12))
    shares = []
    found, _ = horizon.measure(model, one, [2], 2, answer_tokens=2, tick=shares.append)
    assert sum(shares) == pytest.approx(1)
    ids = torch.cat((one.inputs["input_ids"], torch.tensor([[40]])), dim=1)
    keep = {2: ~image_columns(model, ids)}
    extra = torch.tensor([[40]])
    full = masked_logits(model, one.inputs, {}, extra)[0, -2:].softmax(-1)
    nothing = masked_logits(model, one.inputs, keep, extra)[0, -2:].softmax(-1)
    assert found.full == pytest.approx(float(full[0, 40] * full[1, 71]), abs=1e-5)
    assert found.text == pytest.approx([float(nothing[0, 40] * nothing[1, 71])], abs=1e-5)
    assert found.divergence == pytest.approx([float((full * (full / nothing).log()).sum())], abs=1e-4)
    assert (found.tokens, found.unseen) == (2, 1)
    first, second = found.information[:, :4], found.information[:, 4:]
    np.testing.assert_allclose(first, horizon.measure(model, one, [2], 2)[0].information, atol=1e-6)
    keep[2][0, visual_columns(model, one.inputs, 0, 0)[windows_by_hand(4, 4, 2)[3]]] = True
    kept = masked_logits(model, one.inputs, keep, extra)[0, -1].softmax(-1)
    assert second[0, 3] == pytest.approx(float(kept[71] - nothing[1, 71]), abs=2e-5)
    assert "1 answers are longer" in markdown(estimate([found], LAYERS, [2]))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_single_tokens_of_other_families(family):
    """LLaVA-NeXT's row separators have seen the picture: they go with the visual tokens."""
    model = shared(family)
    sample = Sample(make_single(family, model, [["text3", "image", "text5"]], 0), (40,))
    found, _ = horizon.measure(model, sample, [3], window=1)
    size = found.visual
    assert size == len(visual_columns(model, sample.inputs, 0, 0))
    nothing = by_hand(model, sample, 3, {})
    expected = [float((by_hand(model, sample, 3, {0: [token]}) - nothing)[40]) for token in range(size)]
    np.testing.assert_allclose(found.information, [expected], atol=2e-5)
    assert found.information.std() > 1e-4
    if family == "llava_next":  # windows lie within the base view or a crop, and cover every token once
        found, _ = horizon.measure(model, sample, [3], window=2)
        groups = [tokens.tolist() for _, tokens in horizon_groups.groups(model.config, sample.inputs, [size], 2)]
        assert sorted(token for tokens in groups for token in tokens) == list(range(size))
        assert max(map(len, groups)) == 4
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        assert all(max(tokens) < side**2 or min(tokens) >= side**2 for tokens in groups)
        expected = [float((by_hand(model, sample, 3, {0: tokens}) - nothing)[40]) for tokens in groups]
        np.testing.assert_allclose(found.information, [expected], atol=2e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_chunk_size_does_not_matter(family):
    model = shared(family)
    (sample, _) = samples(family, model, PROMPTS[family])
    whole, small = (horizon.measure(model, sample, [1], 1, chunk)[0] for chunk in (64, 3))
    assert whole.information.shape == (1, 16)
    np.testing.assert_allclose(whole.information, small.information, atol=1e-5)


def test_samples_have_their_own_answers_and_layers_may_be_chosen():
    model = shared("qwen2_5_vl")
    both = samples("qwen2_5_vl", model, PROMPTS["qwen2_5_vl"])
    shares = []
    found = find_horizon(model, both, [LAYERS - 1, 3], tick=shares.append)
    assert found.layers == (3, LAYERS - 1)
    assert [sample.visual for sample in found.samples] == [16, 24]
    assert sum(shares) == pytest.approx(2)
    for sample, own in zip(both, found.samples, strict=True):
        alone, _ = horizon.measure(model, sample, [3, LAYERS - 1])
        np.testing.assert_allclose(own.information, alone.information, atol=1e-6)
        assert own.blind != own.divergence[0]  # the reference is at layer 0, which was not asked for


def test_leaves_model_and_random_state_as_they_were():
    model = shared("llava")
    (sample, _) = samples("llava", model, PROMPTS["llava"])
    before = masked_logits(model, sample.inputs, {})
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    find_horizon(model, [sample], [1])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(masked_logits(model, sample.inputs, {}), before)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_windows_cover_odd_grids():
    assert [window.tolist() for window in horizon_groups.windows(3, 3, 2)] == [[0, 1, 3, 4], [2, 5], [6, 7], [8]]
    assert len(horizon_groups.windows(24, 24, 2)) == 144  # as in the official code


# -- the horizon of known curves ---------------------------------------------------------------------------------------------


def planted(heights, samples=30, jitter=0.0, divergence=None):
    """Samples whose largest |I| per layer are `heights`; one group among four is informative, in either direction."""
    random = np.random.default_rng(1)
    made = []
    for number in range(samples):
        information = np.zeros((len(heights), 4))
        scale = 1 + jitter * random.standard_normal()
        information[:, number % 4] = np.array(heights) * scale * (-1 if number % 2 else 1)
        kl = tuple(np.array(divergence or heights) * abs(scale))
        made.append(SampleCurves(str(number), 576, 0.9, (0.1,) * len(heights), information, kl, blind=kl[0]))
    return made


def test_planted_horizon_is_found():
    found = estimate(planted([0.8, 0.9, 0.5, 0.06, 0.044, 0.01], jitter=0.3), 6, range(6))
    assert found.metric.horizon == 4  # 5 % of 0.9 is 0.045
    assert found.metric.interval[0] <= 4 <= found.metric.interval[1]
    assert found.proxy.horizon == 5  # 5 % of layer 0 is 0.04
    assert found.safe == found.proxy.interval[1] == 5
    assert found.metric.threshold == pytest.approx(0.05 * max(found.metric.value))
    assert found.proxy.value[0] == pytest.approx(1)
    for low, value, high in zip(found.metric.low, found.metric.value, found.metric.high, strict=True):
        assert low < value < high


def test_a_dip_is_no_horizon():
    found = estimate(planted([0.8, 0.01, 0.7, 0.01]), 4, range(4))
    assert found.metric.horizon == found.proxy.horizon == 3


def test_signs_do_not_cancel():
    """Half of the samples have negative information: its mean is zero, its size is not."""
    found = estimate(planted([0.5, 0.5, 0.5]), 3, range(3))
    assert abs(found.mean[0]) < 1e-9
    assert found.metric.value == pytest.approx((0.5, 0.5, 0.5))
    assert found.spread == pytest.approx((np.std([0.5, 0, 0, 0]),) * 3)
    assert found.metric.horizon is None
    assert found.safe is None
    assert found.compositions() == []
    assert "no deep random stage" in markdown(found)


def test_few_samples_that_disagree_give_a_wide_interval():
    loud, quiet = planted([0.9, 0.9, 0.9, 0.0], samples=1), planted([0.9, 0.0, 0.0, 0.0], samples=30)
    found = estimate([*loud, *quiet], 4, range(4))
    assert found.metric.horizon == 1  # 0.9 / 31 is below 5 %
    assert found.metric.interval == (1, 3)
    assert found.safe == 3


def test_pictures_that_never_mattered():
    found = estimate(planted([0.0, 0.0]), 2, range(2))
    assert found.metric.horizon == found.proxy.horizon == found.safe == 0
    assert found.proxy.value == (0, 0)
    assert "do not matter" in markdown(found)
    assert found.compositions() == []


def test_measured_layers_are_named_by_their_number():
    found = estimate(planted([0.9, 0.9, 0.001]), 32, [4, 12, 20])
    assert found.metric.horizon == 20
    assert found.compositions((1 / 3, 1 / 9))[0].recipe == "divprune:tokens=284 + random:layer=20,tokens=38"


# -- budgets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuts", "average"),
    [
        ({0: 284, 20: 38}, 191.8),
        ({0: 96, 20: 10}, 63.8),
        ({2: 252, 20: 38}, 192.0),
        ({1: 60, 20: 27}, 63.8),
        ({0: 284, 20: 0}, 177.5),
        ({0: 98, 21: 0}, 64.3),
        ({2: 260, 21: 0}, 190.4),
        ({1: 60, 26: 0}, 64.9),
    ],
    ids=str,
)
def test_compute_average_of_published_schedules(cuts, average):
    assert compute_average(576, 32, cuts) == pytest.approx(average, abs=0.051)


def test_nominal_average_counts_what_leaves():
    assert nominal_average(576, 32, {2: 290, 11: 72, 21: 18}) == pytest.approx(128.8, abs=0.051)
    assert compute_average(576, 32, {2: 290, 11: 72, 21: 18}) == pytest.approx(146.3, abs=0.051)


def test_averages_equal_the_report():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["image", "text3"]])
    with vp.wrap(model, "divprune:layer=1,tokens=9 + random:layer=4,tokens=2") as run, torch.no_grad():
        model(**inputs)
    cuts = {1: 9, 4: 2}
    assert run.report().visual_compute_average == pytest.approx(compute_average(16, LAYERS, cuts))
    assert run.report().visual_nominal_average == pytest.approx(nominal_average(16, LAYERS, cuts))
    assert nominal_average(16, LAYERS, {0: 8, 1: 4}) == 4  # layer 0 puts out what layer 1 takes in


@pytest.mark.parametrize("average", [20, 64, 192, 400])
def test_compositions_meet_their_budget(average):
    made = compose(576, 32, 20, average)
    assert made.compute_average == pytest.approx(average, abs=1)
    assert len(vp.Recipe.parse(made.recipe).cuts()) == 2
    shares = compose(576, 32, 20, average, "fraction")
    assert shares.compute_average == pytest.approx(average, abs=1e-9)
    first, deep = (stage.budget.fraction for stage, _ in vp.Recipe.parse(shares.recipe).cuts())
    assert 576 * (20 * first + 12 * deep) / 32 == pytest.approx(average, abs=0.1)


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_refusals():
    model = shared("llava")
    (sample, other) = samples("llava", model, PROMPTS["llava"])
    batch = Sample(make_inputs("llava", model, PROMPTS["llava"]), (9,))
    padded = Sample({**sample.inputs, "attention_mask": torch.zeros_like(sample.inputs["attention_mask"])}, (9,))
    for bad, arguments, sentence in (
        ([], {}, "no sample to measure"),
        ([Sample(sample.inputs, name="x.png")], {}, "needs the right answer of every question: x.png has none"),
        ([batch], {}, "one prompt without padding, found 2"),
        ([padded], {}, "one prompt without padding"),
        ([sample], {"layers": [LAYERS]}, f"--layer {LAYERS}: the model has layers 0 to {LAYERS - 1}"),
        ([sample], {"layers": [0, -1]}, f"--layer -1: the model has layers 0 to {LAYERS - 1}"),
        ([sample], {"layers": []}, "no layer to measure"),
        ([sample], {"window": 0}, "must be at least 1"),
        ([sample], {"answer_tokens": 0}, "must be at least 1"),
    ):
        with pytest.raises(vp.UsageError, match=sentence.replace("(", r"\(")):
            find_horizon(model, bad, **arguments)
    with pytest.raises(vp.UsageError, match=r"here 17.* are no grids"):
        horizon_groups.groups(model.config, other.inputs, [17], 2)
    only = Only(layer=LAYERS, fraction=1.0, rows=(None,), visual=(16,))
    with pytest.raises(vp.UsageError, match=r"prunes at layer \d+, .*: choose among them\.$"):  # and proposes no method of ours
        vp.wrap(model, only)
    assert len(horizon_groups.groups(model.config, other.inputs, [17], 1)) == 17


def asked(answer):
    return Question("1", (), "?", (answer,))


def test_tokens_of_an_answer():
    tokenizer = tiny.load()[1].tokenizer
    ask = tiny.prompt("is there a red star ?")
    yes, top, left = tokenizer("yes top left")["input_ids"][-3:]
    assert calibration.answer_tokens(tokenizer, ask, asked("yes")) == (yes,)
    assert calibration.answer_tokens(tokenizer, ask, asked("top left")) == (top, left)
    assert calibration.answer_tokens(tokenizer, ask + " top", asked("left")) == (left,)
    for answer in ("aubergine", " "):
        with pytest.raises(vp.UsageError, match="no token for the answer"):
            calibration.answer_tokens(tokenizer, ask, asked(answer))


class Letters:
    """A tokenizer of single letters, with a token before and behind the text."""

    unk_token_id = None

    def __call__(self, text):
        return {"input_ids": [0, *map(ord, text), 1]}


def test_answer_follows_white_space_or_brings_it():
    assert calibration.answer_tokens(Letters(), "A:", asked("yes")) == (*map(ord, " yes"),)
    assert calibration.answer_tokens(Letters(), "A\n", asked("yes")) == (*map(ord, "yes"),)


# -- on the command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A folder with two questions about one scene."""
    scene = calibration.scenes(1)[0]
    scene.images[0].save(tmp_path / "scene.png")
    lines = [{"image": "scene.png", "question": scene.text, "answer": scene.answers[0]}] * 2
    (tmp_path / "questions.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_command(monkeypatch, capsys, data, tmp_path):
    out = tmp_path / "out"
    assert vlmprune(monkeypatch, "horizon", "--images", 2, "--window", 6, "--layer", 0, "--layer", 7, "--out", out) == 0
    assert "Horizon by the information metric: layer 7" in capsys.readouterr().out
    numbers = json.loads((out / "horizon.json").read_text())
    assert numbers["layers"] == [0, 7]
    assert len(numbers["samples"]) == 2
    assert numbers["recipes"][0]["recipe"].startswith("divprune:tokens=")
    table = [line for line in (out / "horizon.md").read_text().splitlines() if line.startswith("|")]
    assert table[-1].startswith("| 7 |")
    assert {line.count("|") for line in table} == {6}
    assert Image.open(out / "horizon.png").width > 500

    assert len(open_questions(data, 1)) == 1
    assert {question.answers for question in open_questions(data, needs=("image",))} == {()}  # may be in other words
    assert vlmprune(monkeypatch, "horizon", "--data", data, "--window", 12, "--layer", 7, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    first, second = result["samples"]
    assert (first["name"], second["name"]) == ("1 scene.png", "3 scene.png")
    assert first["full"] > 0.9
    assert first["largest"] == second["largest"]


GOOD = '{"image": "scene.png", "question": "is there a red star ?", "answer": "yes"}'


@pytest.mark.parametrize(
    ("questions", "sentence"),
    [
        (None, "holds no questions.jsonl"),
        ("\n", "holds no questions: write one JSON object per line"),
        (f"{GOOD}\n{{", "questions.jsonl line 2 is no JSON"),
        ("[1]", "questions.jsonl line 1 is no JSON object"),
        ('{"image": "scene.png", "question": "x"}', "line 1 needs a text as 'answer': found only image, question"),
        ('{"image": "scene.png", "question": "", "answer": "yes"}', "line 1 needs a text as 'question': found ''"),
        ('{"image": "scene.png", "question": "x", "answer": 4}', "line 1 needs a text as 'answer': found 4"),
        ("{}", "line 1 needs a text as 'image': found only an empty object"),
        (GOOD.replace("scene", "gone"), "question 1 gone.png: there is no picture at"),
        (GOOD + "\n" + GOOD.replace("scene.png", "questions.jsonl"), "is not a picture that can be read"),
        (GOOD + "\n" + GOOD.replace("yes", "aubergine"), "no token for the answer 'aubergine' (2 scene.png)"),
        (b"\xff\xfe\xfd", "cannot be read as UTF-8 text"),
    ],
    ids=str,
)
def test_bad_questions(monkeypatch, capsys, data, questions, sentence):
    """Refused before anything is computed, wherever the bad line stands."""
    monkeypatch.setattr(horizon, "measure", None)
    path = data / "questions.jsonl"
    if questions is None:
        path.unlink()
    else:
        path.write_bytes(questions if isinstance(questions, bytes) else questions.encode())
    assert vlmprune(monkeypatch, "horizon", "--data", data) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("horizon", "--data", "nowhere"), "there is no folder nowhere"),
        (("horizon", "--model", "nowhere"), "the built-in scenes are for the embedded model: give --data"),
        (("horizon", "--images", 2, "--layer", 8), "--layer 8: the model has layers 0 to 7"),
        (("horizon", "--device", "zzz"), "cannot use device 'zzz'"),
        (("tune", "--method", "fastv", "--fraction", 0.5), "the methods that can be tuned are: adaptinfer; found 'fastv'"),
        (("tune", "--method", "adaptinfer", "--fraction", 0.5, "--tokens", 9), "found both"),
        (("tune", "--method", "adaptinfer", "--fraction", 1.5), "fraction must lie in [0, 1]"),
        (("tune", "--method", "adaptinfer", "--images", 2, "--tokens", 3), "an average of 3 visual tokens cannot be reached"),
        (("tune", "--method", "adaptinfer", "--tokens", 9, "--data", "nowhere"), "there is no folder nowhere"),
        (("tune", "--method", "adaptinfer", "--tokens", 9, "--out", "/dev/null/x"), "cannot write to /dev/null/x"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_mistakes(monkeypatch, capsys, arguments, sentence):
    assert vlmprune(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
