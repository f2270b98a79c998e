"""The judges of what a wrapped model computes. They share no code with vlmprune.

mask.py     the un-pruned stock model under masks: what a pruned model must equal
naive.py    one sample whose rows are really taken out; scores from stock eager attention
places.py   where pictures, layers and positions are
runs.py     runs of a pruned model, and what they must equal
watch.py    every operation of a run, seen by torch's dispatcher
"""

from oracles.mask import (
    TOLERANCE,
    Claims,
    Effect,
    Entering,
    Keep,
    LiveMaskOracle,
    as_mask,
    effect_of,
    effects_of,
    masked_forward,
    masked_logits,
    masked_output,
)
from oracles.naive import cls_scores, fastv_scores, naively_dropped_logits, projected_features, random_keep
from oracles.places import (
    columns_of_image,
    decoder_layers,
    image_columns,
    prompt_positions,
    separators,
    visual_columns,
)
from oracles.runs import (
    assert_equals_masked,
    decisions,
    expected_counts,
    generate_logits,
    keep_from_record,
    kept_sets,
    physical_lengths,
    resident_lengths,
    rows_with_pictures,
    scheduled_lengths,
)
from oracles.watch import Watch

__all__ = [
    "TOLERANCE",
    "Claims",
    "Effect",
    "Entering",
    "Keep",
    "LiveMaskOracle",
    "Watch",
    "as_mask",
    "assert_equals_masked",
    "cls_scores",
    "columns_of_image",
    "decisions",
    "decoder_layers",
    "effect_of",
    "effects_of",
    "expected_counts",
    "fastv_scores",
    "generate_logits",
    "image_columns",
    "keep_from_record",
    "kept_sets",
    "masked_forward",
    "masked_logits",
    "masked_output",
    "naively_dropped_logits",
    "physical_lengths",
    "projected_features",
    "prompt_positions",
    "random_keep",
    "resident_lengths",
    "rows_with_pictures",
    "scheduled_lengths",
    "separators",
    "visual_columns",
]
