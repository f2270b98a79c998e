"""What a person reads about a prompt: tokens kept, FLOPs, bytes and times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.cost import compute_average, nominal_average
from vlmprune.errors import UsageError
from vlmprune.live.record import Clock, Edit, Kept, Prefill, place_of
from vlmprune.schedule import Site
from vlmprune.show import units


@dataclass(frozen=True)
class StageReport:
    """What one stage kept: of each picture and video, how many of how many tokens; and how many of each frame of a video, of a
    picture nothing."""

    layer: int
    method: str
    site: Site
    kept: tuple[int, ...]
    original: tuple[int, ...]
    frames: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class EditReport:
    """What one redistribution method did to the prompt.

    Attributes:
        method, layers: its name, and the decoder layers it edits, in order.
        marked: tokens in each of the method's groups 1, 2, …, mean over layers, samples and heads.
        edited: share of rows that were edited, over all heads; None if the method edits no attention.
        moved: share of attention that was moved to other tokens, mean over all rows and heads, edited or not; None likewise.
        scaled: share of heads whose outputs are scaled, mean over layers and samples; None if the method scales none.
    """

    method: str
    layers: tuple[int, ...]
    marked: tuple[float, ...]
    edited: float | None
    moved: float | None
    scaled: float | None = None

    @staticmethod
    def of(method: str, edits: list[Edit]) -> EditReport:
        """The record of all layers in one."""
        codes = [edit.groups for edit in edits if edit.groups is not None]
        heads = [edit.heads for edit in edits if edit.heads is not None]
        groups = max((int(c.max()) for c in codes), default=0)
        marked = tuple(_mean([(c == group).sum(dim=-1).float().mean() for c in codes]) for group in range(1, groups + 1))
        return EditReport(
            method=method,
            layers=tuple(edit.layer for edit in edits),
            marked=marked,
            edited=_over_rows([(edit.changed, edit.valid) for edit in edits]),
            moved=_over_rows([(edit.moved, edit.valid) for edit in edits]),
            scaled=_mean([(factors != 1).float().mean() for factors in heads]) if heads else None,
        )

    def __str__(self) -> str:
        parts = [f"layers {units.spans(self.layers)}" if len(self.layers) > 1 else f"layer {self.layers[0]}"]
        if self.scaled is not None:
            return f"{parts[0]}, {self.scaled:.1%} of heads scaled"
        by_group = ", by group" if len(self.marked) > 1 else ""
        parts.append(f"{' / '.join(f'{count:.1f}' for count in self.marked) or 'no'} tokens marked{by_group}")
        if self.edited is not None and self.moved is not None:
            parts.append(f"{self.edited:.1%} of heads and rows edited, {self.moved:.2%} of attention moved")
        return ", ".join(parts)


@dataclass(frozen=True)
class Report:
    """The last prompt in numbers; `print` shows them as a table.

    FLOPs and bytes are those of the language model for the whole prompt and batch, by the formulas of `vlmprune.cost`. Figures
    named `unpruned` are what the same prompt costs without the recipe. The tower's FLOPs are apart, and 0 where the recipe
    drops no patches there.

    Attributes:
        recipe: as a string.
        batch, prompt_tokens, visual_tokens: rows of the batch; tokens of a row, padding included; visual tokens of all rows.
        newlines, newline_policy: row separators of LLaVA-NeXT, which count as text, and "kept" or "dropped".
        hidden: visual tokens that the call's attention mask hides: no stage may keep them.
        stages: what every stage kept.
        edits: what every redistribution method did.
        neutral: redistribution methods that change nothing with the parameters they have.
        entering: tokens of a row that enter each decoder layer.
        visual_compute_average, visual_nominal_average: visual tokens of a row that enter a decoder layer, and that leave one,
            mean over layers. Papers state either of them.
        flops, flops_unpruned: floating point operations.
        kv_bytes, kv_bytes_unpruned: what the KV cache holds after the prompt.
        kv_bytes_peak: the most it held; more than `kv_bytes` where a stage shortens it, because old and new entries exist side
            by side for a moment.
        static_bytes, static_bytes_unpruned: what the tensors of a static cache take; 0 for another cache.
        prefill_ms: time in the language model, in milliseconds.
        selection_ms: the part of it that choosing and dropping tokens took.
        tower_flops, tower_flops_unpruned: floating point operations of the vision tower and the projector.
        overhead: the same by place; and what was spent inside the vision tower, which is no part of `prefill_ms`.
    """

    recipe: str
    batch: int
    prompt_tokens: int
    visual_tokens: int
    newlines: int
    newline_policy: str
    stages: tuple[StageReport, ...]
    entering: tuple[int, ...]
    visual_compute_average: float
    visual_nominal_average: float
    flops: int
    flops_unpruned: int
    kv_bytes: int
    kv_bytes_unpruned: int
    kv_bytes_peak: int
    prefill_ms: float
    selection_ms: float
    edits: tuple[EditReport, ...] = ()
    overhead: tuple[tuple[str, float], ...] = ()
    hidden: int = 0
    neutral: tuple[str, ...] = ()
    tower_flops: int = 0
    tower_flops_unpruned: int = 0
    static_bytes: int = 0
    static_bytes_unpruned: int = 0

    @staticmethod
    def of(record: Prefill, recipe: str) -> Report:
        """The report of a record. Waits for the GPU."""
        shape, batch = record.shape, record.batch
        full = record.sequence
        stages: dict[tuple[Site, int, str], list[Kept]] = {}
        for kept in record.kept:
            stages.setdefault((kept.site, kept.layer, kept.method), []).append(kept)
        in_tower, in_tower_unpruned = (0, 0) if record.tower_work is None else record.tower_work.flops()
        left = {layer: sum(len(k.index) for k in kept) for (site, layer, _), kept in stages.items() if site != "cache"}
        return Report(
            recipe=recipe,
            batch=batch,
            prompt_tokens=full,
            visual_tokens=record.visual,
            newlines=record.newlines,
            newline_policy="kept" if record.newlines_kept else "dropped",
            stages=tuple(
                StageReport(
                    layer,
                    method,
                    site,
                    tuple(len(k.index) for k in kept),
                    tuple(k.original for k in kept),
                    tuple(k.by_frame for k in kept),
                )
                for (site, layer, method), kept in stages.items()
            ),
            entering=tuple(record.entering),
            visual_compute_average=compute_average(record.visual, shape.layers, left) / batch,
            visual_nominal_average=nominal_average(record.visual, shape.layers, left) / batch,
            flops=batch * shape.flops(record.entering, record.stored),
            flops_unpruned=batch * shape.flops([full] * shape.layers, shape.keys(record.past, full)),
            kv_bytes=batch * shape.kv_bytes(record.resident, record.itemsize),
            kv_bytes_unpruned=batch * shape.kv_bytes(shape.entries(shape.keys(record.past, full)), record.itemsize),
            kv_bytes_peak=batch * record.peak_bytes,
            prefill_ms=record.prefill.ms,
            selection_ms=sum(clock.ms for clock in record.selection),
            edits=tuple(
                EditReport.of(name, [edit for edit in record.edits if edit.method == name])
                for name in dict.fromkeys(edit.method for edit in record.edits)
            ),
            overhead=_by_place([*record.tower, *record.selection]),
            hidden=record.hidden,
            neutral=record.neutral,
            tower_flops=in_tower,
            tower_flops_unpruned=in_tower_unpruned,
            static_bytes=batch * shape.kv_bytes(record.places, record.itemsize) if record.places else 0,
            static_bytes_unpruned=batch * shape.kv_bytes(record.places_unpruned, record.itemsize) if record.places else 0,
        )

    def rows(self) -> list[tuple[str, str]]:
        """The report as lines, each a label and a text."""
        kept = [(f"kept {place_of(s.site, s.layer)} ({s.method})", _each(s)) for s in self.stages]
        higher = self.kv_bytes_peak > self.kv_bytes
        peak = f", {units.size(self.kv_bytes_peak)} before the cache was shortened" if higher else ""
        hidden = [("hidden by the mask", f"{self.hidden} visual tokens, which no stage may keep")] if self.hidden else []
        newlines = [("row separators", f"{self.newlines}, counted as text, {self.newline_policy}")] if self.newlines else []
        both = [("vision tower FLOPs", units.share(self.tower_flops, self.tower_flops_unpruned, units.operations))]
        visual = f"{self.visual_tokens} of them visual" if self.visual_tokens else "no picture found: nothing to prune"
        rows = f"{self.batch} rows of {self.prompt_tokens}" if self.batch > 1 else f"{self.prompt_tokens}"
        return [
            ("recipe", self.recipe),
            ("prompt", f"{rows} tokens, {visual}"),
            *kept,
            *newlines,
            *hidden,
            *((f"redistributed ({edit.method})", str(edit)) for edit in self.edits),
            *((f"redistributed ({name})", "changes nothing with these parameters") for name in self.neutral),
            (
                "visual tokens per prompt",
                f"{self.visual_compute_average:.1f} enter a layer on average, {self.visual_nominal_average:.1f} leave it",
            ),
            *(both if self.tower_flops_unpruned else []),
            ("prefill FLOPs", units.share(self.flops, self.flops_unpruned, units.operations)),
            ("KV cache", units.share(self.kv_bytes, self.kv_bytes_unpruned, units.size) + peak),
            *(
                [("static cache", units.share(self.static_bytes, self.static_bytes_unpruned, units.size))]
                * bool(self.static_bytes)
            ),
            (
                "prefill time",
                f"{units.duration(self.prefill_ms)}, including {units.duration(self.selection_ms)} for choosing and dropping "
                "tokens",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, texts, dicts and lists, for JSON: FLOPs, bytes and milliseconds."""
        return units.plain(asdict(self))

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return "\n".join(f"{label:<{width}}  {value}" for label, value in self.rows())


