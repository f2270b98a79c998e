"""An information horizon for people: the table, sentences and the figure, from the numbers of `Horizon.to_dict()`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from vlmprune.evals.horizon import NEGLIGIBLE
from vlmprune.evals.results import Result
from vlmprune.show.table import table

COLUMNS = ("layer", "mean I", "largest absolute I", "spread of I", "KL / KL at layer 0")


def result(numbers: Mapping[str, Any]) -> Result:
    """The result of a measured horizon.

    Args:
        numbers: `Horizon.to_dict()`, with `results.stamp()`.
    """
    shown = table(COLUMNS, rows(numbers), text_columns=0)
    recipes = [
        f"`{made['recipe']}`: {made['compute_average']:.1f} visual tokens enter a layer on average, "
        f"{made['nominal_average']:.1f} leave."
        for made in numbers["recipes"]
    ]
    return Result(numbers, [shown, [*sentences(numbers), *recipes]], draw=partial(plot, numbers), indent=None)


def rows(numbers: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Per measured layer: layer, mean I, largest |I| with its band, spread, relative divergence with its band."""
    metric, proxy = numbers["metric"], numbers["proxy"]
    return [
        (
            str(layer),
            f"{numbers['mean'][n]:+.3f}",
            f"{metric['value'][n]:.3f} [{metric['low'][n]:.3f}, {metric['high'][n]:.3f}]",
            f"{numbers['spread'][n]:.3f}",
            f"{proxy['value'][n]:.3f} [{proxy['low'][n]:.3f}, {proxy['high'][n]:.3f}]",
        )
        for n, layer in enumerate(numbers["layers"])
    ]


def sentences(numbers: Mapping[str, Any]) -> list[str]:
    """The horizons, and what follows from them."""
    found = [
        f"Horizon by the {name}: {_layer(curve['horizon'])}, 95 % "
        f"[{_layer(curve['interval'][0])}, {_layer(curve['interval'][1])}]."
        for name, curve in (("information metric", numbers["metric"]), ("label-free divergence", numbers["proxy"]))
    ]
    samples = numbers["samples"]
    found.append(
        f"Un-pruned probability of the measured answer tokens: {mean(sample['full'] for sample in samples):.3f}, "
        f"{len(samples)} samples."
    )
    if longer := sum(sample.get("unseen", 0) > 0 for sample in samples):
        found.append(
            f"{longer} answers are longer than what was measured, and their later tokens may need the picture in later layers: "
            "measure more tokens (answer_tokens)."
        )
    if numbers["safe"] is None:
        found.append("At no measured layer can visual tokens safely be dropped: no deep random stage is recommended.")
    elif numbers["safe"] == 0:
        found.append("The pictures do not matter to these answers: measure on other questions.")
    return found


def _layer(layer: int | None) -> str:
    return "none" if layer is None else f"layer {layer}"


def plot(numbers: Mapping[str, Any], path: Path) -> None:
    """Both curves with their bands, thresholds and horizons."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = ("largest information |I| of a window", "divergence, relative to seeing nothing")
    for axes, key, label, colour in zip(both, ("metric", "proxy"), labels, ("C0", "C1"), strict=True):
        curve = numbers[key]
        axes.fill_between(
            numbers["layers"], curve["low"], curve["high"], color=colour, alpha=0.25, linewidth=0, label="95 % band"
        )
        axes.plot(numbers["layers"], curve["value"], color=colour, marker="o", markersize=4)
        axes.axhline(curve["threshold"], color="0.5", linestyle=":", label=f"{NEGLIGIBLE:.0%} of the reference")
        if curve["horizon"] is not None:
            start, end = curve["interval"]
            axes.axvline(curve["horizon"], color="0.2", label=f"horizon: layer {curve['horizon']}")
            axes.axvspan(start, numbers["depth"] if end is None else end, color="0.2", alpha=0.12, linewidth=0)
        axes.set(xlabel="visual tokens dropped from decoder layer", ylabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
