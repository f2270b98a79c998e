"""Load a model of pictures and texts by its name: open_clip's, or CLIP and SigLIP of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.errors import UsageError, first_line, unknown
from vlmprune.loading.config import check_torchvision
from vlmprune.loading.models import check_device
from vlmprune.loading.source import Source, find
from vlmprune.loading.weights import check_weights, load_weights
from vlmprune.names import OPEN_CLIP
from vlmprune.recipe import hub

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OWN_PLACE = ("hf-hub:", "local-dir:")
"""Names of open_clip that say where the weights are."""
TRANSFORMERS = ("clip", "siglip")
"""The `model_type`s of transformers that have an image tower and a text tower of one space."""


@dataclass(frozen=True, eq=False)
class ImageText:
    """A model of pictures and texts.

    Attributes:
        model: the model itself, un-wrapped, in evaluation mode.
        tokenizer: its tokenizer, of open_clip or of transformers.
        pixels: pictures -> `[image, 3, height, width]`, as the image tower takes them, on the model's device.
        images: such pixels -> `[image, dim]` unit vectors, fp32.
        texts: texts -> `[text, dim]` unit vectors, fp32.
    """

    model: Any
    tokenizer: Any
    pixels: Callable[[Sequence[Image]], Tensor]
    images: Callable[[Tensor], Tensor]
    texts: Callable[[Sequence[str]], Tensor]


def load_image_text(name: str, device: str) -> ImageText:
    """A model of pictures and texts.

    Args:
        name: open_clip:NAME/PRETRAINED, open_clip:hf-hub:REPOSITORY or open_clip:local-dir:FOLDER; or a folder or hub id with a
            CLIP or SigLIP model of transformers.
        device: where the model goes.

    Raises:
        UsageError: there is no such model, open_clip is missing or cannot be imported, the hub cannot be reached, or the model
            is of another kind.
    """
    check_device(device)
    return _open_clip(name, device) if name.startswith(OPEN_CLIP) else _transformers(name, device)


# -- open_clip ---------------------------------------------------------------------------------------------------------


def _open_clip(name: str, device: str) -> ImageText:
    open_clip = _import_open_clip(name)
    model_name, pretrained = _parts(open_clip, name)
    _check_reached(open_clip, name, model_name, pretrained)
    import torch
    from torch.nn.functional import normalize

    def load() -> tuple[Any, Any, Any]:
        made, _, transform = open_clip.create_model_and_transforms(model_name, pretrained=pretrained, device=device)
        return made.eval(), transform, open_clip.get_tokenizer(model_name)

    try:
        model, transform, tokenizer = load()
    except Exception as error:  # a broken file can make open_clip raise anything
        raise UsageError(
            f"{name!r} cannot be loaded by open_clip ({first_line(error)}): check the name and its files."
        ) from error

    @torch.no_grad()
    def texts(given: Sequence[str]) -> Tensor:
        ids = tokenizer(list(given), context_length=model.context_length).to(device)
        return normalize(model.encode_text(ids).float(), dim=-1)

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        return normalize(model.encode_image(pixels).float(), dim=-1)

    dtype = next(model.visual.parameters()).dtype
    pixels = lambda pictures: torch.stack([transform(picture) for picture in pictures]).to(device, dtype)  # noqa: E731
    return ImageText(model, tokenizer, pixels, images, texts)


def _import_open_clip(name: str) -> Any:
    if find_spec("open_clip") is None:
        raise UsageError(f"{name!r} needs the package open_clip: install it with `pip install vlmprune[open_clip]`.")
    check_torchvision()
    try:
        import open_clip
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(
            f"open_clip is installed but cannot be imported ({first_line(error)}): install it again with `pip install "
            "vlmprune[open_clip]`, and the torchvision that belongs to this torch."
        ) from error
    return open_clip


def _parts(open_clip: Any, name: str) -> tuple[str, str | None]:
    """Name and weights of an open_clip model.

    Raises:
        UsageError: there is no such model, or no such weights; names the nearest.
    """
    text = name.removeprefix(OPEN_CLIP)
    if text.startswith(OWN_PLACE):
        return text, None
    model_name, _, pretrained = text.partition("/")
    if model_name not in open_clip.list_models():
        raise unknown("model of open_clip", model_name, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if not pretrained:
        some = ", ".join(tags[:4]) or "a checkpoint of your own"
        raise UsageError(
            f"{name!r} names no weights, so that they would be random: write {OPEN_CLIP}{model_name}/WEIGHTS with {some}."
        )
    if pretrained not in tags and not Path(pretrained).is_file():
        raise unknown(f"weights of {model_name} in open_clip", pretrained, tags)
    return model_name, pretrained


def _check_reached(open_clip: Any, name: str, model_name: str, pretrained: str | None) -> None:
    """Ask the hub once, with a limit of time, where weights come from there: open_clip itself would try for long.

    Raises:
        UsageError: there is no such folder or repository; or the hub cannot be reached, and the weights are not here.
    """
    if model_name.startswith("local-dir:"):
        folder = Path(model_name.removeprefix("local-dir:")).expanduser()
        if not (folder / "open_clip_config.json").is_file():
            raise UsageError(
                f"no model at {name!r}: the folder has no open_clip_config.json; give one that open_clip has saved."
            )
        return
    if model_name.startswith("hf-hub:"):
        repository = model_name.removeprefix("hf-hub:")
    elif pretrained is None or Path(pretrained).is_file():
        return
    else:
        found = str((open_clip.get_pretrained_cfg(model_name, pretrained) or {}).get("hf_hub", ""))
        repository = "/".join(found.split("/")[:2])
    if not repository:  # from another place than the hub
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        here = [file for file in WEIGHTS if isinstance(try_to_load_from_cache(repository, file), str)]
    except HFValidationError:
        here = []
    hub.look_up(repository, (*here, *WEIGHTS)[0], "model")


# -- transformers ------------------------------------------------------------------------------------------------------


def _transformers(name: str, device: str) -> ImageText:
    source = find(name)
    _check_kind(source)
    check_weights(source)
    import torch
    from torch.nn.functional import normalize
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    reader = source.load("processor", lambda: AutoImageProcessor.from_pretrained(source.place, **source.options))
    tokenizer = source.load("tokenizer", lambda: AutoTokenizer.from_pretrained(source.place, **source.options))
    model = load_weights(AutoModel, source, device)
    longest = model.config.text_config.max_position_embeddings
    padding = "longest" if model.config.model_type == "clip" else "max_length"  # SigLIP was trained on full length

    @torch.no_grad()
    def texts(given: Sequence[str]) -> Tensor:
        ids = tokenizer(list(given), padding=padding, truncation=True, max_length=longest, return_tensors="pt").to(device)
        found = model.get_text_features(**ids)
        return normalize(getattr(found, "pooler_output", found).float(), dim=-1)

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        found = model.get_image_features(pixel_values=pixels)
        return normalize(getattr(found, "pooler_output", found).float(), dim=-1)

    def pixels(pictures: Sequence[Image]) -> Tensor:
        found: Tensor = reader(images=list(pictures), return_tensors="pt")["pixel_values"]
        return found.to(device, model.dtype)

    return ImageText(model, tokenizer, pixels, images, texts)


def _check_kind(source: Source) -> None:
    check_torchvision()
    from transformers import AutoConfig

    config = source.load("config", lambda: AutoConfig.from_pretrained(source.place, **source.options))
    if config.model_type not in TRANSFORMERS:
        raise UsageError(
            f"{source.name!r} is no model of pictures and texts, found a {config.model_type!r}: give a CLIP or SigLIP model of "
            f"transformers, or one of open_clip as {OPEN_CLIP}NAME/PRETRAINED."
        )
