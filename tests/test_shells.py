"""What other libraries put around a model is looked through; what is no model is told so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_models import build, make_inputs
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration

import vlmprune as vp

RECIPE = "divprune:layer=0,fraction=0.5"


class Peft(nn.Module):
    """The shape of PEFT's outer shell: the model is two modules further in, and attributes are its own."""

    def __init__(self, model, learned_prompt=False):
        super().__init__()
        self.base_model = Tuner(model)
        self.active_peft_config = SimpleNamespace(is_prompt_learning=learned_prompt)

    def get_base_model(self):
        return self.base_model.model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.model.generate(*args, **kwargs)


class Tuner(nn.Module):
    """The shape of PEFT's inner shell."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def inject_adapter(self):
        raise NotImplementedError

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Engine(nn.Module):
    """The shape of DeepSpeed's engine: a config that is not the model's."""

    def __init__(self, model):
        super().__init__()
        self.module, self.config = model, {"zero": 1}

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


SHELLS = {
    "peft": Peft,
    "peft's tuner": Tuner,
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "engine": Engine,
    "engine of compiled of peft": lambda model: Engine(torch.compile(Peft(model), backend="eager")),
    "data parallel of peft": lambda model: nn.DataParallel(Peft(model)),
}


@pytest.fixture(params=SHELLS)
def around(request, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    return SHELLS[request.param]


@torch.no_grad()
def test_calls_through_a_shell_are_pruned(around):
    """Red: PEFT ended in an AttributeError, all others in a sentence about families."""
    model = build("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text5"], ["image", "text9"]])
    stock = model(**inputs).logits
    with vp.wrap(model, RECIPE) as run:
        expected = model(**inputs).logits
    shell = around(model)
    with vp.wrap(shell, RECIPE) as run:
        assert run.model is model
        assert torch.equal(shell(**inputs).logits, expected)
        assert run.report().stages[0].kept == (8, 8)
        if hasattr(shell, "generate"):
            shell.generate(**inputs, max_new_tokens=2)
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(shell(**inputs).logits, stock)
    assert not torch.equal(expected, stock)


def test_wrapping_through_another_shell_replaces():
    model = build("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text5"]])
    first = vp.wrap(Peft(model), RECIPE)
    with vp.wrap(nn.DataParallel(model), "divprune:layer=0,tokens=3") as run, torch.no_grad():
        model(**inputs)
        assert first.last is None
        assert run.report().stages[0].kept == (3,)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed_shells(one_process, kind):
    """Gradients go through the shell, too."""
    model, alone = build("llava"), build("llava")
    inputs = make_inputs("llava", model, [["text2", "image", "text5"]])
    with vp.wrap(alone, RECIPE):
        expected = alone(**inputs).logits
    expected.sum().backward()
    if kind == "ddp":
        shell = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel

        shell = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with vp.wrap(shell, RECIPE) as run:
        answer = shell(**inputs).logits
        assert run.report().stages[0].kept == (8,)
        answer.sum().backward()
    torch.testing.assert_close(answer, expected, atol=5e-5, rtol=0)
    if kind == "ddp":
        for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def refused(given, *sentences):
    with pytest.raises(vp.UsageError) as error:
        vp.wrap(given, RECIPE)
    for sentence in sentences:
        assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_copies_on_several_devices():
    shell = nn.DataParallel(build("llava"))
    shell.device_ids = [0, 1]
    refused(shell, "DataParallel copies the model to 2 devices", "DistributedDataParallel, or device_ids=[0]")


def test_learned_prompts():
    refused(Peft(build("llava"), learned_prompt=True), "Peft puts learned tokens before the prompt", "such as LoRA")


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        (None, ["found None: load one"]),
        ("llava-hf/llava-1.5-7b-hf", ["found the name 'llava-hf/llava-1.5-7b-hf': load one", "from_pretrained"]),
        (
            LlavaForConditionalGeneration,
            ["found the class LlavaForConditionalGeneration: pass LlavaForConditionalGeneration.from_"],
        ),
        (dict, ["found the class dict: pass an instance"]),
        (3, ["found an int"]),
        (SimpleNamespace(tokenizer=None), ["found a SimpleNamespace: load one"]),
        (SimpleNamespace(model=nn.Linear(2, 2)), ["found a SimpleNamespace: pass the model in it, its attribute .model"]),
        (
            nn.Linear(2, 2),
            ["found a Linear, which has no config.model_type", "no image tower of timm or open_clip", "load one"],
        ),
        (SimpleNamespace(image_processor=3), ["found a SimpleNamespace, which prepares the inputs of a model: pass the model"]),
        (
            CLIPImageProcessor(),
            ["found a CLIPImageProcessor", "which prepares the inputs of a model: pass the model itself; load"],
        ),
        (LlavaConfig(), ["found a LlavaConfig, which describes a model and has no weights: load one"]),
        (build, ["found the function build: call it, and pass the model that it returns"]),
        ([], ["found a list of 0, with no model in it: load one"]),
        ([nn.Linear(2, 2), nn.Linear(2, 2)], ["found a list of 2, with 2 models: wrap each of them, one call per model"]),
        ((nn.Linear(2, 2), "a processor"), ["found a tuple of 2, one of which is a model (Linear): pass that one"]),
        (nn.Linear(2, 2).state_dict(), ["found an OrderedDict of 2 tensors, which are weights without a model: load one"]),
        ({"model": None}, ["found a dict of 1, with no model in it: load one"]),
    ],
    ids=lambda value: type(value).__name__,  # the same in every process
)
def test_what_is_no_model(given, sentences):
    refused(given, "expected a ", *sentences)


def test_a_pipeline_is_no_model():
    """Red: a pipeline is called a processor, because it holds one."""
    pipe = SimpleNamespace(model=nn.Linear(2, 2), tokenizer=3, image_processor=3)
    refused(pipe, "found a SimpleNamespace: pass the model in it, its attribute .model")


def test_a_run_is_no_model():
    with vp.wrap(build("llava"), RECIPE) as run:
        refused(run, "found a Run: pass the model in it, its attribute .model")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_text_only_models(kind):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes, num_key_value_heads=1))
    refused(model, f"(model_type {kind!r}), which has no vision tower, and so no visual tokens")


def test_parts_of_a_model():
    """A vision tower is none: it may stand alone (`tests/image_towers/`)."""
    refused(build("llava").model.language_model, "wrap the whole model")
    with vp.wrap(build("llava").model, RECIPE):
        pass  # the model without its head is a model
