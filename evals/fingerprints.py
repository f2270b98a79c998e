"""Hashes of what an answer depends on: code, packages and weights."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType
from typing import Any

import torch

import vlmprune

NO_ANSWERS = ("cli", "show", "evals")
"""Rooms of the package that change no answer; of `evals`, only what asks does."""
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "pillow")
"""They compute answers, or prepare what is asked."""
SAMPLE = 64
"""Numbers of each weight that are hashed."""


def versions() -> dict[str, str]:
    """The versions of the packages that can change an answer."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


@cache
def code_fingerprint(*asking: str) -> str:
    """A hash of everything in this package that can change an answer, the embedded model included.

    Comments, docstrings and formatting are not part of it, nor are rooms that only show results.

    Args:
        asking: the modules of `evals` that ask; what they import from `evals` belongs to them. Default: "asking".
    """
    digest = blake2b(digest_size=6)
    folder = Path(vlmprune.__file__).parent
    for path in sorted({*_answering(folder), *_with_imports(folder / "evals", asking or ("asking",))}):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(_code(path.read_text()).encode() if path.suffix == ".py" else path.read_bytes())
    return digest.hexdigest()


def recipe_fingerprint(recipe: vlmprune.Recipe | None) -> str:
    """A hash of the files that define a recipe's methods, where these are not part of this package; empty if all are."""
    methods = () if recipe is None else recipe.methods
    own = {type(method) for method in methods if not type(method).__module__.startswith("vlmprune.")}
    if not own:
        return ""
    digest = blake2b(digest_size=6)
    for method in sorted(own, key=lambda method: method.__qualname__):
        digest.update(method.__qualname__.encode())
        try:
            digest.update(inspect.getsource(inspect.getmodule(method) or method).encode())
        except (OSError, TypeError):  # typed into an interpreter: there is no file
            digest.update(repr(sorted(vars(method))).encode())
    return digest.hexdigest()


def weights_fingerprint(model: Any) -> str:
    """A hash of a loaded model: its configuration, and some numbers of every weight.

    Weights that accelerate has moved away (to the CPU or to disk) are read from where they are.
    """
    digest = blake2b(digest_size=6)
    config = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else {}  # open_clip's have none
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    away = _moved_away(model)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if weight.is_meta and name in away:
            holder, own = away[name]
            weight = holder[own]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta and weight.numel():
            some = weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLE)]
            digest.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _moved_away(model: Any) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Names of parameters and buffers -> where accelerate's hooks keep them, and under which name."""
    found: dict[str, tuple[Mapping[str, Any], str]] = {}
    for prefix, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (holder := getattr(one, "weights_map", None)) is not None:
                names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
                found |= {f"{prefix}.{name}".lstrip("."): (holder, name) for name in names if name in holder}
    return found


def processor_fingerprint(processor: Any) -> str:
    """A hash of a processor: its settings, its tokenizer and its chat template."""
    digest = blake2b(digest_size=6)
    digest.update(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
    tokenizer = processor.tokenizer
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # Padding and truncation are those of its last use.
        known = {key: value for key, value in json.loads(fast.to_str()).items() if key not in ("padding", "truncation")}
    else:
        known = tokenizer.get_vocab()
    templates = [getattr(one, "chat_template", None) for one in (processor, tokenizer)]
    digest.update(json.dumps([known, templates], sort_keys=True).encode())
    return digest.hexdigest()


def _answering(folder: Path) -> list[Path]:
    """Files whose content can change an answer, outside `evals`."""
    files = []
    for room in folder.iterdir():
        if room.is_dir() and room.name not in NO_ANSWERS:  # a linked folder is walked from its target
            files += [room / path.relative_to(room.resolve()) for path in room.resolve().rglob("*") if _counts(path)]
        elif room.is_file() and _counts(room):
            files.append(room)
    return files


def _counts(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".md", ".pyc") and path.name != "py.typed"


def _with_imports(folder: Path, names: Iterable[str]) -> set[Path]:
    """Modules of a folder, and all that they import from it, one through the other."""
    found: set[Path] = set()
    left = [folder / f"{name}.py" for name in names]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                if module.startswith("vlmprune.evals.") and (other := folder / f"{module.split('.')[2]}.py").exists():
                    left.append(other)
    return found


def _code(source: str) -> str:
    """What Python runs of a file, without docstrings, assertions and line numbers."""
    return json.dumps(_plain(compile(source, "", "exec", dont_inherit=True, optimize=2)))


def _plain(constant: Any) -> Any:
    """A constant or compiled code as plain data, which is the same in every process."""
    if isinstance(constant, CodeType):
        code = constant
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        inside = [_plain(one) for one in code.co_consts]
        return [code.co_name, counts, names, code.co_code.hex(), getattr(code, "co_exceptiontable", b"").hex(), inside]
    if isinstance(constant, tuple):
        return [_plain(one) for one in constant]
    if isinstance(constant, frozenset):
        return sorted(repr(one) for one in constant)
    return repr(constant)
