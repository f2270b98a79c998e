"""The oldest transformers that is called supported is the one that `make test` runs the exactness core with."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from families.running import generate
from families.table import BATCHES, build, make_inputs

import vlmprune

ROOT = Path(vlmprune.__file__).resolve().parent.parent
PINNED = dict(line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if "==" in line)


def test_the_lower_bound_is_what_is_run():
    (bound,) = re.findall(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert PINNED["transformers"].startswith(f"{bound}.")


def test_the_makefile_runs_files_that_exist():
    (promises, others) = re.findall(r"^CORE := \$\(addprefix (.+)\) (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
    prefix, names = promises.split(",")
    files = [*(prefix + name for name in names.split()), *others.split()]
    assert "tests/promises/test_exact.py" in files
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.skipif("VLMPRUNE_OLDEST" not in os.environ, reason="`make test-oldest` sets it: the other environment")
def test_this_environment_is_the_oldest():
    assert transformers.__version__ == PINNED["transformers"]


# -- pictures that `generate` does not encode beforehand, as in Qwen3.5 before transformers knew that it takes them ------------


@pytest.fixture
def unencoded(monkeypatch):
    """A model, and its inputs."""
    model = build("qwen3_5")
    monkeypatch.setattr(type(model), "input_modalities", ("text",))
    return model, make_inputs("qwen3_5", BATCHES["one"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "named", "why"),
    [
        ({"use_cache": False}, "use_cache=False", "would choose anew each time"),
        ({"num_beams": 2}, "num_beams=2", "mixes the pictures"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences=2", "mixes the pictures"),
    ],
)
def test_pictures_that_are_not_encoded_beforehand(unencoded, settings, named, why):
    """Red: every token is generated under another choice, with no word said."""
    model, inputs = unencoded
    with vlmprune.wrap(model, "random:layer=0,fraction=0.5,seed=0") as run:
        with pytest.raises(vlmprune.UsageError) as refusal:
            generate(model, inputs, 3, **settings)
        assert "does not encode the pictures of Qwen3_5ForConditionalGeneration before generation" in str(refusal.value)
        assert why in str(refusal.value)
        assert f"leave {named} out, or update transformers." in str(refusal.value)
        with run.override(enabled=False):
            generate(model, inputs, 3, **settings)


@torch.no_grad()
def test_what_is_exact_without_encoding_beforehand(unencoded):
    """Red: it is refused, too."""
    model, inputs = unencoded
    stock = generate(model, inputs, 3, use_cache=False)[2]
    with vlmprune.wrap(model, "random:layer=0,fraction=1.0") as run:
        assert torch.equal(generate(model, inputs, 3, use_cache=False)[2], stock)
    with vlmprune.wrap(model, "random:layer=0,fraction=0.5,seed=0") as run:
        logits = generate(model, inputs, 3)[2]
        plain = model(**inputs, use_cache=False).logits[:, -1]
        torch.testing.assert_close(plain, logits[:, 0], atol=5e-5, rtol=0)
        assert not run.last.keep[0].all()
    assert (logits - stock).abs().max() > 0.1
