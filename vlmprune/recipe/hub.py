"""Ask the Hugging Face hub once and wait a few seconds: transformers itself would retry in silence for a minute."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, first_line

PATIENCE = 8.0
"""Seconds that the hub has for its answer."""


@dataclass(frozen=True)
class Repository:
    """A repository that can be read.

    Attributes:
        files: names of its files; if the hub cannot be reached, of those in the cache on this machine.
        options: keyword arguments for every `from_pretrained`.
        folder: of the cache, if the hub cannot be reached.
        unreached: why the hub cannot be reached; empty if it can.
    """

    files: frozenset[str]
    options: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    unreached: str = ""


def look_up(name: str, file: str, what: str) -> Repository:
    """Find a repository on the hub; or, if the hub cannot be reached, in its cache on this machine.

    Args:
        name: hub id.
        file: must be in the cache, if the cache is to be used.
        what: is looked for, for the error's sentence: "model" or "recipe".

    Raises:
        UsageError: it cannot be read; says whether there is no network, no such repository, or no access.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    cached: Any = None
    try:
        cached = try_to_load_from_cache(name, file)
        if constants.HF_HUB_OFFLINE:
            raise UnreachableError("HF_HUB_OFFLINE is set")
        info = within_patience(lambda: HfApi().model_info(name, timeout=PATIENCE / 2))
    except HFValidationError as error:
        raise UsageError(
            f"no {what} at {name!r}: there is no such folder, and it cannot be a hub id; give a folder."
        ) from error
    except UnreachableError as error:
        if isinstance(cached, str):
            return _in_cache(Path(cached), f"the hub cannot be asked ({error})")
        raise UsageError(
            f"no {what} at {name!r}: there is no such folder, the hub cannot be asked ({error}), and its cache on this machine "
            f"does not have the {what}; give a folder, or try again with network."
        ) from error
    except GatedRepoError as error:
        raise UsageError(
            f"no access to {name!r}: the repository is gated; ask for access at {constants.ENDPOINT}/{name}, then log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise _hidden(name, what) from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise _hidden(name, what) from error
        if isinstance(cached, str):
            return _in_cache(Path(cached), f"the hub answered with error {code}")
        raise UsageError(
            f"no {what} at {name!r}: the hub answered with error {code}; try again later or give a folder."
        ) from error
    return Repository(frozenset(sibling.rfilename for sibling in info.siblings or ()))


def download(name: str, file: str, what: str) -> Path:
    """One file of a repository, in the cache on this machine.

    Args:
        name: hub id.
        file: name of the file.
        what: it holds, for the error's sentence: "model" or "recipe".

    Raises:
        UsageError: the repository cannot be read, or lacks the file.
    """
    repository = look_up(name, file, what)
    if file not in repository.files:
        raise UsageError(f"no {what} at {name!r}: the repository has no {file}; save one there, or give a folder.")
    if repository.folder is not None:
        return repository.folder / file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(f"{file} of {name!r} cannot be downloaded: {first_line(error)}; try again.") from error


def _in_cache(file: Path, why: str) -> Repository:
    folder = file.parent
    return Repository(frozenset(other.name for other in folder.iterdir()), {"local_files_only": True}, folder, why)


def _hidden(name: str, what: str) -> UsageError:
    return UsageError(
        f"no {what} at {name!r}: there is no such folder, and on the hub no such repository, or a private one; check the "
        "spelling, or log in with `hf auth login`."
    )


class UnreachableError(Exception):
    """The hub did not answer."""


def within_patience(ask: Callable[[], Any]) -> Any:
    """Call `ask` in a thread of its own, because the look-up of a host's address has no time limit.

    Raises:
        UnreachableError: no answer within `PATIENCE` seconds, or no network.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:  # raised in the caller's thread
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=PATIENCE)
    except queue.Empty:
        raise UnreachableError(f"no answer within {PATIENCE:g} s") from None
    if error is None:
        return answer
    # The hub's client is httpx or httpx2, by version, and the two share no class for errors below HTTP.
    transport = type(error).__module__.startswith("httpx") and not isinstance(error, HfHubHTTPError)
    if transport or isinstance(error, OfflineModeIsEnabled):
        raise UnreachableError(f"no network: {first_line(error)}") from error
    raise error
