"""The engine depends on no method and no family: no file of `vlmprune/live/` has the name of one as identifier or string.

Looked at: names, attributes, arguments, keywords, imports, definitions and strings (f-strings too). Not looked at: comments and
docstrings, which explain to a reader what a line is for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import vlmprune
from vlmprune.adapters.registry import FAMILIES

LIVE = Path(vlmprune.__file__).parent / "live"
METHODS = {**vlmprune.METHODS, **vlmprune.REDISTRIBUTORS}
PLAIN = {"act", "cls", "random", "uniform"}
"""Methods whose recipe names are words of their own: "act", the CLS token, `torch.random`. Of these, an identifier must not be
the class's name, and a string must not be the recipe name; other spellings and parts of words mean the word."""
FAMILY_WORDS = {"llava", "qwen", "internvl", "idefics", "smolvlm", "mistral", "glm4", "videollama", "janus", "deepseek"}
FAMILY_WORDS |= {"fastvlm", "perception", "ovis2", "gemma", "lfm2", "ayavision", "cohere2"}
"""What families have in their names, in any spelling."""


def parameters() -> set[str]:
    """Parameters that only one paper has, with names that are no plain words."""
    base = {field.name for kind in (vlmprune.Pruner, vlmprune.Redistributor) for field in fields(kind)}
    return {field.name for method in METHODS.values() for field in fields(method) if "_" in field.name} - base


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Strings that are statements: docstrings of modules, classes and functions, and those below a variable."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}


def words(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Every identifier and string of a file, the line, and whether it is a string."""
    left_out = docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield node.value, line, True
        for name in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(found := getattr(node, name, None), str):
                yield found, line, False


def mentions(text: str, is_string: bool) -> list[str]:
    """Methods, their parameters and families that an identifier or a string names."""
    tokens = [token.lower() for token in re.findall(r"[A-Za-z0-9]+", text)]
    joined = re.sub(r"[^a-z0-9]", "", text.lower())
    found = []
    for name, method in METHODS.items():
        if name in PLAIN:
            hit = text == name if is_string else text.split(".")[-1] == method.__name__
        elif len(name) > 5:
            hit = name in joined
        else:
            hit = name in tokens or method.__name__ in re.findall(r"\w+", text)
        found += [name] * hit
    found += [word for word in FAMILY_WORDS if word in joined]
    found += [parameter for parameter in sorted(parameters()) if parameter in text]
    return found


@pytest.mark.parametrize("path", sorted(LIVE.glob("*.py")), ids=lambda path: path.stem)
def test_engine_names_no_method_and_no_family(path):
    """Red: `if method.name == "var"`, `getattr(method, "sink_dims")`, `from … import FlowCut`, "for example divprune"."""
    found = [
        f"{path.name}:{line} {text!r} names {', '.join(named)}"
        for text, line, is_string in words(ast.parse(path.read_text()))
        if (named := mentions(text, is_string))
    ]
    assert not found, "\n".join(found)


def test_families_are_all_looked_for():
    """Red: a new family whose name has none of the words above."""
    assert all(any(word in name.replace("_", "") for word in FAMILY_WORDS) for name in FAMILIES)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("isinstance(method, VAR)", "var"),
        ("method.sink_dims", "sink_dims"),
        ("getattr(method, 'sink_dims', None)", "sink_dims"),
        ("raise E(f'{x}: vhr compares')", "vhr"),
        ("from vlmprune.methods.pruning import FlowCut", "flowcut"),
        ("import vlmprune.methods.pruning.flowcut", "flowcut"),
        ("say('choose another, for example divprune.')", "divprune"),
        ("name == 'random'", "random"),
        ("methods.Random", "random"),
        ("model_type == 'qwen2_5_vl'", "qwen"),
        ("say('not with LLaVA-NeXT')", "llava"),
        ("def of_llava_next(): pass", "llava"),
    ],
)
def test_the_guard_finds(code, named):
    assert any(named in mentions(text, is_string) for text, _, is_string in words(ast.parse(code)))


@pytest.mark.parametrize("code", ["torch.random", "vars(x)", "facts.cls", "'attention_from_cls'", "'''var'''", "act(x)"])
def test_the_guard_leaves_words_alone(code):
    assert not any(mentions(text, is_string) for text, _, is_string in words(ast.parse(code)))
