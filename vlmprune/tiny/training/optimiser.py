"""Muon for hidden matrices and AdamW for everything else, with one learning-rate schedule for both.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix before the step, so that
every direction of the matrix is trained at the same rate. On this model it needs several times fewer steps than AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of each: `[n, rows, columns]` with `rows <= columns`."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay, batched over matrices of equal shape."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            equal: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    equal[matrix.shape].append(matrix)
            for (rows, columns), matrices in equal.items():
                self._step(group, matrices, rows, columns)

    def _step(self, group: dict, matrices: list[nn.Parameter], rows: int, columns: int) -> None:
        momenta = [self.state[m].setdefault("momentum", torch.zeros_like(m)) for m in matrices]
        gradients = [m.grad for m in matrices if m.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        looked_ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        wide = looked_ahead if rows <= columns else looked_ahead.mT
        updates = orthogonalise(wide)
        updates = updates if rows <= columns else updates.mT
        rate = group["lr"] * max(1, rows / columns) ** 0.5
        for matrix, update in zip(matrices, updates, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


class Optimiser:
    """Muon on `matrices` and AdamW on `others`; the rate rises, stays, and falls linearly to 2 %."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        muon_lr: float,
        adam_lr: float,
        weight_decay: float,
        steps: int,
        decay_from: float,
    ) -> None:
        self.parameters = [*matrices, *others]
        self._parts: list[torch.optim.Optimizer] = [
            Muon(matrices, muon_lr, weight_decay),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.97), weight_decay=0.0),
        ]
        self._base = [muon_lr, adam_lr]
        self._steps, self._decay_from = steps, decay_from

    def _rate(self, step: int) -> float:
        warm_up = max(1, min(30, self._steps // 10))
        start = self._decay_from * self._steps
        left = (self._steps - step) / max(1.0, self._steps - start)
        return min(1.0, (step + 1) / warm_up, 0.02 + 0.98 * max(0.0, left))

    def step(self, step: int) -> None:
        """Apply the gradients of training step `step` (counted from 0) and clear them."""
        for part, base in zip(self._parts, self._base, strict=True):
            for group in part.param_groups:
                group["lr"] = base * self._rate(step)
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices for Muon; embeddings, output layers, convolutions, norms and biases for AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "probe"))
            (matrices if hidden else others).append(parameter)
    return matrices, others
