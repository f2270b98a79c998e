"""How often our code waits for the device: once for the prompt, before the first layer, and never in a decoding step.

The models here are on torch's "meta" device, whose tensors have shapes and no values: whatever would wait for a GPU (an item, a
list, a truth value, a mask as an index, a copy to the host) raises. `layout.on_host` is the one door; the test stands there,
counts, and answers. A copy to the device waits as well, unless it is told not to: such copies are watched for.
"""

from __future__ import annotations

import sys

import families.table
import numpy as np
import pytest
import torch
from cases import ROWS
from oracles import Watch
from tiny_models import ALL_FAMILIES, build, make_inputs

import vlmprune as vp
import vlmprune.live.plan  # all that knows on_host, before it is replaced

SAMPLES = [["text3", "image", "text4"], ["text5", "image", "text2"]]


@pytest.fixture
def ask(monkeypatch):
    """Run a call on the meta device; returns its output and the shapes of what was read to the host."""
    import transformers.masking_utils

    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    monkeypatch.setattr(transformers.masking_utils, "fast_all", lambda mask: False, raising=False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch, "autocast", NoAutocast)
    reads: list[tuple[int, ...]] = []
    prompt: list[np.ndarray] = []

    def on_host(x: torch.Tensor) -> np.ndarray:
        assert x.is_meta
        reads.append(tuple(x.shape))
        if x.ndim == 3:
            return prompt[-1]
        # Flags: known to the memory, still there, nothing hidden (one axis); a row separator (two). Numbers: views.
        return np.full(tuple(x.shape), x.ndim == 1) if x.dtype == torch.bool else np.zeros(tuple(x.shape), dtype=int)

    for module in [
        module for name, module in sys.modules.items() if name.startswith("vlmprune") and hasattr(module, "on_host")
    ]:
        monkeypatch.setattr(module, "on_host", on_host)

    def run(model, inputs, **kwargs):
        reads.clear()
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
        prompt[:] = [np.stack((ids, mask[:, -ids.shape[1] :]))]
        given = {name: on_meta(value) for name, value in inputs.items()}
        with torch.no_grad(), Watch(refuse_copies_that_wait):
            output = model(**given, **kwargs, logits_to_keep=1)
        return output, list(reads)

    return run


def refuse_copies_that_wait(function, args, kwargs, out):
    copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    source = args[-1] if copies and isinstance(args[-1], torch.Tensor) else args[0] if copies else None
    if copies and out.is_meta and not source.is_meta and not kwargs.get("non_blocking"):
        raise AssertionError(f"a copy of {list(source.shape)} to the device waits for it")


