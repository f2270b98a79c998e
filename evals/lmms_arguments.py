"""The arguments of the model `vlmprune` in lmms-eval, read and checked; and their text for lmms-eval's command line.

pretrained      folder or hub id of a VLM; tiny is the embedded model
recipe          a recipe in double quotes; a file, folder or hub repository that holds one; none for the un-pruned model
dtype           bfloat16, float16 or float32. Default: as the weights are stored
device          cpu, cuda, cuda:1, … Default: a GPU if there is one, of several processes one for each
device_map      as in transformers' from_pretrained: auto, balanced, … for a model that is larger than one device
max_new_tokens  longest answer where the task states none. Default: 128
system          a system text for the chat template
resume          a folder in which every answer is kept: the same run goes on from there
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlmprune.errors import UsageError, shown, unknown
from vlmprune.loading.recipes import read_recipe

DTYPES = ("bfloat16", "float16", "float32")
NONE = "none"
"""The recipe of the un-pruned model."""
FORM = """--model_args 'pretrained=FOLDER,recipe="fastv:layer=2,fraction=0.25",dtype=bfloat16'"""
QUOTES = "\"'"
NUMBERS = ("max_new_tokens", "batch_size")


@dataclass(frozen=True)
class Arguments:
    """What the model `vlmprune` was asked for; see the top of this file.

    Attributes:
        batch_size: prompts that are computed at once.
    """

    pretrained: str
    recipe: str = NONE
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    max_new_tokens: int = 128
    system: str = ""
    resume: Path | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.device is not None and self.device_map is not None:
            raise UsageError(f"device={self.device} and device_map={self.device_map} exclude each other: give one of them.")
        for name in NUMBERS:
            if (number := getattr(self, name)) < 1:
                raise UsageError(f"{name} must be at least 1, found {number}.")

    def open_recipe(self) -> Any:
        """The `Recipe`; None for the un-pruned model.

        Raises:
            UsageError: there is no such recipe, or it cannot be read.
        """
        return None if self.recipe == NONE else read_recipe(self.recipe)


KNOWN = tuple(field.name for field in fields(Arguments))


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """The arguments as lmms-eval passes them: numbers are numbers already, and texts may still be in quotes.

    Raises:
        UsageError: an argument is missing, does not exist, or has an impossible value; half a recipe.
    """
    said = {name: _plain(value) for name, value in given.items() if value is not None}
    if said.pop("max_batch_size", None) is not None:
        raise UsageError("--max_batch_size belongs to --batch_size auto, which there is not: give --batch_size a number.")
    _check_names(said)
    if not said.get("pretrained"):
        raise UsageError(f"no model: say which with pretrained=, for example {FORM}.")
    values: dict[str, Any] = {name: _number(name, value) if name in NUMBERS else str(value) for name, value in said.items()}
    if "resume" in values:
        values["resume"] = Path(values["resume"]).expanduser()
    return Arguments(**values)


def write_arguments(arguments: Arguments) -> str:
    """The text for `--model_args`, without what lmms-eval's own options say (device, batch size).

    Raises:
        UsageError: a text has both kinds of quotes.
    """
    pairs = [(name, getattr(arguments, name)) for name in KNOWN if name not in ("batch_size", "device")]
    defaults = {field.name: field.default for field in fields(Arguments)}
    return ",".join(f"{name}={_quoted(name, str(value))}" for name, value in pairs if value != defaults[name])


def _quoted(name: str, text: str) -> str:
    quote = next((quote for quote in QUOTES if quote not in text), None)
    if quote is None:
        raise UsageError(f"{name} has both kinds of quotes, which lmms-eval cannot read ({shown(text)}): use one kind.")
    return f"{quote}{text}{quote}"


def _plain(value: Any) -> Any:
    """A text without its outer quotes."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in QUOTES:
        return value[1:-1]
    return value


def _check_names(said: Mapping[str, Any]) -> None:
    strange = [name for name in said if name not in KNOWN]
    if not strange:
        return
    recipe = str(said.get("recipe", ""))
    if ":" in recipe:
        half = ", ".join(f"{name}={said[name]}" for name in strange)
        whole = ",".join([recipe, *(f"{name}={said[name]}" for name in strange)])
        raise UsageError(
            f"only half of the recipe arrived: {recipe!r}, and beside it {half}, because lmms-eval splits its arguments at "
            "every "
            "comma; put the recipe in double quotes: --model_args "
            f"'pretrained={said.get('pretrained', 'FOLDER')},recipe=\"{whole}\"'."
        )
    raise UsageError(f"{str(unknown('model argument', strange[0], KNOWN)).rstrip('.')}. Write {FORM}.")


def _number(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} must be a whole number, found {shown(value)}.") from error
    return number
