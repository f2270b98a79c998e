"""Loading what a user names: models, processors, prompts and folders (pictures: `vlmprune.pictures`).

Everything that can be wrong is looked for before the weights are read, and answered with its own reason. torch and
transformers are imported when they are needed, so that a mistake that needs neither is answered at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from vlmprune.errors import UsageError, first_line, shown, unknown
from vlmprune.recipe import hub

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
IMAGE_PART = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
JSON = (
    *("config.json", "generation_config.json", *IMAGE_PART, "video_preprocessor_config.json", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"),
)
TEMPLATES = ("chat_template.jinja",)
PICKLE = b"\x80"
"""How files begin that torch wrote before it wrote archives."""
LFS = b"version https://git-lfs"
HOW = "give a folder with a saved model, a hub id, or 'tiny'"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as the user wrote it.
        folder: the folder, that of the cache if the hub could not be asked; or None for a repository on the hub.
        files: names of the files there.
        options: keyword arguments for every `from_pretrained`.
        unreached: why the hub could not be asked; empty if it could, or need not.
    """

    name: str
    folder: Path | None
    files: frozenset[str]
    options: dict[str, Any]
    unreached: str = ""

    @property
    def place(self) -> str:
        """What `from_pretrained` takes."""
        return self.name if self.folder is None else str(self.folder)

    def lacking(self, what: str, otherwise: UsageError) -> UsageError:
        """The error for what is not there: half a download has another reason, and another remedy, than half a folder."""
        if not self.unreached:
            return otherwise
        return UsageError(
            f"the download of {self.name!r} is not complete: the cache on this machine lacks {what}, and {self.unreached}; try "
            "again with network."
        )


# -- models ----------------------------------------------------------------------------------------------------------------


def load_model(name: str, device: str) -> tuple[Any, Any]:
    """A model and its processor; 'tiny' is the embedded one.

    Raises:
        UsageError: as `open_model`, or the weights are not whole.
    """
    processor, read = open_model(name, device)
    return read(), processor


def open_model(name: str, device: str) -> tuple[Any, Callable[[], Any]]:
    """The processor of a model, and what reads its weights: what has to be asked of the processor can come before.

    Raises:
        UsageError: nothing loadable is there (says what is missing or broken), the family is not supported, or the device does
            not exist.
    """
    check_device(device)
    if name == "tiny":
        from vlmprune import tiny

        model, processor = tiny.load(device)
        return processor, lambda: model
    source = find(name)
    config = read_config(source)
    check_weights(source)
    processor = load_processor(source, config)
    from transformers import AutoModelForImageTextToText

    return processor, lambda: _load_weights(AutoModelForImageTextToText, source, device)


def load_decoder(name: str, gguf: str | None, device: str) -> tuple[Any, Callable[[str], Tensor]]:
    """A model, and what makes `[1, token]` ids of a text for it.

    Raises:
        UsageError: nothing loadable is there, or a package is missing.
    """
    check_device(device)
    if name == "tiny":
        if gguf is not None:
            raise UsageError(f"the embedded model is no GGUF file: give the folder of {gguf} as the model.")
        from vlmprune import tiny

        embedded, processor = tiny.load(device)
        return embedded, lambda text: processor(text=text, return_tensors="pt").input_ids.to(device)
    source = find(name, gguf)
    check_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    extra = {} if gguf is None else {"gguf_file": gguf}
    config = _refusing(source, "config", lambda: AutoConfig.from_pretrained(source.place, **source.options, **extra))
    if gguf is None:
        check_weights(source)
        if source.unreached and not source.files & set(TOKENIZER):
            raise source.lacking("the tokenizer", _no_processor(source, "it lacks a tokenizer"))
    tokenizer = _refusing(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source.place, **source.options, **extra))
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    model = _load_weights(AutoModelForImageTextToText if sees else AutoModelForCausalLM, source, device, **extra)
    return model, lambda text: tokenizer(text, return_tensors="pt").input_ids.to(device)


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UsageError: it does not exist, or torch does not know its name.
    """
    import torch

    try:
        if torch.empty(0, device=device).is_meta:
            raise UsageError(f"the device {device!r} holds shapes and no numbers: try cpu, or cuda where there is a GPU.")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"cannot use device {device!r} on this machine: try cpu, or cuda where there is a GPU.") from error


def check_torchvision() -> None:
    """torchvision is not needed; one that does not fit torch breaks transformers' imports in obscure places.

    Raises:
        UsageError: it is installed and cannot be imported.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(
            f"torchvision is installed but does not fit this torch ({first_line(error)}): uninstall it (pictures need none), "
            "or install the version that belongs to this torch."
        ) from error


