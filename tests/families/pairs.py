"""A method on a family: it keeps its contract on the family's tiny model, or is refused in a sentence that says why."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from cases import ROWS, VAR
from families.oracles import MOVED, TOLERANCE, expected_logits
from families.running import generate
from families.table import TINY, make_inputs, make_single, shared

import vlmprune as vp

CLS = {"llava", "llava_next", "llava_next_video", "internvl"}
"""Families whose tower has a CLS token that methods may use."""
UNITS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v"}
"""Families whose tower merges squares of patches into tokens."""
PATCHES = (CLS | UNITS) - {"internvl"}
"""Families where patches can be dropped before the vision tower."""
VANISHING = {
    "act": "beta=0.9999999,alpha=0",
    "pai": "alpha=1e-7",
    "paint": "alpha=1e-7,beta=1e-7",
    "var": "p=1e-7,sink_dims=5",
    "vhr": "alpha=1.0000001",
    "zerotuning": "gain=1.0000001",
}
"""Arguments under which a redistribution edits, and changes almost nothing: the attention it computes is the model's own."""
STRONG = {"var": VAR.replace("5|40", "5|20")}
"""Arguments that change what is computed, where those of wider models do not fit."""
FULL = dict.fromkeys(("gemma3", "gemma4", "gemma4_moe", "aya_vision", "cohere2_vision"), "2|5")
FULL |= {"gemma4_e": "1|3", "paligemma2": "1|3|5", "qwen3_5": "1|5", "qwen3_5_moe": "1|5", "lfm2_vl": "1|4"}
"""Layers whose attention sees the whole conversation, and has keys of its own, of families that also have others."""


@dataclass(frozen=True)
class Pair:
    """A method on a family."""

    family: str
    method: str
    layers: str = ""

    @property
    def id(self) -> str:
        return f"{self.family}-{self.method}" + (f"-layers={self.layers}" if self.layers else "")

    @property
    def third(self) -> bool:
        return zlib.crc32(self.id.encode()) % 3 == 0


def _softcap(pair: Pair) -> bool:
    return pair.family == "paligemma2" and pair.method in ("adaptinfer", "dart", "fastv", "pdrop", "sparsevlm")


REFUSED: list[tuple[str, Callable[[Pair], bool]]] = [
    ("needs the attention of the vision tower's CLS token", lambda pair: ROWS[pair.method].cls and pair.family not in CLS),
    (
        "needs a CLS token or merge units in the vision tower",
        lambda pair: pair.method == "flowcut" and pair.family not in CLS | UNITS,
    ),
    ("how patches enter that of", lambda pair: pair.method == "pixelprune" and pair.family not in PATCHES),
    ("this one needs all to its end", lambda pair: (pair.family, pair.method) == ("internvl", "mustdrop")),
    ("needs all of them up to its end", lambda pair: (pair.family, pair.method) == ("internvl", "evit")),
    ("adds softcap", _softcap),
    ("has no attention", lambda pair: TINY[pair.family].recurrent and pair.method == "pdrop"),
    ("later layers see the keys that layer 2 stores", lambda pair: (pair.family, pair.method) == ("gemma4_e", "pdrop")),
    (
        "has no attention|sees a window of 24 tokens",
        lambda pair: pair.family in FULL and pair.method in VANISHING and (not pair.layers or pair.method == "vhr"),
    ),
    (
        "adds softcap|no token sees a later one",
        lambda pair: pair.family in ("gemma3", "paligemma", "paligemma2") and pair.method in VANISHING,
    ),
]


Refusals = Sequence[tuple[str, Callable[[Pair], bool]]]
"""Words of the sentence by which pairs are refused, and which pairs are meant."""


def told(pair: Pair, refusals: Refusals = REFUSED) -> str | None:
    """Words of the sentence by which a pair is refused, or None."""
    return next((words for words, applies in refusals if applies(pair)), None)


