"""Prepare the files that results are written to: what cannot be written is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile

from vlmprune.errors import UsageError, first_line


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
        UsageError: it cannot be made, or cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: give the path of a folder that exists or can be made.") from error
    try:
        with TemporaryFile(dir=path):  # permissions are not enough: the file system may be read-only
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {path} ({error.strerror}): give the path of a folder that you may write to."
        ) from error


def check_target(path: Path, example: str, figure: bool = False) -> None:
    """Refuse the path of a picture that cannot be written; make its folder.

    Args:
        path: of the file.
        example: a good name for it, for the error's sentence.
        figure: whether matplotlib will write it, or Pillow; each writes other formats.

    Raises:
        UsageError: the ending is none of a picture that can be written, or the file cannot be written there.
    """
    if why := _why_no_format(path.suffix.lower(), figure):
        raise UsageError(f"cannot draw to {path} ({why}): give a file name with a picture's ending, for example {example}.")
    try:
        if path.is_dir():
            raise UsageError(f"cannot draw to {path}: it is a folder, give the name of a file.")
        make_folder(path.parent)
        if path.exists():
            with path.open("ab"):
                pass
        else:
            path.touch()
            path.unlink()
    except OSError as error:
        raise UsageError(f"cannot draw to {path} ({error.strerror}): give the name of a file that can be written.") from error


def _why_no_format(ending: str, figure: bool) -> str:
    """Why nothing can be written with this ending; empty if it can."""
    if not ending:
        return "it has no ending"
    try:
        if figure:
            _write_figure(ending)
        else:
            _write_picture(ending)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        return first_line(error)
    return ""


def _write_picture(ending: str) -> None:
    """Write one pixel as `PIL.Image.Image.save` would: Pillow registers endings that it can read but not write."""
    from PIL import Image

    Image.init()
    if ending not in Image.registered_extensions():
        raise ValueError(f"no picture has the ending {ending}")
    Image.new("RGB", (1, 1)).save(BytesIO(), Image.registered_extensions()[ending])


def _write_figure(ending: str) -> None:
    from matplotlib.figure import Figure

    Figure(figsize=(1, 1)).savefig(BytesIO(), format=ending[1:])


def check_packages(names: Iterable[str], what: str = "drawing figures", extra: str = "") -> None:
    """Refuse, before anything is computed, what needs a package that is missing.

    Args:
        names: of the packages.
        what: needs them, for the error's sentence.
        extra: of vlmprune, which installs them.

    Raises:
        UsageError: says what to install.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        wanted = " ".join(missing)
        command = f"pip install 'vlmprune[{extra}]'" if extra else f"pip install {wanted}"
        raise UsageError(f"{what} needs {wanted}: install it with `{command}`.")
