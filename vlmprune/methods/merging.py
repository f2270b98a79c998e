"""Operations of merging methods, in which tokens join others. Shapes are `[image, token, …]`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

CHUNK = 1 << 20
"""Most similarities or distances `[image, token, token]` that exist at one time."""


def rows(x: Tensor, index: Tensor) -> Tensor:
    """`[image, n, dim]`: tokens `index` `[image, n]` of `[image, token, dim]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def others(chosen: Tensor, visual: int) -> Tensor:
    """Rising indices `[image, visual − n]` of the tokens that are not among `chosen` `[image, n]`."""
    taken = torch.zeros(len(chosen), visual, dtype=torch.int8, device=chosen.device).scatter(1, chosen, 1)
    return taken.argsort(dim=1, stable=True)[:, : visual - chosen.shape[1]]


def chunks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """`[image, n, dim]` in pieces so small that the similarities of one piece to `columns` others are at most `CHUNK`."""
    return x.split(max(CHUNK // max(len(x) * columns, 1), 1), dim=1)


def most_similar(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `[image, n, dim]` its highest cosine with a centre `[image, c, dim]`, and which centre: `[image, n]` each."""
    columns = normalize(centres.float(), dim=-1).transpose(1, 2)
    found = [(part @ columns).max(dim=-1) for part in chunks(normalize(x.float(), dim=-1), centres.shape[1])]
    return torch.cat([best.values for best in found], dim=1), torch.cat([best.indices for best in found], dim=1)


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """`[image, n]` index of the centre `[image, c, dim]` with the highest cosine, for each of `[image, n, dim]`."""
    return most_similar(x, centres)[1]


def gathered(x: Tensor, home: Tensor, centres: int) -> tuple[Tensor, Tensor]:
    """Sum `[image, c, dim]` in fp32 and count `[image, c, 1]` of the tokens `[image, n, dim]` that joined each centre."""
    total, count = x.new_zeros(len(x), centres, x.shape[-1]).float(), x.new_zeros(len(x), centres, 1).float()
    parts = chunks(x.float(), centres)
    for part, own in zip(parts, home.split(parts[0].shape[1], dim=1), strict=True):
        member = one_hot(own, centres).to(torch.float32).transpose(1, 2)  # [image, c, token]
        total, count = total + member @ part, count + member.sum(dim=-1, keepdim=True)
    return total, count


def density_peaks(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens `[image, n, dim]` around points that are dense and far from denser ones: kNN density peaks, as in
    SparseVLM's code. Density is that of the `clusters` nearest tokens.

    Returns:
        Centres `[image, cluster]`, best first, and each token's cluster `[image, n]`.
    """
    x = x.float()
    centre = peak_score(x, clusters).argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    home = torch.cat([_distance(part, rows(x, centre)).argmin(dim=-1) for part in chunks(x, x.shape[1])], dim=1)
    return centre, home.scatter(1, centre, torch.arange(clusters, device=x.device).expand_as(centre))


def peak_score(x: Tensor, near: int, there: Tensor | None = None) -> Tensor:
    """`[image, n]` density of each token, times its distance to the nearest denser one; of the densest, to whatever two tokens
    are farthest apart.

    Distances are divided by √dim; density = exp(−mean squared distance to the `near` nearest, the token itself included). Of
    equal densities, the lower index counts as denser.

    Args:
        x: `[image, n, dim]`.
        near: how many neighbours; all of them if there are fewer.
        there: `[image, n]` bool, False on padding, which is nobody's neighbour and scores 0; None if there is none.
    """
    x = x.float()
    gone = None if there is None else ~there
    parts = chunks(x, x.shape[1])  # distances are computed twice: all of them at one time would be n × n
    nearest = [_distance(part, x, gone).topk(min(near, x.shape[1]), dim=-1, largest=False).values for part in parts]
    closest = torch.cat(nearest, dim=1)
    real = closest.isfinite()
    density = (-closest.masked_fill(~real, 0).square().sum(dim=-1) / real.sum(dim=-1).clamp_min(1)).exp()
    if gone is not None:
        density = density.masked_fill(gone, 0)
    rank = density.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    to_denser, farthest = [], []
    for part, own in zip(parts, rank.split(parts[0].shape[1], dim=1), strict=True):
        away = _distance(part, x, gone)
        far = away.masked_fill(away.isinf(), 0) if gone is not None else away
        farthest.append(far.amax(dim=-1))
        to_denser.append(away.masked_fill_(rank[:, None, :] >= own[:, :, None], torch.inf).amin(dim=-1))
    widest = torch.cat(farthest, dim=1)
    if gone is not None:
        widest = widest.masked_fill(gone, 0)
    return density * torch.cat(to_denser, dim=1).minimum(widest.amax(dim=1, keepdim=True))


def _distance(x: Tensor, to: Tensor, gone: Tensor | None = None) -> Tensor:
    """`[image, n, m]` Euclidean distances over √dim; ∞ to what is gone `[image, m]`."""
    away = torch.cdist(x, to, compute_mode="donot_use_mm_for_euclid_dist") / to.shape[-1] ** 0.5
    return away if gone is None else away.masked_fill(gone[:, None], torch.inf)