# -- where it is -----------------------------------------------------------------------------------------------------------


def find(name: str, gguf: str | None = None) -> Source:
    """A folder, or a repository on the hub that can be reached or is in the cache.

    Raises:
        UsageError: neither; says which of the reasons it is.
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
        raise UsageError(f"no model at {name!r}: the folder cannot be read ({error.strerror}).") from error
    source = Source(name, folder, files, {"local_files_only": True, "trust_remote_code": False})
    if gguf is not None:
        if gguf not in files:
            near = unknown("GGUF file", gguf, [file for file in files if file.endswith(".gguf")])
            raise UsageError(f"no model at {name!r}: {near}")
        if find_spec("gguf") is None:
            raise UsageError(f"cannot read {gguf}: install what is missing (the package gguf, `pip install gguf`).")
        return source
    if "config.json" in files:
        return source
    if "adapter_config.json" in files:
        why = (
            "it holds a PEFT adapter, not a model: load it on its base model in Python, or save the two merged "
            "(merge_and_unload().save_pretrained(…))"
        )
    elif any(file.endswith(".gguf") for file in files):
        why = "it holds GGUF files only, which transformers cannot load as a VLM: give a folder with config.json and weights"
    else:
        below = sorted(file.parent.name for file in folder.glob("*/config.json"))
        why = f"the folder has no config.json, {f'but {below[0]}/ in it has: give that' if below else HOW}"
    raise UsageError(f"no model at {name!r}: {why}.")


def _on_hub(name: str) -> Source:
    repository = hub.ask(name, "config.json", "model")
    files = repository.files
    if "config.json" not in files:
        what = "holds GGUF files only" if any(file.endswith(".gguf") for file in files) else "has no config.json"
        raise UsageError(f"no model at {name!r}: the repository {what}; give one with config.json and transformers' weights.")
    options = {"trust_remote_code": False, **repository.options}
    return Source(name, repository.folder, files, options, repository.unreached)


# -- what is there ---------------------------------------------------------------------------------------------------------


def read_config(source: Source) -> Any:
    """The config, of a supported family.

    Raises:
        UsageError: it is broken, or the family is not supported.
    """
    check_torchvision()
    from transformers import AutoConfig, PretrainedConfig

    from vlmprune.adapters.registry import family_of

    _check_json(source)
    found = _refusing(source, "config", lambda: PretrainedConfig.get_config_dict(source.place, **source.options)[0])
    if "model_type" not in found:
        raise UsageError(f"config.json of {source.name!r} names no model_type: it is no config of a transformers model.")
    try:
        config = _refusing(source, "config", lambda: AutoConfig.from_pretrained(source.place, **source.options))
    except UsageError:
        family_of(SimpleNamespace(**found))  # one that transformers does not know either
        raise
    family_of(config)
    return config


def _check_json(source: Source) -> None:
    if source.folder is None:
        return
    for path in (source.folder / name for name in (*JSON, *TEMPLATES) if name in source.files):
        try:
            text = path.read_text(encoding="utf-8")
            broken = _broken(path.name, text)
        except (OSError, ValueError) as error:
            broken = first_line(error)
        if broken:
            raise UsageError(f"{path} is broken ({broken}): fetch or save the model again.")


def _broken(name: str, text: str) -> str:
    """What is wrong with a file's text, or nothing."""
    if text.startswith(LFS.decode()):
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


