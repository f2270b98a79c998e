"""Find the dimensions of the residual that hold a decoder's attention sinks, in a few forward passes, with the evidence.

Sun et al. (arXiv:2402.17762): the first token and a few delimiters have *massive activations*: a few dimensions, always the
same, hold most of the residual's energy from an early layer on. Text prompts are enough, because attention is causal: the first
token's residual does not depend on the tokens after it, visual or not. The prompts begin with different words, so that a model
without a BOS token is measured on several first tokens.

    e_d = x_d² / ‖x‖²                    of the first token's residual x entering a layer
    on    = layers with max_d e_d > 0.2  (median over prompts); at least 40 % of the depth, or there are no sink dimensions
    dims  = those with median e_d ≥ 0.05 over prompts and these layers, at most 4, and |x_d| ≥ 300 times the median number;
            not those that a fifth of all later tokens hold as well, with at least half of the first token's e_d
    energy = the mean of the first token's largest e_d (median) and the 95 % quantile of ordinary later tokens, rounded down
             to two digits; ordinary: less than half of the first token's (others are sinks too, such as full stops)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor

from vlmprune import observe
from vlmprune.errors import UsageError
from vlmprune.methods.sink_dims import entries_of
from vlmprune.show.units import spans

PROMPTS = (
    "The quick brown fox jumps over the lazy dog. It runs into the forest.",
    "A photograph of a street in the rain. What is the man with the umbrella doing?",
    "Water boils at one hundred degrees. At high altitude it boils earlier.",
    "Please describe this image in detail.\nThink about colours, shapes and places.",
    "In 1969, two people walked on the moon. Four days later they were back.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Once upon a time there was a king who had three daughters. The youngest one sang.",
    "Is there a dog in the picture? Answer yes or no.",
)
TINY_PROMPTS = ("what colour is the circle? " * 2, "how many stars are there? " * 2)
"""For the embedded VLM, whose vocabulary is a few dozen words."""
ON, DIM, RATIO, DEPTH, MOST, ORDINARY, EVERYWHERE = 0.2, 0.05, 300.0, 0.4, 4, 0.95, 0.2
MANY = 0.1
"""Share of sinks among later tokens that gives a warning."""


@dataclass(frozen=True)
class LayerEvidence:
    """One layer.

    Attributes:
        layer: the layer.
        dim: the first token's largest dimension; `energy` is its share of the token's energy, `phi` the same as φ.
        first_norm, other_norm: norm of the first token, and median norm of the others.
        ratio: the first token's number in `dim`, as a multiple of the layer's median number.
        attention: from later rows to the first token.
    """

    layer: int
    dim: int
    energy: float
    phi: float
    first_norm: float
    other_norm: float
    ratio: float
    attention: float


@dataclass(frozen=True)
class Sinks:
    """The finding.

    Attributes:
        dims: the sink dimensions; empty if there are none.
        layers: layers in which the first token has massive activations in these dimensions.
        shares: of the first token's energy in each dimension, median over prompts and these layers.
        energy: threshold between other tokens and sinks; two digits, between `ordinary` and the first token's share.
        ordinary: 95 % quantile of the share of ordinary later tokens.
        everywhere: dimensions as large in later tokens too, which are no sink dimensions, and the share of these tokens.
        agreement: share of prompts that give the same dimensions alone, those of `everywhere` among them.
        flagged: share of later tokens that are sinks by these dimensions.
        flagged_attention, other_attention: attention to a flagged, and to another, later token, in these layers.
        cosine: share of later tokens that are sinks with sink_dims=cosine.
        known: the dimensions in the table of known models, or None.
        known_as: the model in that table with the same config.
        evidence: per layer.
    """

    dims: tuple[int, ...]
    layers: tuple[int, ...]
    shares: tuple[float, ...]
    energy: float | None
    ordinary: float | None
    everywhere: tuple[tuple[int, float], ...]
    agreement: float
    flagged: float
    flagged_attention: float | None
    other_attention: float | None
    cosine: float
    known: tuple[int, ...] | None
    known_as: str | None
    evidence: tuple[LayerEvidence, ...]

    @property
    def advice(self) -> str:
        """What to write into a recipe."""
        if not self.dims:
            why = "no few dimensions hold the first token's energy through the model"
            if self.everywhere:
                why = f"{self._shared()}, so that they do not separate sinks from other tokens"
            return (
                f"No sink dimensions: {why}. sink_dims=cosine needs no dimensions; it marks {self.cosine:.1%} of later tokens "
                "as sinks."
            )
        return f"var:sink_dims={'|'.join(map(str, self.dims))},sink_energy={self.energy:.2f}"

    @property
    def cautions(self) -> tuple[str, ...]:
        """Reasons to doubt the advice, in sentences."""
        said = []
        if self.flagged > MANY:
            said.append(
                f"Caution: {self.flagged:.1%} of later tokens are sinks by this threshold, where few should be: raise "
                "sink_energy, or measure on texts like yours with --prompt."
            )
        gets, others = self.flagged_attention, self.other_attention
        if gets is not None and others is not None and gets <= others:
            said.append(
                f"Caution: later tokens that are sinks by this threshold get {gets:.1%} of attention each, others "
                f"{others:.1%}: they do not act as sinks."
            )
        if self.known is not None and set(self.known) != set(self.dims):
            said.append(
                f"Caution: by its config this is {self.known_as}, whose sink dimensions are {', '.join(map(str, self.known))}; "
                "its weights say otherwise: name sink_dims in the recipe."
            )
        return tuple(said)

    def _shared(self) -> str:
        return " and ".join(
            f"{share:.0%} of later tokens are as large in dimension {dim} as the first token" for dim, share in self.everywhere
        )

    def rows(self) -> list[tuple[str, str]]:
        """The finding: labels and values."""
        known = (
            "nothing" if self.known is None else f"{', '.join(map(str, self.known))}, as {self.known_as}, by its config alone"
        )
        shared = [("no sink dimensions", self._shared())] if self.everywhere else []
        if not self.dims:
            return [*shared, ("known before", known)]
        given = "–" if self.flagged_attention is None else f"{self.flagged_attention:.1%}"
        return [
            ("dimensions", ", ".join(f"{d} ({s:.1%} of the energy)" for d, s in zip(self.dims, self.shares, strict=True))),
            *shared,
            ("on in layers", spans(self.layers)),
            ("prompts that agree", f"{self.agreement:.0%}"),
            ("ordinary tokens, 95 % have", f"at most {self.ordinary:.1%}"),
            ("later tokens that are sinks", f"{self.flagged:.1%}, attention {given} each; others {self.other_attention:.1%}"),
            ("known before", known),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"advice": self.advice, "cautions": self.cautions}


def find_sinks(model: Any, prompts: Sequence[Tensor]) -> Sinks:
    """Find sink dimensions.

    Args:
        model: a decoder, or a VLM that has one.
        prompts: token ids `[1, token]`, at least 8 tokens each.

    Raises:
        UsageError: no prompt, a prompt too short, or a model without decoder layers.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise UsageError(f"found no decoder layers in {type(model).__name__}: sinks are found in decoders only.")
    if not prompts or min(ids.shape[1] for ids in prompts) < 8:
        raise UsageError("finding sinks needs prompts of at least 8 tokens each.")
    passes = [_look(decoder, layers, ids) for ids in prompts]
    energy = torch.stack([states[:, 0].square() / states[:, 0].square().sum(-1, keepdim=True) for states, _ in passes])
    middle = energy.median(dim=0).values  # [layer, dim]
    massive = [layer for layer in range(1, len(layers)) if float(middle[layer].max()) > ON]
    large = _dims(middle, massive, passes, len(layers))
    everywhere = tuple((dim, share) for dim in large if (share := _as_the_first(middle, massive, passes, dim)) > EVERYWHERE)
    dims = tuple(dim for dim in large if dim not in dict(everywhere))
    on = [layer for layer in massive if dims and float(middle[layer, list(dims)].max()) > ON]
    alone = [_dims(one, massive, [seen], len(layers)) for one, seen in zip(energy, passes, strict=True)]
    largest = [_share(states[on], dims) for states, _ in passes]
    ordinary, threshold = _threshold(largest) if dims else (None, None)
    flagged, cosine, given = [], [], []
    for shares, (states, attention) in zip(largest, passes, strict=True):
        if threshold is not None:
            sinks = shares[:, 1:] >= threshold
            flagged.append(sinks.float().mean())
            given.append((attention[on][:, 1:], sinks))
        x = states[len(layers) // 2 :]
        cosine.append((torch.cosine_similarity(x[:, 1:], x[:, :1], dim=-1).abs() > 0.9).float().mean())
    known = next(iter(entries_of(decoder.config)), None)
    return Sinks(
        dims=dims,
        layers=tuple(on),
        shares=tuple(float(middle[on, dim].median()) for dim in dims),
        energy=threshold,
        ordinary=ordinary,
        everywhere=everywhere,
        agreement=sum(own == large for own in alone) / len(alone),
        flagged=float(torch.stack(flagged).mean()) if flagged else 0.0,
        flagged_attention=_mean([attention[sinks] for attention, sinks in given]) if dims else None,
        other_attention=_mean([attention[~sinks] for attention, sinks in given]) if dims else None,
        cosine=float(torch.stack(cosine).mean()),
        known=known.dims if known is not None else None,
        known_as=known.model if known is not None else None,
        evidence=tuple(_evidence(layer, middle, passes) for layer in range(len(layers))),
    )


def _look(decoder: Any, layers: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals `[layer, token, dim]` entering each layer, and the attention `[layer, token]` each token gets from the rows
    of the prompt's later half that see it, mean over heads."""
    attention: dict[int, Tensor] = {}
    rows = torch.arange(ids.shape[1] // 2, ids.shape[1], device=ids.device)

    def attended(index: int, here: Any) -> None:
        given = here.rows(rows)[0].mean(dim=0)
        attention[index] = given.sum(dim=0) / (rows[:, None] >= torch.arange(given.shape[1], device=given.device)).sum(dim=0)

    with observe(decoder, attention=attended, hidden=True) as seen, torch.no_grad():
        decoder(input_ids=ids, use_cache=False)
    return (
        torch.stack([seen.hidden[index][0].float() for index in range(len(layers))]),
        torch.stack([attention[index] for index in range(len(layers))]),
    )


def _dims(energy: Tensor, on: list[int], passes: Sequence[tuple[Tensor, Tensor]], depth: int) -> tuple[int, ...]:
    if len(on) < DEPTH * depth:
        return ()
    typical = energy[on].median(dim=0).values
    ranked = typical.argsort(descending=True)[:MOST].tolist()
    ratio = torch.stack([_ratios(states[on]) for states, _ in passes]).median(dim=0).values
    return tuple(sorted(dim for dim in ranked if typical[dim] >= DIM and ratio[dim] >= RATIO))


def _as_the_first(energy: Tensor, on: list[int], passes: Sequence[tuple[Tensor, Tensor]], dim: int) -> float:
    """The share of later tokens with at least half of the first token's share of energy in a dimension."""
    half = energy[on, dim].median() / 2
    return float(torch.stack([(_share(states[on], (dim,))[:, 1:] >= half).float().mean() for states, _ in passes]).mean())


def _threshold(largest: Sequence[Tensor]) -> tuple[float, float]:
    """The 95 % quantile of ordinary tokens, and the threshold, from each prompt's largest shares `[layer, token]`."""
    first = float(torch.cat([share[:, 0] for share in largest]).median())
    later = torch.cat([share[:, 1:].flatten() for share in largest])
    ordinary = float(later[later < first / 2].quantile(ORDINARY))
    return ordinary, floor(50 * (ordinary + first)) / 100


def _share(states: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`[layer, token]` largest share of a token's energy in one of the dimensions."""
    return (states[..., list(dims)].square() / states.square().sum(-1, keepdim=True)).amax(-1) if dims else states[..., 0]


def _ratios(states: Tensor) -> Tensor:
    """`[dim]` the first token's numbers, as multiples of the median number of the layer; median over layers."""
    typical = states.abs().flatten(1).median(dim=1).values
    return (states[:, 0].abs() / typical[:, None].clamp_min(1e-12)).median(dim=0).values


def _evidence(layer: int, energy: Tensor, passes: Sequence[tuple[Tensor, Tensor]]) -> LayerEvidence:
    dim = int(energy[layer].argmax())
    return LayerEvidence(
        layer=layer,
        dim=dim,
        energy=float(energy[layer, dim]),
        phi=float((energy[layer, dim] * energy.shape[1]).sqrt()),
        first_norm=_median([states[layer, 0].norm() for states, _ in passes]),
        other_norm=_median([states[layer, 1:].norm(dim=-1).median() for states, _ in passes]),
        ratio=_median([_ratios(states[layer : layer + 1])[dim] for states, _ in passes]),
        attention=float(torch.stack([attention[layer, 0] for _, attention in passes]).mean()),
    )


def _median(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).median())


def _mean(values: Sequence[Tensor]) -> float | None:
    joined = torch.cat(list(values))
    return float(joined.mean()) if joined.numel() else None
