"""What a person reads of a prefill: tokens, FLOPs, bytes and times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.cost import compute_average, nominal_average
from vlmprune.errors import UsageError
from vlmprune.live.record import Clock, Edit, Kept, Prefill
from vlmprune.schedule import Budget, Site, Stage
from vlmprune.show import units


@dataclass(frozen=True)
class StageReport:
    """One stage: per picture, how many of the original tokens were kept."""

    layer: int
    method: str
    site: Site
    kept: tuple[int, ...]
    original: tuple[int, ...]


@dataclass(frozen=True)
class EditReport:
    """What redistribution did to the prompt, over all its layers.

    Attributes:
        layers: the layers, in order.
        marked: tokens in each of the method's groups 1, 2, …, mean over layers, samples and heads.
        edited: share of heads and rows that were edited, or None where every row of the method's kind is.
        moved: attention that went elsewhere, mean over heads and rows, edited or not; None if not known.
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
        marks = [s.groups for s in edits if s.groups is not None]
        heads = [s.heads for s in edits if s.heads is not None]
        groups = max((int(c.max()) for c in marks), default=0)
        marked = tuple(_mean([(c == group).sum(dim=-1).float().mean() for c in marks]) for group in range(1, groups + 1))
        return EditReport(
            method=method,
            layers=tuple(s.layer for s in edits),
            marked=marked,
            edited=_over_rows([(s.changed, s.valid) for s in edits]),
            moved=_over_rows([(s.moved, s.valid) for s in edits]),
            scaled=_mean([(factors != 1).float().mean() for factors in heads]) if heads else None,
        )

    def __str__(self) -> str:
        parts = [f"layers {units.spans(self.layers)}" if len(self.layers) > 1 else f"layer {self.layers[0]}"]
        if self.scaled is not None:
            return f"{parts[0]}, {self.scaled:.1%} of heads scaled"
        parts.append(f"{' / '.join(f'{count:.1f}' for count in self.marked) or 'no'} tokens marked")
        if self.edited is not None and self.moved is not None:
            parts.append(f"{self.edited:.1%} of heads and rows edited, {self.moved:.2%} of their attention moved")
        return ", ".join(parts)


@dataclass(frozen=True)
class Report:
    """The last prefill in numbers. FLOPs and bytes are of the language model's prefill, for the whole batch (`vlmprune.cost`
    has the formula); the un-pruned figures are of the same prompt. `print` shows it as a table.

    Attributes:
        kv_bytes, kv_bytes_peak: what the KV cache holds after prefill, and the most it held; more where a stage shortens it,
            whose old and new entries exist side by side for a moment.
        hidden: visual tokens that the call's own attention mask hid.
        neutral: redistribution methods that change nothing with the parameters they have.
        selection_ms: choosing and shortening, a part of `prefill_ms`.
        overhead: the same by place, in milliseconds; and looking and shortening inside the vision tower, which is no part of
            `prefill_ms`.
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

    @staticmethod
    def of(record: Prefill, recipe: str) -> Report:
        shape, batch = record.shape, record.batch
        full = record.sequence
        stages: dict[tuple[Site, int, str], list[Kept]] = {}
        for kept in record.kept:
            stages.setdefault((kept.site, kept.layer, kept.method), []).append(kept)
        left = {layer: sum(len(k.index) for k in kept) for (site, layer, _), kept in stages.items() if site != "cache"}
        return Report(
            recipe=recipe,
            batch=batch,
            prompt_tokens=full,
            visual_tokens=record.visual,
            newlines=record.newlines,
            newline_policy="kept" if record.newlines_kept else "dropped",
            stages=tuple(
                StageReport(layer, method, site, tuple(len(k.index) for k in kept), tuple(k.original for k in kept))
                for (site, layer, method), kept in stages.items()
            ),
            entering=tuple(record.entering),
            visual_compute_average=compute_average(record.visual, shape.layers, left) / batch,
            visual_nominal_average=nominal_average(record.visual, shape.layers, left) / batch,
            flops=batch * sum(map(shape.layer_flops, record.entering, record.stored)),
            flops_unpruned=batch * shape.layers * shape.layer_flops(full, record.past + full),
            kv_bytes=batch * sum(shape.layer_kv_bytes(keys, record.itemsize) for keys in record.resident),
            kv_bytes_unpruned=batch * shape.layers * shape.layer_kv_bytes(record.past + full, record.itemsize),
            kv_bytes_peak=batch * shape.layer_kv_bytes(record.peak, record.itemsize),
            prefill_ms=record.prefill.ms,
            selection_ms=sum(clock.ms for clock in record.selection),
            edits=tuple(
                EditReport.of(name, [s for s in record.edits if s.method == name])
                for name in dict.fromkeys(s.method for s in record.edits)
            ),
            overhead=_by_place([*record.tower, *record.selection]),
            hidden=record.hidden,
            neutral=record.neutral,
        )

    def rows(self) -> list[tuple[str, str]]:
        """The report as labelled lines."""
        kept = [(f"kept at {_place(s)} ({s.method})", _each(s.kept, s.original)) for s in self.stages]
        higher = self.kv_bytes_peak > self.kv_bytes
        peak = f", {units.size(self.kv_bytes_peak)} before the cache was shortened" if higher else ""
        hidden = [("hidden by the mask", f"{self.hidden} visual tokens, no candidates of any budget")] if self.hidden else []
        newlines = [("row separators", f"{self.newlines}, counted as text, {self.newline_policy}")] if self.newlines else []
        seen = f"{self.visual_tokens} visual" if self.visual_tokens else "no picture found: nothing to prune"
        return [
            ("recipe", self.recipe),
            ("prompt", f"{self.batch} × {self.prompt_tokens} tokens, {seen}"),
            *kept,
            *newlines,
            *hidden,
            *((f"redistributed ({edit.method})", str(edit)) for edit in self.edits),
            *((f"redistributed ({name})", "changes nothing with these parameters") for name in self.neutral),
            (
                "visual tokens per layer",
                f"{self.visual_compute_average:.1f} entering on average, {self.visual_nominal_average:.1f} leaving",
            ),
            ("prefill FLOPs", units.share(self.flops, self.flops_unpruned, units.operations)),
            ("KV cache", units.share(self.kv_bytes, self.kv_bytes_unpruned, units.size) + peak),
            (
                "prefill time",
                f"{units.duration(self.prefill_ms)}, of which choosing and shortening {units.duration(self.selection_ms)}",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, texts, dicts and lists, for JSON: bytes, FLOPs and milliseconds."""
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
    """Mean over layers, samples, heads and rows that count."""
    total = count = 0.0
    for x, valid in parts:
        if x is None:
            continue
        chosen = x if valid is None else x.transpose(1, 2)[valid]
        total, count = total + float(chosen.float().sum()), count + chosen.numel()
    return total / count if count else None


def _place(stage: StageReport) -> str:
    return Stage(stage.layer, Budget(fraction=1.0), stage.site).place


def _each(kept: tuple[int, ...], original: tuple[int, ...]) -> str:
    pairs = list(zip(kept, original, strict=True))
    if len(set(pairs)) == 1:
        return f"{kept[0]} of {original[0]}" + (f" in each of {len(pairs)} pictures" if len(pairs) > 1 else "")
    return ", ".join(f"{k} of {n}" for k, n in pairs[:8]) + (", …" if len(pairs) > 8 else "")


def no_prefill() -> UsageError:
    return UsageError(
        "nothing to report here: this thread, or this override block, has run no prompt, or ran its last one switched off; run "
        "the wrapped model on a prompt first, or ask for the report in the thread that did."
    )
