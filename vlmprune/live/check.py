"""`vlmprune.check`: is a pruned run exact, on the user's own model, prompt and recipe?

The judge is the un-pruned model itself (`judge.py`). What the pruned run merged, or made in the vision tower, is taken from it:
the judge starts from these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmprune.adapters.registry import image_tower_of
from vlmprune.errors import UsageError
from vlmprune.live.attachment import attachment_of
from vlmprune.live.finder import choose_family
from vlmprune.live.handle import wrap
from vlmprune.live.judge import Claim, Judge
from vlmprune.live.record import Prefill
from vlmprune.live.shells import model_inside, without_shells
from vlmprune.methods import Pruner
from vlmprune.recipe import Recipe
from vlmprune.schedule import IN_TOWER

RELATIVE = 5e-5
"""Largest difference in single precision, as a share of the logits' standard deviation."""
MEANINGFUL = 5.0
"""Pruning must move the logits by so many tolerances, or the comparison says nothing."""


@dataclass(frozen=True)
class Verdict:
    """What `check` found. `print` shows it.

    Attributes:
        verdict: "exact", "not exact", or "undecided" where pruning moved the logits too little to say.
        difference: the largest between the logits of the pruned run and the judge's.
        row, step: where: row of the batch, and number of the new token.
        tolerance: the largest that counts as exact.
        against: what the tolerance is measured by, in words.
        moved: the largest difference between the pruned run and the un-pruned model.
        noise: the largest between the un-pruned model and itself, without its cache or with numbers rounded otherwise.
        keep_all: a recipe that keeps every token is bit-identical to the plain model; None if the plain model does not repeat
            its own numbers.
        restored: the model is bit-identical after the recipe was removed; None likewise.
        judge: "masked" or "dropped".
        recipe: what was checked.
        rows, steps: size of the batch, and number of new tokens.
        kept: by decoder layer of each stage, how many visual tokens were kept, and of how many.
        frames: likewise, in how many frames of videos a token was kept, and of how many; empty without videos.
        text_lost: tokens that are no placeholders of pictures, and were dropped; with any, the verdict is "not exact".
    """

    verdict: Literal["exact", "not exact", "undecided"]
    difference: float
    row: int
    step: int
    tolerance: float
    against: str
    moved: float
    noise: float
    keep_all: bool | None
    restored: bool | None
    judge: Literal["masked", "dropped"]
    recipe: str
    rows: int
    steps: int
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)
    text_lost: int = 0
    frames: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Everything that can be judged is as promised."""
        return self.verdict == "exact" and self.keep_all is not False and self.restored is not False

    def _frames(self, layer: int) -> list[tuple[int, int]]:
        return [self.frames[layer]] if layer in self.frames else []

    @property
    def _where(self) -> str:
        return f"sample {self.row}, new token {self.step}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        shares = ", ".join(
            f"{left} of {whole} before layer {layer}" + "".join(f" (in {n} of {of} frames)" for n, of in self._frames(layer))
            for layer, (left, whole) in self.kept.items()
        )
        hidden = "masked" if self.judge == "masked" else "cut out"
        what = {
            "exact": f"exact: {self.recipe} computes what the un-pruned model computes with the same tokens {hidden}",
            "not exact": f"NOT EXACT: {self.recipe} differs from the un-pruned model with the same tokens {hidden}",
            "undecided": f"undecided: {self.recipe} moves the logits of this prompt too little to tell; take another prompt",
        }[self.verdict]
        return "\n".join(
            (
                what,
                f"  largest difference   {self.difference:.2g}, allowed {self.tolerance:.2g}: {self._where}",
                f"  measured against     {self.against}",
                f"  pruning moved        {self.moved:.2g}, over {self.rows} sample(s) × {self.steps} new tokens",
                f"  visual tokens kept   {shares}",
                *([f"  TEXT TOKENS LOST     {self.text_lost}: only visual tokens may be dropped"] if self.text_lost else []),
                f"  keeping everything   {_said(self.keep_all)}",
                f"  after removing it    {_said(self.restored)}",
            )
        )


def _said(same: bool | None) -> str:
    if same is None:
        return "cannot be judged: the plain model itself gives other numbers each time"
    return "bit-identical to the plain model" if same else "NOT bit-identical to the plain model"


def check(
    model: nn.Module,
    inputs: Mapping[str, Any],
    recipe: Recipe | Pruner | str = "random:layer=0,fraction=0.5",
    *,
    new_tokens: int = 6,
    family: str | None = None,
) -> Verdict:
    """Compare a pruned run with the un-pruned model, on a model, prompt and recipe of your own. The model stays as it is.

    Args:
        model: as for `wrap`, not wrapped, in evaluation mode, with SDPA or eager attention.
        inputs: what the processor returned for a prompt with pictures; padded batches are padded on the left.
        recipe: what to check. It drops tokens; methods that redistribute attention compute something else on purpose.
        new_tokens: how many tokens to generate: one from the prompt, the others in decoding steps.
        family: as for `wrap`.

    Returns:
        The verdict. `print` shows the largest difference, and what it is measured against.

    Raises:
        UsageError: the recipe, the model or the prompt is not one that can be checked.
    """
    whole = Recipe.of(recipe)
    layers = sorted({0, *(stage.layer for stage, _ in whole.stages() if stage.site == "llm")})
    keep_all = f"random:layer={'|'.join(map(str, layers))},fraction={'|'.join('1' for _ in layers)}"
    if (tower := image_tower_of(without_shells(model))) is not None:
        raise UsageError(
            f"check compares answers to a prompt, and {tower.name} has no language model: measure what a recipe loses with "
            "`vlmprune eval`."
        )
    inside = model_inside(model)
    described = choose_family(inside, family)[0]
    judge = Judge(inside, dict(inputs), new_tokens, None if described.injected is None else described.injected.features)
    _check_usable(inside, judge, whole)
    wrap(model, whole, family=family).remove()  # refuses what cannot work
    with torch.no_grad():
        plain = judge.generate()
        repeats = torch.equal(judge.generate().logits, plain.logits)
        with wrap(model, keep_all, family=family):
            same = torch.equal(judge.generate().logits, plain.logits)
        with wrap(model, whole, family=family) as run, judge.watch_stages(run):
            pruned = judge.generate()
            record: Any = run.last
        restored = torch.equal(judge.generate().logits, plain.logits)
        claim = _claim(record, whole, judge)
        expected = judge.generate(pruned.tokens, claim)
        unpruned, cached = judge.generate(pruned.tokens, Claim({}, {})), judge.generate(pruned.tokens)
        shaken = judge.generate(pruned.tokens, Claim({}, {}), shaken=True)
    distances = (pruned.logits - expected.logits).abs().amax(dim=-1)  # [row, step]
    worst = int(distances.argmax())
    difference, moved = float(distances.max()), _apart(pruned.logits, unpruned.logits)
    noise = max(_apart(unpruned.logits, cached.logits), _apart(unpruned.logits, shaken.logits))
    tolerance, against = _tolerance(judge.dtype, pruned.logits, noise)
    tokens = {described.image_token(inside.config)}
    if described.videos is not None:
        tokens.add(described.videos.token(inside.config))
    lost = _text_lost(claim, judge, tokens)
    verdict: Any = "exact" if difference <= tolerance and not lost else "not exact"
    if verdict == "exact" and moved < MEANINGFUL * tolerance:
        verdict = "undecided"
    assert record is not None
    return Verdict(
        verdict=verdict,
        difference=difference,
        row=worst // distances.shape[1],
        step=worst % distances.shape[1],
        tolerance=tolerance,
        against=against,
        moved=moved,
        noise=noise,
        keep_all=same if repeats else None,
        restored=restored if repeats else None,
        judge="dropped" if judge.recurrent else "masked",
        recipe=str(whole),
        rows=record.batch,
        steps=new_tokens,
        kept=_counts(record),
        frames=_frame_counts(record),
        text_lost=lost,
    )


def _text_lost(claim: Claim, judge: Judge, placeholders: set[int]) -> int:
    """How many tokens a claim drops that are no placeholders."""
    lost = torch.zeros_like(judge.real)
    for mask in (*claim.keep.values(), *claim.keep_cache.values()):
        lost |= ~mask[:, : judge.prompt].to(lost.device)
    visual = torch.isin(judge.ids, torch.tensor(sorted(placeholders), device=judge.ids.device))
    return int((lost & judge.real & ~visual).sum())


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _tolerance(dtype: torch.dtype, logits: Tensor, noise: float) -> tuple[float, str]:
    deviation = float(logits.std())
    if dtype in (torch.float32, torch.float64):
        return RELATIVE * deviation, f"{RELATIVE:g} of the logits' standard deviation, {deviation:.2g}"
    kind = str(dtype).removeprefix("torch.")
    return noise, (
        f"the rounding of {kind}: by so much the un-pruned model differs from itself with and without its cache, or with "
        "numbers rounded otherwise (a model in float32 is judged more sharply)"
    )


def _counts(record: Prefill) -> dict[int, tuple[int, int]]:
    counts = {}
    for layer in record.keep:
        kept = [image for image in record.kept if image.layer == layer and image.site != "cache"]
        counts[layer] = (sum(len(image.index) for image in kept), sum(image.original for image in kept))
    return counts


def _frame_counts(record: Prefill) -> dict[int, tuple[int, int]]:
    counts = {}
    for layer in record.keep:
        frames = [n for kept in record.kept if kept.layer == layer and kept.site != "cache" for n in kept.by_frame]
        if frames:
            counts[layer] = (sum(n > 0 for n in frames), len(frames))
    return counts


def _check_usable(model: Any, judge: Judge, recipe: Recipe) -> None:
    """Refuse what cannot be compared."""
    attached = attachment_of(getattr(model, "base_model", model))
    if attached is not None and attached.current is not None:
        raise UsageError(
            "the model is wrapped, and check wraps it itself: call run.remove(), or vlmprune.unwrap(model), first."
        )
    if recipe.redistributors:
        raise UsageError(
            f"check compares what pruning leaves, but {recipe.redistributors[0].name} redistributes attention, which computes "
            "something else on purpose: leave it out of the recipe."
        )
    if model.training:
        raise UsageError("check compares numbers, but the model is in training mode, with dropout: call model.eval() first.")
    implementation = judge.text_model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UsageError(
            f"check hides tokens by masks of cells, which {implementation!r} does not take: call "
            'model.set_attn_implementation("sdpa") for the check.'
        )
    if judge.ids is None:
        raise UsageError("check generates from token ids: pass input_ids among the inputs, as a processor returns them.")
    if judge.recurrent and (len(judge.ids) > 1 or not judge.real.all()):
        raise UsageError(
            "the model has recurrent layers, for which check cuts rows out of one sample without padding: pass one sample."
        )
    if not bool(judge.real[:, -1].all()):
        raise UsageError("check generates behind the prompt: pad the batch on the left.")


def _claim(record: Prefill | None, recipe: Recipe, judge: Judge) -> Claim:
    """Raises:
    UsageError: there was nothing to drop, or what was merged cannot be told apart.
    """
    if record is None or not record.visual:
        raise UsageError("the prompt has no picture, and there is nothing to check: pass pixel_values and their placeholders.")
    if not any((mask != judge.real.to(mask.device)).any() for mask in (*record.keep.values(), *record.keep_cache.values())):
        raise UsageError(f"{recipe} keeps every token of this prompt, and there is nothing to check: give it a smaller budget.")
    made = {image.layer for image in record.kept if image.features is not None or image.site in IN_TOWER}
    if made and record.batch > 1:
        raise UsageError(f"{recipe} makes features of its own, which check follows for one sample only: pass one sample.")
    compact = {
        image.layer
        for image in record.kept
        for method in recipe.methods
        if isinstance(method, Pruner) and method.name == image.method.split()[0] and method.positions == "compact"
    }
    keep = {layer: mask[:, : judge.prompt] for layer, mask in record.keep.items()}
    entered = {layer: judge.entered[layer] for layer in made if layer in keep}
    injected = judge.injected if any(image.site in IN_TOWER for image in record.kept) else {}
    return Claim(keep, record.keep_cache, entered, frozenset(compact & set(keep)), injected)