def encode_beforehand(model, inputs):
    """The pictures of a Qwen model's call are encoded and its positions found, as `generate` and a processor do."""
    with torch.no_grad():
        pixels = {name: inputs.pop(name) for name in ("pixel_values", "image_grid_thw")}
        encoded = model.base_model.get_image_features(**pixels, return_dict=True)
        inputs["position_ids"] = model.base_model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs.pop("mm_token_type_ids"),
            image_grid_thw=pixels["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )[0]
    encoded.pooler_output = [features.to("meta") for features in encoded.pooler_output]
    if "deepstack_features" in encoded:
        encoded.deepstack_features = [[part.to("meta") for part in layer] for layer in encoded.deepstack_features]
    encoded.last_hidden_state = encoded.last_hidden_state.to("meta")
    inputs["mm_encoder_outputs"] = {"image": encoded}


class NoAutocast:
    """torch.autocast knows no meta device."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def on_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def model_and_inputs(family: str, samples=SAMPLES):
    """A model on the meta device. What Qwen's tower and its positions read from the grid stays on the host: pictures are
    encoded and positions found beforehand."""
    model = build(family)
    inputs = make_inputs(family, model, samples)
    if "image_sizes" in inputs:
        inputs["image_sizes"] = inputs["image_sizes"].tolist()
    if family.startswith("qwen"):
        encode_beforehand(model, inputs)
    return model.to("meta"), inputs


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.name != "pixelprune"], ids=lambda row: row.name)
def test_a_prompt_is_read_once(row, ask):
    """PixelPrune counts by the values of pixels, which the device here has not: see `tests/pixels/`."""
    model, inputs = model_and_inputs("llava")
    with vp.wrap(model, row.recipe(row.few)):
        _, reads = ask(model, inputs)
    assert reads[0] == (2, *inputs["input_ids"].shape)
    assert len(reads) == row.reads, reads


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(
    "recipe",
    [
        "random:layer=0,tokens=4",
        "fastv:layer=2,tokens=4 + random:layer=4,tokens=2",
        "divprune:tokens=4 + var:sink_dims=5|40,layers=3",
    ],
)
def test_families_and_compositions(family, recipe, ask):
    """LLaVA-NeXT reads once more, where its row separators are."""
    model, inputs = model_and_inputs(family)
    with vp.wrap(model, recipe):
        _, reads = ask(model, inputs)
    assert len(reads) == (2 if family == "llava_next" else 1), reads


@pytest.mark.parametrize(
    "recipe", ["random:layer=0,fraction=1.0", "random:layer=1,tokens=0", "fastv:layer=2,tokens=4,cache_layer=0"]
)
def test_everything_nothing_and_the_cache(recipe, ask):
    model, inputs = model_and_inputs("llava")
    with vp.wrap(model, recipe):
        _, reads = ask(model, inputs, use_cache=True)
    assert len(reads) == 1, reads


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("recipe", ["random:layer=0,tokens=4", "fastv:layer=2,tokens=4", "var:sink_dims=5|40,layers=1"])
def test_decoding(recipe, rows, ask):
    """One sample: nothing is read. A batch: whether a sample that has ended hides its token, which transformers asks, too."""
    model, inputs = model_and_inputs("llava", SAMPLES[:rows])
    with vp.wrap(model, recipe):
        prompt, _ = ask(model, inputs, use_cache=True)
        step = {
            "input_ids": torch.full((rows, 1), 20),
            "attention_mask": torch.ones(rows, inputs["input_ids"].shape[1] + 1, dtype=torch.long),
        }
        _, reads = ask(model, step, past_key_values=prompt.past_key_values)
    assert reads == [(2,)] * (rows > 1 and not recipe.startswith("var"))


def test_waiting_is_noticed(ask, monkeypatch):
    """The test itself: a method that looks at a value fails."""
    model, inputs = model_and_inputs("llava")
    waiting = vp.Random.select

    def select(self, see, keep):
        assert bool((see.position >= 0).all())
        return waiting(self, see, keep)

    monkeypatch.setattr(vp.Random, "select", select)
    with vp.wrap(model, "random:layer=0,tokens=4"), pytest.raises(RuntimeError, match="meta tensors"):
        ask(model, inputs)


@pytest.mark.parametrize("name", ["gemma3", "aya_vision", "paligemma"])
@pytest.mark.parametrize("recipe", ["random:layer=0,tokens=4", "random:layer=0|3,tokens=6|2"])
def test_windows_and_blocks(name, recipe, ask):
    """Beyond the window. Red: what left it is looked for among the entries, or a mask is asked what it shows. (The first stage
    is at layer 0: transformers' own cache layers of a window wait, and so do its masks of recurrent layers.)"""
    model = families.table.build(name)
    inputs = families.table.make_inputs(name, [["text8", "image", "text30"]])
    with torch.no_grad():
        pixels = {key: inputs.pop(key) for key in [*inputs] if key.startswith(("pixel", "image_grid", "spatial"))}
        encoded = model.base_model.get_image_features(**pixels, return_dict=True)
    encoded.pooler_output = [features.to("meta") for features in encoded.pooler_output]
    encoded.pooler_output = torch.stack(encoded.pooler_output)
    encoded.last_hidden_state = encoded.last_hidden_state.to("meta")
    length = inputs["input_ids"].shape[1]
    given = {**inputs, "mm_encoder_outputs": {"image": encoded}, "position_ids": torch.arange(length)[None]}
    model = model.to("meta")
    with vp.wrap(model, recipe):
        prompt, reads = ask(model, given, use_cache=True)
        assert len(reads) == 1, reads
        for more in (1, 2):
            step = {"input_ids": torch.full((1, 1), 20), "attention_mask": torch.ones(1, length + more, dtype=torch.long)}
            step["position_ids"] = torch.tensor([[length + more]])
            _, reads = ask(model, step, past_key_values=prompt.past_key_values)
            assert not reads


@pytest.mark.parametrize("recipe", ["random:layer=0,tokens=4", "random:layer=0,tokens=6 + random:layer=2,tokens=3"])
def test_a_prompt_with_injected_layers_is_read_once(recipe, ask):
    """Red: which rows get features is read to the host, or a mask is an index. (What the stock model itself adds waits: a stage
    before its first layer leaves it nothing to add.)"""
    model, inputs = (
        families.table.build("qwen3_vl"),
        families.table.make_inputs("qwen3_vl", families.table.BATCHES["ragged"][:2]),
    )
    encode_beforehand(model, inputs)
    model = model.to("meta")
    with vp.wrap(model, recipe):
        _, reads = ask(model, inputs)
    assert len(reads) == 1, reads
