"""Answers of two recipes whose true accuracies are known."""

from __future__ import annotations

import numpy as np


def simulate(rng, units, per_unit, accuracy, agreement=1.0, loss=0.0, cluster=0.0):
    """Scores `[question]` of two recipes and the questions' units; the second is `loss` worse, the same in `agreement`.

    `cluster` is how much of a question's luck it shares with the others of its unit, from 0 to 1.
    """
    shape = (units, per_unit)
    shared = rng.random((units, 1)) < cluster
    luck = np.where(shared, rng.random((units, 1)), rng.random(shape))
    first = luck < accuracy
    down, up = (1 - agreement + loss) / 2, (1 - agreement - loss) / 2  # right to wrong, wrong to right
    change = np.where(shared, rng.random((units, 1)), rng.random(shape))
    second = np.where(first, change >= down / accuracy, change < up / max(1 - accuracy, 1e-9))
    return first.ravel().astype(float), second.ravel().astype(float), np.repeat(np.arange(units), per_unit)
