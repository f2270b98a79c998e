"""The main job end to end: a picture, a question, an answer with fewer visual tokens, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmprune import draw, tiny
from vlmprune.adapters.registry import family_of
from vlmprune.errors import UsageError
from vlmprune.handle import Run, wrap
from vlmprune.methods import METHODS, REDISTRIBUTORS
from vlmprune.recipe import Recipe

KEEP_ALL = "random:layer=0,fraction=1"
"""Runs exactly as the un-pruned model does, but is measured by the same clock as the pruned one."""

ROUNDS = 7


def run_demo(recipe: str, images: int, out: Path) -> dict[str, Any]:
    """Ask the embedded VLM one question of each skill in turn, about `images` held-out scenes, and draw what was kept.

    Raises:
        UsageError: the recipe cannot be read or applied.
    """
    from rich.console import Console
    from rich.progress import track

    from vlmprune.tiny.scenes import held_out

    plan = Recipe.of(recipe)
    make_folder(out)
    model, processor = tiny.load()
    answers, drawings, costs = [], [], []
    scenes = list(held_out(images, "test"))
    for number, scene in enumerate(track(scenes, "asking", console=Console(stderr=True), transient=True)):
        whole = draw.kept_patches(scene.image, (1, 1), [0], width=300)
        cells = [draw.captioned(whole, [("what the model sees", "black"), (recipe, "grey")])]
        for question in _one_per_skill(scene.questions, number):
            inputs = processor(images=scene.image, text=tiny.prompt(question.text), return_tensors="pt")
            plain, pruned, kept = compare(model, processor, inputs, plan, max_new_tokens=4)
            answers.append(
                {
                    "picture": number,
                    "question": question.text,
                    "truth": question.answer,
                    "unpruned": plain["answer"],
                    "pruned": pruned["answer"],
                }
            )
            costs.append((plain, pruned))
            picture = draw.kept_patches(scene.image, kept.grid, kept.index, width=300)
            right = pruned["answer"] == question.answer
            lines = [(question.text, "black"), (f"pruned: {pruned['answer']}", "darkgreen" if right else "firebrick")]
            cells.append(draw.captioned(picture, lines))
        drawings.append(draw.side_by_side(cells))
    target = out / "kept.png"
    draw.stacked(drawings).save(target)
    totals = [
        {
            **{key: mean(cost[side][key] for cost in costs) for key in ("visual_tokens", "prefill_ms", "mflops", "kv_kib")},
            "right": sum(row[name] == row["truth"] for row in answers),
        }
        for side, name in enumerate(("unpruned", "pruned"))
    ]
    return {"recipe": recipe, "answers": answers, "unpruned": totals[0], "pruned": totals[1], "picture": str(target)}


def ask_once(
    model_name: str, image: Path, prompt: str, recipe: str, max_new_tokens: int, device: str, target: Path | None
) -> dict[str, Any]:
    """One picture, one question, any supported model.

    Raises:
        UsageError: the picture, the model, the prompt or the recipe cannot be used; says why.
    """
    is_file = recipe.endswith(".json") or (
        recipe.partition(":")[0].strip() not in {**METHODS, **REDISTRIBUTORS} and Path(recipe).exists()
    )
    plan = Recipe.from_pretrained(recipe) if is_file else Recipe.of(recipe)
    if not prompt.strip():
        raise UsageError("the prompt is empty: ask something about the picture.")
    if target is not None:
        if target.suffix.lower() not in Image.registered_extensions():
            raise UsageError(f"cannot draw to {target}: give a file name with a picture's ending, for example kept.png.")
        make_folder(target.parent)
    picture = open_picture(image)
    model, processor = load_model(model_name, device)
    inputs = processor(images=picture, text=prompt_text(processor, prompt), return_tensors="pt").to(device)
    plain, pruned, kept = compare(model, processor, inputs, plan, max_new_tokens)
    if target is not None:
        draw.kept_patches(_as_seen(processor, inputs, picture), kept.grid, kept.index).save(target)
    edits = [{**asdict(edit), "summary": str(edit)} for edit in kept.edits]
    return {
        "model": model_name,
        "recipe": str(plan),
        "unpruned": plain,
        "pruned": pruned,
        "kept": kept.index,
        "edits": edits,
    }


def prepare(
    model_name: str, image: Path, prompt: str, device: str, target: Path
) -> tuple[Any, Any, Image.Image, tuple[int, int] | None]:
    """A model, one picture and question as its inputs, the picture as it sees it, and the grid of its tokens (None if unknown).

    Raises:
        UsageError: the picture, the model, the prompt or the target cannot be used; says why.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty: ask something about the picture.")
    if target.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"cannot draw to {target}: give a file name with a picture's ending, for example sinks.png.")
    make_folder(target.parent)
    picture = open_picture(image)
    model, processor = load_model(model_name, device)
    inputs = processor(images=picture, text=prompt_text(processor, prompt), return_tensors="pt").to(device)
    try:
        grid = family_of(model.config).image_grid(inputs, model.config)[0]
    except UsageError:  # packed from several crops
        grid = None
    return model, inputs, _as_seen(processor, inputs, picture), grid


