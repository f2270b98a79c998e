"""What merging methods share: tokens that join others. Shapes are `[image, token, …]`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


def rows(x: Tensor, index: Tensor) -> Tensor:
    """`[image, n, dim]`: tokens `index` `[image, n]` of `[image, token, dim]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def others(chosen: Tensor, visual: int) -> Tensor:
    """Rising indices `[image, visual − n]` of the tokens that are not among `chosen` `[image, n]`."""
    taken = torch.zeros(len(chosen), visual, dtype=torch.int8, device=chosen.device).scatter(1, chosen, 1)
    return taken.argsort(dim=1, stable=True)[:, : visual - chosen.shape[1]]


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """`[image, n]` index of the centre `[image, c, dim]` with the highest cosine, for each of `[image, n, dim]`."""
    return (normalize(x.float(), dim=-1) @ normalize(centres.float(), dim=-1).transpose(1, 2)).argmax(dim=-1)


def gathered(x: Tensor, home: Tensor, centres: int) -> tuple[Tensor, Tensor]:
    """Sum `[image, c, dim]` in fp32 and count `[image, c, 1]` of the tokens `[image, n, dim]` that joined each centre."""
    member = one_hot(home, centres).to(torch.float32)  # [image, n, c]
    return member.transpose(1, 2) @ x.float(), member.sum(dim=1)[..., None]


def density_peaks(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens `[image, n, dim]` around points that are dense and far from denser ones (kNN density peaks, as SparseVLM's
    code): distance / √dim, density = exp(−mean squared distance to the `clusters` nearest, itself among them).

    Returns:
        Centres `[image, cluster]`, best first, and each token's cluster `[image, n]`. Equal densities: the lower index is
        denser.
    """
    x = x.float()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    density = (-distance.topk(min(clusters, x.shape[1]), dim=-1, largest=False).values.square().mean(dim=-1)).exp()
    rank = density.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    denser = rank[:, None, :] < rank[:, :, None]
    peak = distance.masked_fill(~denser, torch.inf).amin(dim=-1).minimum(distance.amax(dim=(1, 2))[:, None])
    centre = (density * peak).argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    home = distance.gather(2, centre[:, None].expand(-1, x.shape[1], -1)).argmin(dim=-1)
    return centre, home.scatter(1, centre, torch.arange(clusters, device=x.device).expand_as(centre))
