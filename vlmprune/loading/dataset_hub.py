"""Whether a dataset on the Hugging Face hub can be read: asked once, with a few seconds of patience."""

from __future__ import annotations

import os
from pathlib import Path

from vlmprune.errors import UsageError
from vlmprune.recipe import hub


def check_dataset(name: str, what: str) -> None:
    """Refuse a dataset that is not in the cache on this machine, and cannot be fetched.

    Args:
        name: hub id.
        what: needs it, for the error's sentence.

    Raises:
        UsageError: there is no network, no such repository, or no access; says which.
    """
    if _cached(name):
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    needs = f"{what} needs the dataset {name}, which is not in the cache on this machine"
    local = "run it where there is network, or give it local data (docs/lmms.md, Your own data)"
    offline = [variable for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if _is_on(variable)]
    try:
        if offline or constants.HF_HUB_OFFLINE:
            raise hub.UnreachableError(f"{(offline or ['HF_HUB_OFFLINE'])[0]} is set")
        hub.within_patience(lambda: HfApi().dataset_info(name, timeout=hub.PATIENCE / 2))
    except hub.UnreachableError as error:
        raise UsageError(f"{needs}, and the hub cannot be asked ({error}): {local}.") from error
    except GatedRepoError as error:
        raise UsageError(
            f"{needs}, and it is gated: ask for access at {constants.ENDPOINT}/datasets/{name}, then log in with `hf auth "
            "login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(f"{needs}, and the hub has none of this name, or a private one: {local}.") from error
    except HfHubHTTPError as error:
        raise UsageError(f"{needs}, and the hub answered with error {error.response.status_code}: try again later.") from error


def _cached(name: str) -> bool:
    """Whether `datasets` or the hub's client has stored it."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    stored = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    fetched = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    wanted = {(stored, name.replace("/", "___").lower()), (fetched, f"datasets--{name.replace('/', '--')}".lower())}
    return any(folder.is_dir() and entry in {path.name.lower() for path in folder.iterdir()} for folder, entry in wanted)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
