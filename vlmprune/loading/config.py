"""Read the config of a model, and check the JSON files beside it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from vlmprune.errors import UsageError, first_line, shown
from vlmprune.loading.source import Source

IMAGE_PART = ("preprocessor_config.json", "processor_config.json")
TEMPLATES = ("chat_template.jinja",)
JSON = (
    *("config.json", "generation_config.json", *IMAGE_PART, "video_preprocessor_config.json", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"),
)
LFS = "version https://git-lfs"
"""The start of a pointer of Git LFS, which a clone holds until the file itself is fetched."""


def read_config(source: Source) -> Any:
    """The config, of a supported family.

    Raises:
        UsageError: it is broken, or the family is not supported.
    """
    check_torchvision()
    from transformers import AutoConfig, PretrainedConfig

    from vlmprune.adapters.registry import family_of

    _check_json(source)
    found = source.load("config", lambda: PretrainedConfig.get_config_dict(source.place, **source.options)[0])
    if "model_type" not in found:
        raise UsageError(f"config.json of {source.name!r} names no model_type: fetch the config.json of a transformers model.")
    try:
        config = source.load("config", lambda: AutoConfig.from_pretrained(source.place, **source.options))
    except UsageError:
        family_of(SimpleNamespace(**found))  # if transformers lacks the family as well, "unknown family" is the better reason
        raise
    family_of(config)
    return config


def check_torchvision() -> None:
    """Refuse a torchvision that does not fit torch: it breaks imports deep inside transformers. None at all is fine.

    Raises:
        UsageError: it is installed and cannot be imported.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(
            f"torchvision is installed but does not fit this torch ({first_line(error)}): uninstall it (images need none), or "
            "install the version that belongs to this torch."
        ) from error


def _check_json(source: Source) -> None:
    if source.folder is None:
        return
    for path in (source.folder / name for name in (*JSON, *TEMPLATES) if name in source.files):
        try:
            broken = _fault(path.name, path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            broken = first_line(error)
        if broken:
            raise UsageError(f"{path} is broken ({broken}): fetch or save the model again.")


def _fault(name: str, text: str) -> str:
    """What is wrong with the text of a file; empty if nothing is."""
    if text.startswith(LFS):
        return "a pointer of Git LFS"
    if name in TEMPLATES:
        return ""
    found = json.loads(text)
    if not isinstance(found, dict):
        return f"a JSON object is wanted, found {'a list' if isinstance(found, list) else shown(found)}"
    if name == "tokenizer.json" and not isinstance(found.get("model"), dict):
        return "it holds no model of a tokenizer"
    if name in IMAGE_PART and not found:
        return "it is an empty object"
    return ""
