"""Find what the name of a model means: a folder, or a repository on the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, first_line, unknown
from vlmprune.recipe import hub

HOW = "give a folder with a saved model, a hub id, or 'tiny'"


@dataclass(frozen=True)
class Source:
    """The place that a model is loaded from.

    Attributes:
        name: as the user wrote it.
        folder: the folder; None for a repository on the hub. If the hub cannot be reached, the folder of its cache.
        files: names of the files there.
        options: keyword arguments for every `from_pretrained`.
        unreached: why the hub cannot be reached; empty if it can, or if it is not needed.
    """

    name: str
    folder: Path | None
    files: frozenset[str]
    options: dict[str, Any]
    unreached: str = ""

    @property
    def place(self) -> str:
        """The first argument of `from_pretrained`."""
        return self.name if self.folder is None else str(self.folder)

    def lacking(self, what: str, otherwise: UsageError) -> UsageError:
        """The error for files that are missing: `otherwise`, unless the reason is a download that was not finished."""
        if not self.unreached:
            return otherwise
        return UsageError(
            f"the download of {self.name!r} is not complete: the cache on this machine lacks {what}, and {self.unreached}; try "
            "again with network."
        )

    def without_processor(self, why: str) -> UsageError:
        """The error for a processor that is missing, or of which a part is missing."""
        return UsageError(
            f"{self.name!r} has a model but no whole processor: {why}; save the processor of the base model into the same "
            "folder: AutoProcessor.from_pretrained(base).save_pretrained(folder)."
        )

    def load(self, part: str, from_pretrained: Callable[[], Any]) -> Any:
        """Call a `from_pretrained`.

        Args:
            part: what it loads, for the error: "config", "model", "processor", "tokenizer".
            from_pretrained: the call.

        Raises:
            UsageError: it failed; one sentence with the first line of its reason.
        """
        try:
            return from_pretrained()
        except UsageError:
            raise
        except ImportError as error:
            raise UsageError(
                f"the {part} of {self.name!r} needs a package that is missing: {first_line(error)}; install it."
            ) from error
        except Exception as error:  # a broken file can make transformers raise anything
            if part == "processor" and isinstance(error, OSError):
                raise self.without_processor(first_line(error)) from error
            raise UsageError(
                f"the {part} of {self.name!r} cannot be loaded ({first_line(error)}): fetch or save it again."
            ) from error


def find(name: str, gguf: str | None = None) -> Source:
    """A folder; or a repository on the hub, or in the hub's cache on this machine.

    Args:
        name: path of the folder, or hub id.
        gguf: name of a GGUF file in that folder that is to be loaded.

    Raises:
        UsageError: there is no such folder or repository, or it holds no model; says which.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(name, path, gguf)
    if path.exists():
        kind = "GGUF file: give its folder as the model, and the file as --gguf of `vlmprune sinks`"
        raise UsageError(
            f"no model at {name!r}: it is a {kind} (VLMs in this format cannot be loaded)."
            if path.suffix == ".gguf"
            else f"no model at {name!r}: it is a file, give the folder that holds it with its config.json."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/"):
        raise UsageError(f"no model at {name!r}: there is no such folder; {HOW}.")
    return _on_hub(name)


def _in_folder(name: str, folder: Path, gguf: str | None) -> Source:
    try:
        files = frozenset(file.name for file in folder.iterdir())
    except PermissionError as error:
        raise UsageError(
            f"no model at {name!r}: the folder cannot be read ({error.strerror}): check its permissions."
        ) from error
    if gguf is not None:
        _check_gguf(name, gguf, files)
    elif "config.json" not in files:
        raise UsageError(f"no model at {name!r}: {_why_no_model(folder, files)}.")
    return Source(name, folder, files, {"local_files_only": True, "trust_remote_code": False})


def _check_gguf(name: str, gguf: str, files: frozenset[str]) -> None:
    if gguf not in files:
        near = unknown("GGUF file", gguf, [file for file in files if file.endswith(".gguf")])
        raise UsageError(f"no model at {name!r}: {near}")
    if find_spec("gguf") is None:
        raise UsageError(f"cannot read {gguf}: the package gguf is missing, install it with `pip install gguf`.")


def _why_no_model(folder: Path, files: frozenset[str]) -> str:
    """Why a folder without config.json cannot be loaded, and what to give instead."""
    if "adapter_config.json" in files:
        return (
            "it holds a PEFT adapter, not a model: load it on its base model in Python, or save the two merged "
            "(merge_and_unload().save_pretrained(…))"
        )
    if any(file.endswith(".gguf") for file in files):
        return "it holds GGUF files only, which transformers cannot load as a VLM: give a folder with config.json and weights"
    below = sorted(file.parent.name for file in folder.glob("*/config.json"))
    return f"the folder has no config.json, {f'but its folder {below[0]}/ has one: give that' if below else HOW}"


def _on_hub(name: str) -> Source:
    repository = hub.look_up(name, "config.json", "model")
    files = repository.files
    if "config.json" not in files:
        what = "holds GGUF files only" if any(file.endswith(".gguf") for file in files) else "has no config.json"
        raise UsageError(f"no model at {name!r}: the repository {what}; give one with config.json and safetensors weights.")
    options = {"trust_remote_code": False, **repository.options}
    return Source(name, repository.folder, files, options, repository.unreached)
