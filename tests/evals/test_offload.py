"""Models whose weights accelerate moves: everything in this package that makes inputs puts them where the model computes."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import ModelHook as Hook
from accelerate.hooks import SequentialHook, add_hook_to_module
from folders import llava

import vlmprune as vp
from vlmprune import tiny
from vlmprune.device import execution_device
from vlmprune.errors import UsageError
from vlmprune.evals import bench, calibration, horizon, random_models, tune
from vlmprune.evals.fingerprints import weights_fingerprint
from vlmprune.loading.models import load_model
from vlmprune.loading.questions import open_question
from vlmprune.schedule import Budget
from vlmprune.tiny.evaluate import records
from vlmprune.tiny.scenes import held_out


@pytest.fixture(scope="module")
def pair():
    """The embedded model, and the same with its weights offloaded; their processor."""
    (plain, processor), (moved, _) = tiny.load(), tiny.load()
    cpu_offload(moved, execution_device=torch.device("cpu"))
    assert moved.device.type == "meta"
    return plain, moved, processor


def test_the_device_of_the_embedding_counts(pair):
    plain, moved, _ = pair
    assert execution_device(moved) == torch.device("cpu")
    assert execution_device(plain) == plain.device
    add_hook_to_module(plain.get_input_embeddings(), Hook())  # accelerate's hook without a device
    assert execution_device(plain) == plain.device
    again, _ = tiny.load()
    cpu_offload(again, execution_device=torch.device("cpu"))
    add_hook_to_module(again.get_input_embeddings(), Hook(), append=True)
    assert isinstance(again.get_input_embeddings()._hf_hook, SequentialHook)
    assert execution_device(again) == torch.device("cpu")
    assert execution_device(type("Other", (), {"device": torch.device("cpu")})()) == torch.device("cpu")


def test_answers_of_the_embedded_model(pair):
    plain, moved, processor = pair
    for recipe in (None, "divprune:fraction=0.25"):
        given = []
        for model in (plain, moved):
            run = vp.wrap(model, recipe) if recipe else None
            given.append(records(model, processor, held_out(2)))
            if run:
                run.remove()
        assert given[0] == given[1]


def test_other_weights_are_other_weights(pair, tmp_path):
    """Red: offloaded weights counted by their shapes, so that a store went on with the answers of another model."""
    plain, moved, _ = pair
    assert weights_fingerprint(moved) == weights_fingerprint(plain)
    other, _ = tiny.load()
    with torch.no_grad():
        other.get_output_embeddings().weight.add_(0.01)
    wanted = weights_fingerprint(other)
    disk_offload(other, tmp_path, execution_device=torch.device("cpu"))
    assert other.device.type == "meta"
    assert weights_fingerprint(other) == wanted != weights_fingerprint(plain)


def test_horizon_and_tune(pair):
    """Red: samples are made for the device that the command line names, and not for the model's."""
    plain, moved, processor = pair
    make = calibration.samples(processor, calibration.scenes(2))
    found = [horizon.find_horizon(model, make(model), [2, 6], 6).to_dict() for model in (plain, moved)]
    assert found[0] == found[1]
    tuned = [tune.tune(model, make(model), Budget(fraction=0.5)).to_dict() for model in (plain, moved)]
    assert tuned[0] == tuned[1]


def test_inputs_of_random_models(pair):
    _, moved, _ = pair
    made = random_models.SHAPES["llava-1.5-7b"].inputs(moved, 1)
    assert {tensor.device for tensor in made.values()} == {torch.device("cpu")}


def test_a_device_map(tmp_path):
    """A folder, and the embedded model, spread as accelerate decides; here there is one device."""
    folder = llava(tmp_path / "model")
    plain, _ = load_model(str(folder), "cpu")
    spread, _ = load_model(str(folder), "cpu", "auto")
    assert all(map(torch.equal, plain.state_dict().values(), spread.state_dict().values()))
    (scene,) = held_out(1)
    scene.image.save(tmp_path / "a.png")
    given = []
    for device_map in (None, "auto"):
        question = open_question("tiny", tmp_path / "a.png", "what is the number ?", "cpu", device_map=device_map)
        assert question.model.dtype == torch.float32
        with torch.inference_mode():
            given.append(question.model.generate(**question.inputs, max_new_tokens=3, do_sample=False))
    assert torch.equal(*given)


@pytest.mark.parametrize(
    ("device", "device_map", "sentence"),
    [
        ("cpu", "atuo", "unknown device map 'atuo': did you mean 'auto'?"),
        ("cpu:0", "auto", "found device 'cpu:0' and device map 'auto', which says where the model goes: give one."),
    ],
)
def test_device_maps_that_are_refused(device, device_map, sentence):
    with pytest.raises(UsageError) as refusal:
        load_model("tiny", device, device_map)
    assert str(refusal.value) == sentence


def test_bench(pair):
    """Red: it waits for, or counts on, the device that the weights have."""
    _, moved, processor = pair
    (scene,) = held_out(1)
    inputs = processor(images=scene.image, text=tiny.prompt("what is the number ?"), return_tensors="pt")
    plain, pruned = bench.measure(moved, inputs, ["divprune:fraction=0.25"], rounds=1, new_tokens=2)
    assert pruned.visual == 36
    assert pruned.peak_bytes > 0
    assert plain.flops > pruned.flops