def check_weights(source: Source) -> None:
    """Look at the weights without reading them: they are there, whole, and no pointers to files that were not fetched.

    Raises:
        UsageError: says which file is missing or broken.
    """
    present = [name for name in WEIGHTS if name in source.files]
    if not present:
        none = UsageError(f"{source.name!r} has a config but no weights: looked for {', '.join(WEIGHTS)}.")
        raise source.lacking("the weights", none)
    if source.folder is None:
        return
    first = source.folder / present[0]
    files = [first]
    if first.suffix == ".json":
        try:
            named = sorted(set(json.loads(first.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{first} is broken ({first_line(error)}): fetch or save the model again.") from error
        if missing := [name for name in named if name not in source.files]:
            lacks = f"{len(missing)} of {len(named)} files with weights (such as {missing[0]})"
            raise source.lacking(lacks, UsageError(f"{source.name!r} lacks {lacks}: fetch them."))
        files = [source.folder / name for name in named]
    for file in files:
        _check_file(file)


def _check_file(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS))
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}).") from error
    if start == LFS:
        raise UsageError(f"{file} is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`.")
    if not start:
        raise UsageError(f"{file} is empty: fetch or save the model again.")
    if file.suffix == ".bin" and not is_zipfile(file) and not start.startswith(PICKLE):
        raise UsageError(f"{file} is broken or cut off (it is no archive of torch): fetch or save the model again.")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt"):  # reads the header, and compares it with the length of the file
                pass
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} is broken or cut off ({first_line(error)}): fetch or save the model again.") from error


def load_processor(source: Source, config: Any) -> Any:
    """The processor; images need no torchvision, so that one for videos is left out where it is missing.

    Raises:
        UsageError: there is none, or a file of it is missing or broken.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    from vlmprune.adapters.registry import family_of

    if absent := [names[0] for names in (IMAGE_PART, TOKENIZER) if not source.files & set(names)]:
        lacks = " and ".join(absent)
        raise source.lacking(lacks, _no_processor(source, f"it lacks {lacks}"))
    known: Any = PROCESSOR_MAPPING.get(type(config), None)
    reader: Any = AutoProcessor
    if known is not None and "video_processor" in known.get_attributes() and find_spec("torchvision") is None:
        reader = _for_images(known)
    processor = _refusing(source, "processor", lambda: reader.from_pretrained(source.place, **source.options))
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise _no_processor(source, f"found only {type(processor).__name__}")
    token, wanted_id = processor.image_token, family_of(config).image_token(config)
    if (found_id := processor.tokenizer.convert_tokens_to_ids(token)) != wanted_id:
        raise UsageError(
            f"the processor and the model of {source.name!r} do not belong together: a picture's {token} is token {found_id}, "
            f"but {wanted_id} in config.json; save the base model's processor beside it."
        )
    if getattr(processor, "patch_size", 0) is None:
        raise UsageError(
            f"the processor of {source.name!r} has no patch_size (an old transformers saved it): set processor.patch_size = "
            f"{getattr(config.vision_config, 'patch_size', 14)} and save it again."
        )
    return processor


def _for_images(processor: Any) -> Any:
    """A processor's class without its part for videos, which needs torchvision."""

    class ForImages(processor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    ForImages.__name__ = ForImages.__qualname__ = processor.__name__  # what a saved folder names
    return ForImages


def _no_processor(source: Source, why: str) -> UsageError:
    return UsageError(
        f"{source.name!r} has a model but no whole processor: {why}; save the base model's beside it, "
        "AutoProcessor.from_pretrained(base).save_pretrained(folder)."
    )


def _refusing(source: Source, part: str, load: Callable[[], Any]) -> Any:
    """Call a `from_pretrained`; what it raises becomes one sentence with the true reason."""
    try:
        return load()
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(f"the {part} of {source.name!r} needs a package that is missing: {first_line(error)}.") from error
    except Exception as error:  # transformers raises whatever a broken file makes it raise
        if part == "processor" and isinstance(error, OSError):
            raise _no_processor(source, first_line(error)) from error
        raise UsageError(f"the {part} of {source.name!r} cannot be loaded: {first_line(error)}") from error


def _load_weights(auto: Any, source: Source, device: str, **extra: Any) -> Any:
    """The model, whole.

    Raises:
        UsageError: weights are missing, are not used, have another shape than the config says, or do not fit the device.
    """
    import torch

    options = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True, **source.options, **extra}
    model, found = _refusing(source, "model", lambda: auto.from_pretrained(source.place, **options))
    if differing := sorted(found["mismatched_keys"]):
        name, stored, wanted = differing[0]
        raise UsageError(
            f"the weights of {source.name!r} do not fit its config.json: {len(differing)} tensors have another shape (such as "
            f"{name}: {list(stored)}, by the config {list(wanted)}); they do not belong together."
        )
    if unused := sorted(found["unexpected_keys"]):  # transformers leaves out those that a model class calls ignorable
        raise UsageError(
            f"the weights of {source.name!r} hold {len(unused)} tensors that its config.json has no place for (such as "
            f"{unused[0]}); the model would run without them: fetch the config.json that belongs to these weights."
        )
    if absent := sorted(found["missing_keys"]):
        raise UsageError(
            f"the weights of {source.name!r} lack {len(absent)} of the model's tensors (such as {absent[0]}); they would be "
            "random numbers: fetch or save the model again."
        )
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{source.name!r} does not fit the memory of {device}: take a smaller model or another device."
        ) from error


