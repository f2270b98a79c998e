"""Speed runs: the un-pruned model and every recipe in the same rounds, what is counted is right, the model is left alone."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import vlmprune as command
from PIL import Image
from rich.console import Console
from tiny_models import make_inputs, shared

import vlmprune as vp
from vlmprune.cli import terminal
from vlmprune.evals import bench, bench_report
from vlmprune.evals.bench_counts import count_flops, peak_bytes
from vlmprune.evals.random_models import SHAPES


def test_every_recipe_is_measured_beside_the_unpruned_model():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"], ["text5", "image", "text4"]])
    with torch.no_grad():
        before = model(**inputs).logits
    ticks: list[int] = []
    recipes = ["cls:layer=0,tokens=4", "fastv:layer=2,tokens=4"]
    whole, *pruned = bench.measure(model, inputs, recipes, rounds=3, new_tokens=3, tick=lambda: ticks.append(1))
    assert len(ticks) == 4 * 3  # a round that counts and three that measure, of three each
    assert whole.recipe == bench.UNPRUNED
    assert whole.ideal == whole.ideal_prefill == 1
    assert whole.visual == 16
    assert not whole.overhead
    assert all(ratio == bench.Ratio(1, 1, 1) for ratio in whole.faster.values())
    assert [row.recipe for row in pruned] == recipes
    for row in (whole, *pruned):
        assert (row.batch, row.rounds, row.new_tokens, row.prompt) == (2, 3, 3, 25)
        assert set(row.times) == set(row.faster) == set(bench.PHASES)
        assert all(0 < time.low <= time.ms <= time.high for time in row.times.values())
        assert row.times["ttft"].low < row.times["e2e"].high
    for row in pruned:
        assert row.visual == 4
        assert row.achieved == row.faster["ttft"].times / row.ideal
        assert 0 < row.overhead_share < 1
    first, late = pruned
    assert first.flops < late.flops < whole.flops  # a cut at layer 0 saves more than one at layer 2
    assert first.kv_bytes < late.kv_bytes < whole.kv_bytes
    assert first.peak_bytes < whole.peak_bytes
    assert set(first.overhead) == {"inside the vision tower", "what the tower saw", "layer 0"}
    assert set(late.overhead) == {"attention in layer 1", "layer 2"}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_rounds_begin_one_further_on(monkeypatch):
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    order, run = [], bench._run

    def noted(model, inputs, name, new_tokens):
        order.append(name)
        return run(model, inputs, name, new_tokens)

    monkeypatch.setattr(bench, "_run", noted)
    names = [bench.UNPRUNED, "random:tokens=4", "uniform:tokens=4"]
    rows = bench.measure(model, inputs, names[1:], rounds=4, new_tokens=1)
    assert [row.recipe for row in rows] == names
    plain, random, uniform = names
    assert order == [plain, random, uniform, random, uniform, plain, uniform, plain, random, plain, random, uniform]


def test_enough_is_asked_from_the_third_round_on():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    asked: list[int] = []

    def enough() -> bool:
        asked.append(1)
        return len(asked) == 2

    rows = bench.measure(model, inputs, ["random:tokens=4"], rounds=7, new_tokens=1, enough=enough)
    assert [row.rounds for row in rows] == [4, 4]


def test_cache_bytes_are_those_after_prefill():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    (whole, pruned) = bench.measure(model, inputs, ["fastv:layer=2,tokens=4"], rounds=3, new_tokens=4)
    with torch.no_grad(), vp.wrap(model, "fastv:layer=2,tokens=4") as run:
        model.generate(**inputs, max_new_tokens=1)
    assert pruned.kv_bytes == run.report().kv_bytes
    assert whole.kv_bytes == run.report().kv_bytes_unpruned
    assert pruned.ideal_prefill == run.report().flops_unpruned / run.report().flops


def test_one_token_has_no_decoding():
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text5", "image", "text4"]])
    for row in bench.measure(model, inputs, ["random:tokens=4"], rounds=3, new_tokens=1):
        assert "tpot" not in row.times
        assert bench_report.cells(row)[5] == "—"


def test_flops_of_attention_are_counted():
    query, key = torch.randn(2, 4, 10, 16), torch.randn(2, 4, 12, 16)
    flops = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key))
    assert flops == 2 * 2 * (2 * 4 * 10 * 12 * 16)


def test_peak_is_what_exists_at_one_time():
    def work():
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB with the first
        del first, second
        torch.ones(500, 1000)  # 2 MB

    assert 8e6 <= peak_bytes(work, torch.device("cpu")) < 8.1e6


def test_ratio_is_taken_within_rounds():
    ratio = bench.Ratio.of([10, 100, 1000], [5, 25, 1000])
    assert ratio.times == 2
    assert 1 <= ratio.low <= 2 <= ratio.high <= 4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_shapes_are_the_published_ones(shape):
    """Parameter counts of the checkpoints, and prompts with as many visual tokens as the papers have."""
    with torch.device("meta"):
        model = shape.kind(shape.config(1))
    assert sum(weight.numel() for weight in model.parameters()) == shape.parameters
    assert model.config.text_config.hidden_size // model.config.text_config.num_attention_heads == 128


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_reduced_shapes_run_their_recipes(shape):
    model = shape.build(dtype=torch.bfloat16, reduce=8)
    assert model.dtype == torch.bfloat16
    inputs = shape.inputs(model, 2)
    assert not torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
    with torch.inference_mode(), vp.wrap(model, shape.recipes[1]) as run:
        model.generate(**inputs, max_new_tokens=1)
    assert run.report().visual_tokens == 2 * shape.visual
    assert run.report().stages[-1].kept == (int(shape.recipes[1].partition("=")[2]),) * 2


def test_command(monkeypatch, capsys, tmp_path):
    arguments = ("bench", "--recipe", "random:tokens=64", "--rounds", 3, "--new-tokens", 2, "--device", "cpu")
    assert command(monkeypatch, *arguments, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "llava-1.5-7b, widths / 8, 8 layers, 576 visual tokens, float32, cpu" in " ".join(out.split())
    assert "TTFT" in out
    numbers = json.loads((tmp_path / "bench.json").read_text())
    assert [row["recipe"] for row in numbers["rows"]] == [bench.UNPRUNED, "random:tokens=64"]
    assert "| `random:tokens=64` | 1 |" in (tmp_path / "bench.md").read_text()
    assert Image.open(tmp_path / "bench.png").width > 500


def test_table_on_a_narrow_terminal(monkeypatch, capsys):
    """Every figure whole, on a line of its own, inside a box of whole lines."""
    monkeypatch.setattr(terminal, "console", Console(width=80))
    recipe = "random:layer=2,tokens=300 + random:layer=4,tokens=64 + var:sink_dims=cosine,p=0.6"
    assert command(monkeypatch, "bench", "--recipe", recipe, "--rounds", 3, "--new-tokens", 2, "--device", "cpu") == 0
    table = capsys.readouterr().out.partition("Share of vlmprune")[0].splitlines()
    box = [line for line in table if line[:1] in "┏┃┡│├└"]
    assert len({len(line) for line in box}) == 1
    assert len(box[0]) <= 80
    cards = [line.split("│")[2].strip() for line in box if line.startswith("│")]
    figures = [line for line in cards if line]
    assert len(figures) == 2 * (len(bench_report.COLUMNS) - 1)
    for name, line in zip(2 * bench_report.COLUMNS[1:], figures, strict=True):
        assert line.startswith(f"{name} ")
        assert "…" not in line
    shown = "".join(line.split("│")[1].strip() for line in box if line.startswith("│"))
    assert recipe.replace(" ", "") in shown.replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--shape", "llava-1.5-8b"), "unknown shape 'llava-1.5-8b': did you mean 'llava-1.5-7b'"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--device", "zzz"), "cannot use device 'zzz'"),
        (("--reduce", "3"), "a shape can be reduced by 1, 2, 4, 8, 16, found 3"),
        (("--recipe", "fastv:layer=20,tokens=3"), "fastv prunes at layer 20, but the model has layers 0 to 7"),
    ],
)
def test_mistakes(monkeypatch, capsys, arguments, sentence):
    assert command(monkeypatch, "bench", "--device", "cpu", *arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