def refused(pair: Pair, recipe: str, record, samples: list[list[str]], refusals: Refusals) -> bool:
    """Whether a pair is refused, as it stands in `refusals`; then the test is over."""
    record("pair", pair.id)
    words = told(pair, refusals)
    if words is None:
        vp.wrap(shared(pair.family), recipe).remove()
        return False
    model, inputs = shared(pair.family), make_inputs(pair.family, samples[:1])
    stock = model(**inputs).logits
    with pytest.raises(vp.UsageError, match=words) as refusal, vp.wrap(model, recipe):
        model(**inputs)  # that tokens see later ones is known from a prompt
    assert torch.equal(model(**inputs).logits, stock)
    assert "\n" not in str(refusal.value)
    record("reason", words)
    return True


def prunes(
    pair: Pair,
    samples: list[list[str]],
    several: list[list[str]],
    record: Callable[[str, object], None],
    refusals: Refusals = REFUSED,
    arguments: str | None = None,
) -> None:
    """What is kept is what the budget says, a row of a batch is decided as it is alone, keep-all and removing are
    bit-identical, and the model computes what was chosen; or the pair is refused.

    Args:
        samples: a ragged batch.
        several: one row with several pictures or videos, for methods that merge.
        record: pytest's `record_property`.
        refusals: which pairs are refused.
        arguments: of the method, where those for pictures do not fit.
    """
    row = ROWS[pair.method]
    recipe = row.recipe(arguments or row.tiny[0])
    if refused(pair, recipe, record, samples, refusals):
        return
    name, model = pair.family, shared(pair.family)
    inputs, stock = make_inputs(name, samples), None
    stock = model(**inputs).logits
    with vp.wrap(model, recipe) as run:
        _, new, logits = generate(model, inputs, 3)
        batch = {(kept.layer, kept.sample, kept.ordinal): kept.index.tolist() for kept in run.last.kept}
        keep, stages = run.last.keep, run.last.kept
        generate(model, make_single(name, samples, 1), 1)
        alone = {(kept.layer, 1, kept.ordinal): kept.index.tolist() for kept in run.last.kept}
    assert stages
    assert all(0 < len(kept.index) <= kept.original for kept in stages)
    assert any(len(kept.index) < kept.original for kept in stages)
    assert {place: index for place, index in batch.items() if place[1] == 1} == alone
    if row.drops_only:
        expected = expected_logits(name, model, samples, keep, new[:, :-1])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    else:
        verdict = vp.check(model, make_inputs(name, several), recipe, new_tokens=2)
        assert verdict.verdict == "exact", str(verdict)
    with vp.wrap(model, row.recipe(next(iter(row.all_kept())))):
        assert torch.equal(model(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, stock)


def redistributes(
    pair: Pair,
    samples: list[list[str]],
    record: Callable[[str, object], None],
    refusals: Refusals = REFUSED,
    arguments: str | None = None,
) -> None:
    """Attention that is computed for the edit is the model's own (window, block, norm, scaling), a row of a batch is edited as
    it is alone, and removing is bit-identical; or the pair is refused. Arguments as for `prunes`."""
    row, extra = ROWS[pair.method], f",layers={pair.layers}" if pair.layers else ""
    vanishing = row.recipe(VANISHING[pair.method] + extra)
    if refused(pair, vanishing, record, samples, refusals):
        return
    name, model = pair.family, shared(pair.family)
    inputs, single = make_inputs(name, samples), make_single(name, samples, 1)
    real = inputs["attention_mask"].bool()
    stock = model(**inputs).logits
    with vp.wrap(model, vanishing) as run:
        close = model(**inputs).logits
        assert run.last.edits, "nothing was edited"
    torch.testing.assert_close(close[real], stock[real], atol=2 * TOLERANCE, rtol=0)
    strong = arguments or STRONG.get(pair.method, next(iter(row.tiny.values())))
    strong = ",".join(part for part in strong.split(",") if not (extra and part.startswith("layers=")))
    with vp.wrap(model, row.recipe((strong + extra).lstrip(","))):
        edited, alone = model(**inputs).logits, model(**single).logits
    torch.testing.assert_close(edited[1, -alone.shape[1] :], alone[0], atol=2 * TOLERANCE, rtol=0)
    assert (edited[real] - stock[real]).abs().max() > MOVED
    assert torch.equal(model(**inputs).logits, stock)
