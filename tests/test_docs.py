"""The documents stay true: files that they name exist, their examples run, and the map of the house lists every room.

Red: a file was renamed or added and the documents do not know it, or an example needs what is no longer there.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from oracles import TOLERANCE, masked_logits
from rooms import ROOMS
from tiny_models import make_inputs, shared
from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

import vlmprune as vp
from vlmprune.adapters import registry

ROOT = Path(vp.__file__).resolve().parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "docs/results/README.md")
DOCUMENTS = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("vlmprune", "tests", "docs", "evals", "adapters", "kernels", "benchmarks", "live")
MAP = (ROOT / "docs/architecture.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_documents_name_exists(document):
    """Red: a link, or a path in backticks, leads nowhere."""
    text = document.read_text()
    missing = []
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http") and not (document.parent / target).exists():
            missing.append(target)
    for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text):
        if path.split("/")[0] in FOLDERS and not any((root / path).exists() for root in (ROOT, ROOT / "vlmprune")):
            missing.append(path)
    assert not missing, missing


def test_the_index_of_results_lists_every_file():
    """Red: a result was written, or renamed, and docs/results/README.md does not lead to it."""
    index = ROOT / "docs/results/README.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)\)", index.read_text())}
    files = {path for folder in ("docs/results", "benchmarks/results") for path in (ROOT / folder).rglob("*.*")} - {index}
    missing = {path for path in files if not {path, path.with_suffix(".md"), path.with_suffix(".json")} & linked}
    assert not missing, missing


def test_headings_that_links_lead_to():
    """Red: `](#a-heading)` or `](file.md#a-heading)` names a heading that is not there."""
    missing = []
    for document in DOCUMENTS:
        for file, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", document.read_text()):
            if file.startswith("http"):
                continue
            target = (document.parent / file if file else document).read_text()
            headings = re.findall(r"^#+ (.+)$", target, re.MULTILINE)
            if anchor not in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}:
                missing.append(f"{document.name}: {file}#{anchor}")
    assert not missing, missing


def test_the_map_lists_every_room_and_every_file_of_the_engine():
    """Red: docs/architecture.md lacks a room of vlmprune/, in the order of imports, or a file of vlmprune/live/."""
    table = MAP.split("## The house")[1].split("###")[0]
    rooms = [name.removesuffix(".py").removesuffix("/") for name in re.findall(r"^\| `([\w./]+)` \|", table, re.MULTILINE)]
    assert rooms == [name for name in ROOMS if name not in ("", "__main__")]
    listed = set(re.findall(r"`(\w+\.py)`", MAP.split("### `vlmprune/live/`")[1].split("###")[0]))
    assert listed == {path.name for path in (ROOT / "vlmprune/live").glob("*.py")} - {"__init__.py"}


def test_the_page_of_the_methods():
    """Red: a method's docstring changed, and `python docs/methods.py` was not run."""
    space: dict = {"__name__": "docs", "__file__": str(ROOT / "docs/methods.py")}
    exec(compile((ROOT / "docs/methods.py").read_text(), "docs/methods.py", "exec"), space)
    assert space["markdown"]() == (ROOT / "docs/methods.md").read_text(), "run: python docs/methods.py"


def test_what_the_readme_says_that_its_snippets_print(capsys):
    """Red: README.md quotes an answer, a report or an explanation that its code no longer prints."""
    text = (ROOT / "README.md").read_text()
    space: dict = {}
    printed = []
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if "tiny.load()" in block or "explain=True" in block:
            exec(compile(block, "README.md", "exec"), space)
            printed.append(capsys.readouterr().out)
    answer, quoted = re.search(r"prints the answer, `(\w+)`, and the report: ([^.]+)\.", text).groups()  # type: ignore[union-attr]
    kept, tokens, flops, cache = re.findall(r"\d+", quoted)
    assert printed[0].startswith(f"{answer}\n")
    assert f"{kept} of {tokens}\n" in printed[0]
    assert f"({flops}.0%)" in printed[0]
    assert f"({cache}.0%)" in printed[0]
    explained = text.split("The first prints:\n\n")[1].split("\n\n")[0]
    wanted, found = (re.sub(r"\d\.\d+", "0.0", x) for x in (textwrap.dedent(explained), printed[1]))  # but for rounding
    assert found.startswith(wanted + "\n")


