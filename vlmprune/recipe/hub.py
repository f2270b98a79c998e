"""Asking the hub, once and with little patience: transformers would retry in silence for a minute."""

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
        files: names of its files; of those in the cache, if the hub could not be asked.
        options: keyword arguments for every `from_pretrained`.
        folder: of the cache, if the hub could not be asked.
        unreached: why it could not, else empty.
    """

    files: frozenset[str]
    options: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    unreached: str = ""


def ask(name: str, file: str, what: str) -> Repository:
    """Look a repository up. Where the hub cannot be asked, the cache will do if it has `file`.

    Args:
        what: is looked for, for the error's sentence: "model", "recipe".

    Raises:
        UsageError: it cannot be read; says whether there is no network, no such repository, or no access.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    stored: Any = None
    try:
        stored = try_to_load_from_cache(name, file)
        if constants.HF_HUB_OFFLINE:
            raise UnreachableError("HF_HUB_OFFLINE is set")
        info = _soon(lambda: HfApi().model_info(name, timeout=PATIENCE / 2))
    except HFValidationError as error:
        raise UsageError(
            f"no {what} at {name!r}: there is no such folder, and it cannot be a hub id; give a folder."
        ) from error
    except UnreachableError as error:
        if isinstance(stored, str):
            return _in_cache(Path(stored), f"the hub cannot be asked ({error})")
        raise UsageError(
            f"no {what} at {name!r}: there is no such folder, and the hub cannot be asked ({error}) nor does its cache on this "
            f"machine have the {what}; give a folder, or try again with network."
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
        if isinstance(stored, str):
            return _in_cache(Path(stored), f"the hub answered with error {code}")
        raise UsageError(
            f"no {what} at {name!r}: the hub answered with error {code}; try again later or give a folder."
        ) from error
    return Repository(frozenset(sibling.rfilename for sibling in info.siblings or ()))


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


def _soon(ask: Callable[[], Any]) -> Any:
    """The answer of the hub, or `UnreachableError` after `PATIENCE` (finding a host's address has no time limit of its own)."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:  # handed to the caller's thread
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=PATIENCE)
    except queue.Empty:
        raise UnreachableError(f"no answer within {PATIENCE:g} s") from None
    if error is None:
        return answer
    # The hub's client is httpx or httpx2, by version; its errors below HTTP are of no class that both share.
    transport = type(error).__module__.startswith("httpx") and not isinstance(error, HfHubHTTPError)
    if transport or isinstance(error, OfflineModeIsEnabled):
        raise UnreachableError(f"no network: {first_line(error)}") from error
    raise error