# -- prompts, folders, packages -----------------------------------------------------------------------------------------------


def prompt_text(processor: Any, prompt: str) -> str:
    """The whole prompt of a question about one picture: by the chat template, unless it has the image token already.

    Raises:
        UsageError: it is empty, has several image tokens, or the template cannot place a picture.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty: ask something about the picture.")
    token = getattr(processor, "image_token", None)
    if token and token in prompt:  # the user wrote the whole prompt
        if prompt.count(token) != 1:
            raise UsageError(
                f"image tokens do not match the picture: {prompt.count(token)} {token} for one picture; write one."
            )
        return prompt
    advice = f"put {token or '<image>'} into the prompt, and write it whole"
    if getattr(processor, "chat_template", None) is None:
        raise UsageError(f"the prompt has no image and the processor no chat template: {advice}.")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    import jinja2

    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UsageError(f"the processor's chat template fails on a picture ({first_line(error)}): {advice}.") from error
    if token and text.count(token) != 1:
        raise UsageError(f"the processor's chat template places {text.count(token)} pictures instead of one: {advice}.")
    return text


def make_inputs(processor: Any, picture: Image.Image, text: str, device: str) -> Any:
    """One picture and its whole prompt as a model takes them.

    Raises:
        UsageError: the processor cannot take the picture or the prompt; says why.
    """
    try:
        return processor(images=picture, text=text, return_tensors="pt").to(device)
    except (ValueError, TypeError) as error:
        size = f"{picture.width} × {picture.height} pixels"
        raise UsageError(f"the processor cannot take this picture of {size} and prompt: {first_line(error)}.") from error


def make_folder(path: Path) -> None:
    """Make a folder for results, before anything is computed.

    Raises:
        UsageError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: give the path of a folder that exists or can be made.") from error
    try:
        with TemporaryFile(dir=path):  # permissions alone do not tell: a file system may be read-only
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {path} ({error.strerror}): give the path of a folder that you may write to."
        ) from error


def check_target(path: Path, example: str, figure: bool = False) -> None:
    """Make room for a picture that is to be drawn, before anything is computed.

    Args:
        path: of the file.
        example: of a file's name, for the error's sentence.
        figure: whether matplotlib writes it, else Pillow; they know other formats.

    Raises:
        UsageError: its name has no ending of a picture that can be written, or it cannot be written there.
    """
    try:
        if path.suffix:
            (_write_figure if figure else _write_picture)(path.suffix.lower())
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        why = first_line(error)
    else:
        why = "" if path.suffix else "it has no ending"
    if why:
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


def _write_picture(ending: str) -> None:
    """One pixel in a format, as `PIL.Image.Image.save` would write it: that Pillow knows an ending does not say that it can."""
    from PIL import Image

    Image.init()
    if ending not in Image.registered_extensions():
        raise ValueError(f"no picture has the ending {ending}")
    Image.new("RGB", (1, 1)).save(BytesIO(), Image.registered_extensions()[ending])


def _write_figure(ending: str) -> None:
    from matplotlib.figure import Figure

    Figure(figsize=(1, 1)).savefig(BytesIO(), format=ending[1:])


def check_packages(names: Iterable[str]) -> None:
    """Refuse before anything is computed what a missing package would refuse afterwards.

    Raises:
        UsageError: says what to install.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        wanted = " ".join(missing)
        raise UsageError(f"drawing figures needs {wanted}: install it with `pip install {wanted}`.")
