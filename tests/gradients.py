"""Gradients of wrapped models, measured: every method, with and without gradient checkpointing.

What is true is obtained in three ways that share no code with vlmprune:

* a method that drops tokens is the un-pruned model whose layers mask them (`oracles`), differentiated by autograd;
* a redistribution method is the stock model with the paper's loops for its attention (`redistribution.explicit`),
  differentiated numerically along a random direction through all parameters;
* any method is its own forward pass, differentiated so: choices do not change in a small enough neighbourhood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from cases import PRUNING, REDISTRIBUTION, ROWS, Pruning
from oracles import effect_of, masked_output
from tiny_models import build, make_inputs

import vlmprune as vp

Gradient = dict[str, torch.Tensor]
CHECKPOINTING: dict[str, bool | None] = {"none": None, "reentrant": True, "non-reentrant": False}
"""The kinds of gradient checkpointing, as `use_reentrant`."""


def _without_cache_stage(row: Pruning, arguments: str) -> str:
    return re.sub(r"cache_layer=\d", "cache_layer=-1", f"{row.name}:{arguments}")


DROPPING = {
    **{row.name: f"{row.name}:{row.tiny[0]}" for row in PRUNING if row.drops_only},
    "adaptinfer, two stages": "adaptinfer:layer=2|4,fraction=0.5|0.3",
    "uniform, deep": "uniform:layer=3,fraction=0.4",
    "uniform, compact": "uniform:layer=1,fraction=0.4,positions=compact",
    "two methods": "divprune:layer=0,fraction=0.6 + fastv:layer=3,fraction=0.3",
}
"""Recipes that only drop, inside the language model: equal to masking."""
OTHERS = {
    **{row.name: _without_cache_stage(row, row.tiny[0]) for row in PRUNING if not row.drops_only},
    "flowcut in the language model": "flowcut:layer=2,fraction=0.4",
    "sparsevlm 2": "sparsevlm:layer=2,fraction=0.4,version=2",
    "tower and language model": "flowcut:fraction=0.6 + pdrop:layer=4,fraction=0.2",
}
"""Recipes that merge, or that work inside the vision tower."""
DIMS, TAU = [5, 40], 2.0
EDITING = {name: row.recipe(row.tiny[name]) for row in REDISTRIBUTION for name in row.tiny if name == row.name}
"""Redistribution."""
BOTH = {"dropping and editing": f"random:layer=0|3,fraction=0.8|0.5,seed=1 + {EDITING['var']},layers=1:"}
RECIPES = DROPPING | OTHERS | EDITING | BOTH
CLS_ONLY = {row.name for row in ROWS.values() if row.cls}
"""Recipes for towers with a CLS token."""
COMPACT_ONLY = {"uniform, compact"}
"""Recipes that renumber positions, which M-RoPE does not allow."""
FAMILIES = ("llava", "llava_next", "qwen2_5_vl")
CASES = [
    (family, name)
    for family in FAMILIES
    for name in RECIPES
    if family.startswith("llava") or name not in CLS_ONLY | COMPACT_ONLY
]

PROMPT = [["text4", "image", "text6"]]
WORDS = 5
"""Rows at the end whose loss is taken, the very last among them: some methods edit no other."""


@dataclass
class Training:
    """A model of a family in training mode, in float32 or float64, eager or not, and what it is trained on."""

    family: str
    dtype: torch.dtype = torch.float32
    attn: str = "sdpa"

    def __post_init__(self) -> None:
        self.model = build(self.family, self.attn).to(self.dtype).train()
        if self.dtype == torch.float64:
            for module in self.model.modules():
                if type(module).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen2_5_VLRMSNorm"):
                    module.forward = MethodType(_norm, module)  # transformers' own computes in float32, whatever the model

    def inputs(self, samples: list[list[str]] = PROMPT, seed: int = 0) -> dict:
        inputs = make_inputs(self.family, self.model, samples, seed)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return inputs

    def loss(self, inputs: dict) -> torch.Tensor:
        return loss_of(self.model(**inputs, use_cache=False).logits)

    def take_gradient(self) -> Gradient:
        """What backward left, which is cleared."""
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    @contextmanager
    def checkpointing(self, kind: str) -> Iterator[None]:
        """With gradient checkpointing of this kind, as a user turns it on."""
        reentrant = CHECKPOINTING[kind]
        self.model.zero_grad(set_to_none=True)  # of a backward that failed
        if reentrant is None:
            yield
            return
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            self.model.enable_input_require_grads()
        try:
            yield
        finally:
            if reentrant:
                self.model.disable_input_require_grads()
            self.model.gradient_checkpointing_disable()

    def gradient(
        self,
        recipe: str | None,
        kind: str = "none",
        inputs: dict | None = None,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    ) -> Gradient:
        """Of the wrapped model's loss, for every parameter that has one."""
        inputs = self.inputs() if inputs is None else inputs
        with self.checkpointing(kind), vp.wrap(self.model, recipe) if recipe else _plain():
            backward(self.loss(inputs))
        return self.take_gradient()

    def masked_gradient(self, recipe: str, inputs: dict | None = None) -> Gradient:
        """Of the un-pruned model whose layers do not see what a run of the recipe dropped."""
        inputs = self.inputs() if inputs is None else inputs
        self.model.zero_grad(set_to_none=True)
        with vp.wrap(self.model, recipe) as run, torch.no_grad():
            self.loss(inputs)
            effect = effect_of(self.model, inputs, run)
        assert not effect.merged, "merged features are constants for this oracle"
        loss_of(masked_output(self.model, inputs, effect).logits).backward()
        return self.take_gradient()


def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
    return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@contextmanager
def _plain() -> Iterator[None]:
    yield


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    """A smooth function of the logits `[batch, token, vocabulary]` of the last rows, in their own dtype (transformers' loss is
    computed in float32, where nothing can be differentiated numerically)."""
    logits = logits[:, -WORDS:]
    wanted = torch.arange(20, 20 + WORDS).expand(logits.shape[0], -1)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def relative_error(found: Gradient, expected: Gradient) -> float:
    """The largest over parameters: the difference's norm by the norm of what is expected; 1 for a gradient that is missing.

    A gradient whose norm is tiny beside the largest parameter's is measured by a millionth of that: it is rounding.
    """
    floor = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
    if found.keys() != expected.keys():
        return 1.0
    return max(
        float((found[name] - gradient).norm()) / max(float(gradient.norm()), floor) for name, gradient in expected.items()
    )


def direction(model, seed: int = 0, without: str = "nothing") -> Gradient:
    """A random direction of length 1 through all parameters, but for those with `without` in their names."""
    random = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(p.shape, generator=random, dtype=torch.float64) * (without not in name)
        for name, p in model.named_parameters()
    }
    length = sum(float(x.square().sum()) for x in drawn.values()) ** 0.5
    return {name: x / length for name, x in drawn.items()}


@torch.no_grad()
def numerical_slope(model, loss: Callable[[], torch.Tensor], along: Gradient, step: float = 1e-5) -> float:
    """(loss(θ + step·d) − loss(θ − step·d)) / 2 step, of a float64 model, whose parameters are put back."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    values = []
    for sign in (1, -1):
        for name, p in model.named_parameters():
            p.copy_(before[name] + sign * step * along[name])
        values.append(float(loss()))
    for name, p in model.named_parameters():
        p.copy_(before[name])
    return (values[0] - values[1]) / (2 * step)


def slope(gradient: Gradient, along: Gradient) -> float:
    """The same from the gradient."""
    return sum(float((g.double() * along[name]).sum()) for name, g in gradient.items())


def length(gradient: Gradient) -> float:
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5
