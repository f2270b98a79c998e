"""PAINT (arXiv:2501.12206) as the paper writes it: the whole softmax, one row and one key at a time, then the edit."""

from __future__ import annotations

from redistribution.loops.plain import raised, softmax
from tiny_models import LAYERS


def paint(alpha, beta, sets):
    """`sets`: per sample, (local, summary) columns."""

    def edit(oracle, layer, sample, head, row, seen, scores):
        if row < oracle.prompt - 1:
            return softmax(scores[row])
        local, summary = sets[sample]
        return raised(scores[row], [alpha * (k in local) + beta * (k in summary) for k in seen[row]])

    return edit


def paint_sets(eager, inputs):
    """Per sample, local and summary columns, from the eager tower's own attention maps."""
    attentions = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    used = eager.config.vision_feature_layer
    columns = (inputs["input_ids"] == eager.config.image_token_id).nonzero().tolist()
    sets = [(set(), set()) for _ in inputs["input_ids"]]
    patches = attentions[0].shape[-1] - 1
    for picture in range(len(inputs["pixel_values"])):
        first = attentions[0][picture, :, 0, 1:].sum(0).tolist()
        late = attentions[used][picture, :, 0, 1:].sum(0).tolist()
        ranked = sorted(late)

        def quantile(q, ranked=ranked):
            at = q * (len(ranked) - 1)
            low = int(at)
            return ranked[low] + (at - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low])

        bound = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
        summary = {j for j in range(patches) if late[j] > bound}
        local = set(sorted(range(patches), key=lambda j: -first[j])[: patches // 4]) - summary
        mine = columns[picture * patches : (picture + 1) * patches]
        for where, chosen in ((0, local), (1, summary)):
            sets[mine[0][0]][where].update(mine[j][1] for j in chosen)
    return sets


def edited(eager, inputs):
    """The layers that the row of `cases.py` edits in the tiny models, and the edit, for `redistribution.explicit.Explicit`."""
    return range(2, LAYERS), paint(0.7, 0.4, paint_sets(eager, inputs))