class KeptHere:
    """Raster indices of what the last stage kept of the first picture, the grid they count in, and what was edited."""

    def __init__(self, run: Run, inputs: Any) -> None:
        assert run.last is not None
        config: Any = run.model.config
        self.grid: tuple[int, int] = family_of(config).image_grid(inputs, config)[0]
        kept = [kept for kept in run.last.kept if kept.ordinal == 0 and kept.sample == 0]
        self.edits = run.report().edits
        self.index: list[int] = kept[-1].index.tolist() if kept else list(range(self.grid[0] * self.grid[1]))


def compare(
    model: Any, processor: Any, inputs: Any, recipe: Recipe, max_new_tokens: int
) -> tuple[dict[str, Any], dict[str, Any], KeptHere]:
    """Answer un-pruned and pruned; prefill times are medians of interleaved rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    sides: list[dict[str, Any]] = [{}, {}]
    for turn in range(ROUNDS):
        for side, plan in enumerate((Recipe.of(KEEP_ALL), recipe)):
            with wrap(model, plan) as run, torch.inference_mode():
                # The first round answers in full; the others only time the prefill.
                tokens = model.generate(**inputs, do_sample=False, max_new_tokens=1 if turn else max_new_tokens)
            report = run.report()
            times[side].append(report.prefill_ms)
            if turn == 0:
                new = tokens[0, inputs["input_ids"].shape[1] :]
                visual = report.stages[-1].kept[0] if side and report.stages else report.visual_tokens
                sides[side] = {
                    "answer": processor.decode(new, skip_special_tokens=True).strip(),
                    "visual_tokens": visual,
                    "mflops": report.flops / 1e6,
                    "kv_kib": report.kv_bytes / 1024,
                }
    for side in (0, 1):
        sides[side]["prefill_ms"] = median(times[side])
    return sides[0], sides[1], KeptHere(run, inputs)


def make_folder(path: Path) -> None:
    """Make a folder for results, before anything is computed.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {path}: give the path of a folder that exists or can be made.") from error


def open_picture(path: Path) -> Image.Image:
    """Read a picture.

    Raises:
        UsageError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"there is no picture at {path}: give the path of an image file.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # unknown, cut off, or not sane
        raise UsageError(f"{path} is not a picture that can be read: give a PNG, JPEG or similar file.") from error


def load_model(name: str, device: str) -> tuple[Any, Any]:
    """A model and its processor; 'tiny' is the embedded one.

    Raises:
        UsageError: nothing loadable is there, the family is not supported, or the device does not exist.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot use device {device!r} on this machine: try cpu, or cuda where there is a GPU.") from error
    if name == "tiny":
        return tiny.load(device)
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        family_of(AutoConfig.from_pretrained(name))  # refuse before gigabytes are read
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        return model.to(device).eval(), AutoProcessor.from_pretrained(name)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"no model at {name!r}: give a folder with a saved model, a hub id, or 'tiny'.") from error


def load_decoder(name: str, gguf: str | None, device: str) -> tuple[Any, Callable[[str], Tensor]]:
    """A model, and what makes `[1, token]` ids of a text for it.

    Raises:
        UsageError: nothing loadable is there, or a package is missing.
    """
    if name == "tiny":
        embedded, processor = tiny.load(device)
        return embedded, lambda text: processor(text=text, return_tensors="pt").input_ids.to(device)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    extra = {} if gguf is None else {"gguf_file": gguf}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **extra)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", **extra)
        except (ValueError, KeyError):  # no VLM
            model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **extra)
    except ImportError as error:
        raise UsageError(f"cannot read {gguf}: install what is missing ({error}).") from error
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"no model at {name!r}: give a folder with a saved model, a hub id, or 'tiny'.") from error
    return model.to(device).eval(), lambda text: tokenizer(text, return_tensors="pt").input_ids.to(device)


def prompt_text(processor: Any, prompt: str) -> str:
    token = getattr(processor, "image_token", None)
    if token and token in prompt:  # the user wrote the whole prompt
        if prompt.count(token) != 1:
            raise UsageError(
                f"image tokens do not match the picture: {prompt.count(token)} {token} for one picture; write one."
            )
        return prompt
    if getattr(processor, "chat_template", None) is None:
        raise UsageError(
            f"the prompt has no image and the processor no chat template: put {token or '<image>'} into the prompt."
        )
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _as_seen(processor: Any, inputs: Any, picture: Image.Image) -> Image.Image:
    """The picture as the model saw it: cropped and resized, where the pixels still form a picture."""
    pixels = inputs["pixel_values"]
    if pixels.ndim != 4:
        return picture
    settings = processor.image_processor
    middle, spread = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
    colours = (pixels[0].float().cpu() * spread + middle).clamp(0, 1) * 255
    return Image.fromarray(colours.round().byte().permute(1, 2, 0).numpy())


def _one_per_skill(questions: Sequence[Any], start: int) -> list[Any]:
    """Three questions of different skills, other ones for every picture."""
    first = {question.skill: question for question in reversed(questions)}
    skills = sorted(first)
    return [first[skills[(3 * start + offset) % len(skills)]] for offset in range(min(3, len(skills)))]
