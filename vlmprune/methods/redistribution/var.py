"""VAR, visual attention redistribution. Kang et al., ICLR 2025, arXiv:2503.03321; code MICV-yonsei/VisAttnSink @ 98e62d6.

    φ_j = max_{d ∈ D} |x_jd| / rms(x_j)          x: residual that enters the layer; D: dimensions of massive activations
    sinks = { j : φ_j ≥ τ },  visual (V_s) or text (T_s);  V_n: the other visual tokens;  μ_g: attention to group g
    selected heads, per row:  μ_Vs ≤ max_sink_share · (μ_Vs + μ_Vn),  μ_Vs + μ_Vn ≥ min_image_mass,  a visual sink exists
    a′_k = keep · a_k                                       k a visual or a text sink
    a′_k = a_k · (1 + (1 − keep) · (μ_Vs + μ_Ts) / μ_Vn)    k a visual token that is no sink
    a′_k = a_k                                              all other keys; every row still sums to one

Parameters are the share that sinks *keep* and the *highest* share of sinks. The paper's p is the share that they lose, its rho
the lowest share of non-sinks; the released code means the opposites. `p=` and `rho=` have the paper's meaning.

                    this class            paper                    released code
    sinks keep      keep = 0.4            p = 0.6 (moved)          p = 0.4; its preset says 0.6
    sinks' share    max_sink_share = 0.2  rho = 0.8 (non-sink)     rho = 0.2; its preset says 0.5
    image's mass    min_image_mass = 0.2  0.2                      summ = 0.2
    layers          2:-1                  not the last             2: (its switch for the last layer is dead)

φ is at most √dim; τ = 20 at dim 4096 is a share τ²/dim = 9.8 % of a token's energy. In SmolLM2 (dim 576), 9.8 % makes nine of
ten tokens sinks, and 69 % finds the right ones: each model has its own threshold (`methods/sink_dims.py`, `vlmprune sinks`).

Differs from the released code in: fp32 probabilities; no ε in the share; any batch and several images; each conversation has
its own sinks (the code reuses those of its first image); the BOS token is kept (the code drops it). As in the code: heads
without a visual sink are not selected; generated tokens are never sinks.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.methods.parameters import check, number
from vlmprune.methods.redistributing import GroupEditor, ModelFacts, Scene, written
from vlmprune.methods.sink_dims import sinks_for
from vlmprune.schedule import plain

VISUAL, VISUAL_SINK, TEXT_SINK = 1, 2, 3
DEFAULT_ENERGY = 400 / 4096  # τ = 20 in a residual of 4096 numbers
COSINE = 0.9  # threshold on |cos(x_j, x_first)| of arXiv:2512.22213, for models whose sink dimensions are unknown


@dataclass(frozen=True, kw_only=True)
class VAR(GroupEditor):
    """Move attention from sinks to the other visual tokens, in heads that attend to the image.

    Args:
        keep: share of their attention that sinks keep; 1 − p.
        max_sink_share: highest share of visual sinks in a head's attention to the image; 1 − rho.
        min_image_mass: lowest attention to the image.
        sink_energy: share of a residual's energy in one sink dimension from which a token is a sink. Default: the known share
            for these dimensions of this model (τ = 20 for the paper's models), otherwise 400 / 4096.
        tau: the same in the paper's unit, τ = √(sink_energy · dim), below √dim; it wins over `sink_energy`.
        sink_dims: "auto" (the model's known ones), dimensions as "1415|2533", or "cosine" (tokens whose residual is parallel to
            the first token's; needs no dimensions).
        p: share of their attention that sinks lose, as in the paper; instead of `keep`.
        rho: lowest share of non-sinks in a head's attention to the image, as in the paper; instead of `max_sink_share`.
    """

    name = "var"
    paper = "arXiv:2503.03321 (ICLR 2025)"
    note = "sink threshold is a share of the residual's energy; sinks per conversation; the BOS token is kept"
    rows = "behind"
    default_layers = "2:-1"
    group_count = 3
    presets = {  # noqa: RUF012
        "general": {"keep": 0.4, "max_sink_share": 0.2},
        "hallucination": {"keep": 0.4, "max_sink_share": 0.5},
        "vision": {"keep": 0.4, "max_sink_share": 0.1},
        "released-code": {"keep": 0.6, "max_sink_share": 0.5, "layers": "2:"},
    }

    keep: float = number(0.4, low=0, high=1)
    max_sink_share: float = number(0.2, low=0, high=1)
    min_image_mass: float = number(0.2, low=0, high=1)
    sink_energy: float | None = number(None, low=0, high=1, below=True)  # no token has all of its energy in one dimension
    tau: float | None = number(None, low=0, high=1e6)
    sink_dims: str = "auto"
    p: InitVar[float | None] = number(None, low=0, high=1)
    rho: InitVar[float | None] = number(None, low=0, high=1)

    _known: ClassVar[tuple[tuple[int, ...], float | None] | None] = None  # of one model, set by `bind`

    def __post_init__(self, preset: str | None, p: float | None, rho: float | None) -> None:
        super().__post_init__(preset)
        for ours, paper, value in (("keep", "p", p), ("max_sink_share", "rho", rho)):
            if value is None:
                continue
            if preset is not None or ours in self._given:
                raise UsageError(f"var: {paper} is 1 − {ours}: give {paper}, {ours} or a preset; only one of these.")
            check(self, **{paper: value})
            object.__setattr__(self, ours, 1 - plain(value))
        object.__setattr__(self, "sink_dims", dims := written(self.sink_dims))
        if dims not in ("auto", "cosine") and not all(piece.isdecimal() for piece in dims.split("|")):
            raise UsageError(f"var: sink_dims must be 'auto', 'cosine' or dimensions as 1415|2533, found {dims!r}.")

    @property
    def neutral(self) -> bool:
        return self.keep == 1

    @property
    def dims(self) -> tuple[int, ...] | None:
        """The dimensions that were given, or None."""
        return None if self.sink_dims in ("auto", "cosine") else tuple(map(int, self.sink_dims.split("|")))

    @property
    def compares_with_first(self) -> bool:
        return self.sink_dims == "cosine"

    def bind(self, model: ModelFacts) -> VAR:
        """With the model's sink dimensions, and their known share of energy; see `sinks_for`."""
        if self.compares_with_first or self.neutral:
            return super().bind(model)
        return super().bind(model)._copy_with(_known=sinks_for(model.config, model.hidden_size, self.dims, self.tau))

    def sinks(self, see: Scene) -> Tensor:
        """`[batch, token]` bool. Known dimensions are looked up by `bind`."""
        x = see.hidden.float()
        if self.compares_with_first:
            assert see.anchor is not None
            return torch.nn.functional.cosine_similarity(x, see.anchor.float()[:, None], dim=-1).abs() > COSINE
        dims, known = self._known or (self.dims, None)
        assert dims is not None
        mean_square = x.square().mean(dim=-1) + 1e-6
        phi = x[..., list(dims)].abs().amax(dim=-1) * mean_square.rsqrt()
        energy = next(energy for energy in (self.sink_energy, known, DEFAULT_ENERGY) if energy is not None)
        return phi >= (self.tau if self.tau is not None else (energy * x.shape[-1]) ** 0.5)

    def groups(self, see: Scene) -> Tensor:
        sink = self.sinks(see) & see.prompt
        groups = see.visual * VISUAL + sink * torch.where(see.visual, VISUAL_SINK - VISUAL, TEXT_SINK)
        return groups.to(torch.int8)[:, None]

    def coefficients(self, mass: Tensor, present: Tensor | None = None) -> Tensor:
        _, visual, visual_sink, text_sink = mass.unbind(dim=-1)
        image = visual + visual_sink
        has_sink = (mass > 0 if present is None else present)[..., VISUAL_SINK]
        selected = has_sink & (visual > torch.finfo(mass.dtype).tiny)
        selected &= (visual_sink <= self.max_sink_share * image) & (image >= self.min_image_mass)
        one = torch.ones_like(visual)
        held = torch.where(selected, self.keep, one)
        moved = (1 - self.keep) * (visual_sink + text_sink)
        gain = torch.where(selected, 1 + moved / torch.where(selected, visual, one), one)
        return torch.stack((one, gain, held, held), dim=-1)