def test_the_worked_method():
    """Red: the method file of CONTRIBUTING.md no longer works, by its class or by its name."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    space: dict = {"__name__": "worked_method"}
    exec(compile(block, "CONTRIBUTING.md", "exec"), space)
    model = shared("llava")
    inputs = make_inputs("llava", model, [["text3", "image", "text4"]])
    kept = []
    for recipe in (space["KNorm"](fraction=0.3), "knorm:fraction=0.3"):
        with vp.wrap(model, recipe) as run, torch.no_grad():
            model(**inputs)
            kept.append(run.last.kept[0].index.tolist())
    with torch.no_grad():
        keys = model(**inputs, use_cache=True).past_key_values.layers[1].keys[0]  # the layer before layer 2
    place = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    norms = keys[:, place].norm(dim=-1).mean(dim=0)
    assert kept == [sorted(norms.argsort()[: len(kept[0])].tolist())] * 2
    assert len(kept[0]) == 5  # of 16


def test_the_example_of_a_stage(capsys):
    """Red: what docs/architecture.md says that its example prints is not what it prints."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", MAP, re.MULTILINE | re.DOTALL)
    space: dict = {"__name__": "stage"}
    with torch.no_grad():
        exec(compile(block, "docs/architecture.md", "exec"), space)
    entering, kept, entries, slots = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    long, short = re.search(r"each decoder layer: (\d+) twice, then (\d+)", block).groups()  # type: ignore[union-attr]
    assert entering == entries == [int(long)] * 2 + [int(short)] * 6
    count, visual = re.search(r"the (\d+) of (\d+) visual tokens", block).groups()  # type: ignore[union-attr]
    assert (len(kept), visual) == (int(count), "144")
    place = (space["inputs"]["input_ids"][0] == space["model"].config.image_token_id).nonzero()[:, 0].tolist()
    assert [slot for slot in slots if slot in place] == [place[index] for index in kept]
    assert len(slots) == int(short)


@pytest.fixture
def lighton_ocr(monkeypatch):
    """The family of docs/examples/lighton_ocr.py, a random model of it, and a prompt with two pictures."""
    spec = spec_from_file_location("lighton_ocr", ROOT / "docs/examples/lighton_ocr.py")
    assert spec is not None
    assert spec.loader is not None
    example = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lighton_ocr", example)
    spec.loader.exec_module(example)
    monkeypatch.setitem(registry.FAMILIES, "lighton_ocr", example.LIGHTON_OCR)
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "model_type": "qwen3"}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    vision |= {"image_size": 32, "head_dim": 8, "model_type": "pixtral"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LightOnOcrConfig(text_config=text, vision_config=vision, image_token_id=1, spatial_merge_size=2)
        model = LightOnOcrForConditionalGeneration(config).float().eval()
        for name, weight in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            torch.nn.init.normal_(weight, float(norm), 0.05 if norm else 0.125 if "lm_head" in name else 0.2)
    ids = torch.tensor([[10, 11, *[1] * 12, 2, 12, 13, *[1] * 6, 2, 14, 15]])
    pixels = torch.zeros(2, 3, 32, 24)
    random = torch.Generator().manual_seed(1)
    pixels[0, :, :32, :24] = torch.randn(3, 32, 24, generator=random)
    pixels[1, :, :16, :24] = torch.randn(3, 16, 24, generator=random)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[32, 24], [16, 24]])}
    return model, inputs | {"attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("recipe", ["fastv:layer=3,fraction=0.5", "divprune:layer=0,fraction=0.5 + random:layer=4,tokens=2"])
def test_the_worked_family(lighton_ocr, recipe):
    """Red: the family file of CONTRIBUTING.md no longer works, or no longer prunes exactly."""
    model, inputs = lighton_ocr
    with torch.no_grad():
        plain = model(**inputs).logits
        with vp.wrap(model, recipe) as run:
            pruned, keep = model(**inputs).logits, run.last.keep
        assert [image.original for image in run.last.kept[:2]] == [12, 6]
        kept = keep[max(keep)]
        torch.testing.assert_close(pruned[kept], masked_logits(model, inputs, keep)[kept], atol=TOLERANCE, rtol=0)
        assert not torch.allclose(pruned[:, -1], plain[:, -1], atol=1e-2)
        with vp.wrap(model, "fastv:layer=3,fraction=1.0"):
            assert torch.equal(model(**inputs).logits, plain)