def _by_place(clocks: list[Clock]) -> tuple[tuple[str, float], ...]:
    places = dict.fromkeys(clock.what for clock in clocks)
    return tuple((place, sum(clock.ms for clock in clocks if clock.what == place)) for place in places)


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


def _over_rows(parts: list[tuple[Tensor | None, Tensor | None]]) -> float | None:
    """Mean over layers, samples, heads and the rows that are no padding; None if there is nothing to average."""
    total = count = 0.0
    for x, valid in parts:
        if x is None:
            continue
        chosen = x if valid is None else x.transpose(1, 2)[valid]
        total, count = total + float(chosen.float().sum()), count + chosen.numel()
    return total / count if count else None


def _each(stage: StageReport) -> str:
    frames = stage.frames or ((),) * len(stage.kept)
    texts = [f"{k} of {n}{_in_frames(of)}" for k, n, of in zip(stage.kept, stage.original, frames, strict=True)]
    if len(set(texts)) == 1:
        kind = "videos" if all(frames) else "pictures"
        return texts[0] + (f" in each of {len(texts)} {kind}" if len(texts) > 1 else "")
    return ", ".join(texts[:8]) + (", …" if len(texts) > 8 else "")


def _in_frames(kept: tuple[int, ...]) -> str:
    """How many tokens the frames of a video keep."""
    if not kept:
        return ""
    least, most = min(kept), max(kept)
    each = f"{least} in each" if least == most else f"{least} to {most} in each"
    return f" ({len(kept)} frame{'s' if len(kept) > 1 else ''}: {each})"


def no_prefill() -> UsageError:
    """The error where the caller ran no prompt under the recipe."""
    return UsageError(
        "nothing to report here: this thread (or this override block) has not run a prompt, or ran its last prompt with the "
        "recipe switched off; run a prompt through the wrapped model first, or ask in the thread that did."
    )
