"""Pruning as dropping: one unpadded sample whose hidden rows are really taken out; and scores from stock eager attention."""

from __future__ import annotations

import torch

from oracles.mask import Effect, Keep, _forward_with_hooks, as_mask, effects_of, masked_forward
from oracles.places import image_columns, prompt_positions


@torch.no_grad()
def naively_dropped_logits(
    model, inputs: dict, keep: Keep | Effect, extra_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one unpadded sample whose hidden rows really are cut at each stage, and the columns that remain.

    `extra_ids` [1, n] are teacher-forced behind the prompt.  Stages renumber positions all or not at all.
    """
    ids = inputs["input_ids"]
    assert ids.shape[0] == 1
    (effect,) = effects_of(keep)
    assert not effect.keep_cache, "what decoding forgets cannot be dropped before"
    assert effect.compact in (frozenset(), frozenset(effect.keep)), "stages of both kinds"
    if extra_ids is not None:
        prompt = ids.shape[1]
        inputs = {"input_ids": torch.cat([ids, extra_ids], 1)} | {
            name: torch.nn.functional.pad(value, (0, extra_ids.shape[1]), value=int(name == "attention_mask"))
            if value.shape == (1, prompt)
            else value
            for name, value in inputs.items()
            if name != "input_ids"
        }
    extra = inputs["input_ids"].shape[1] - ids.shape[1]
    alive = torch.arange(inputs["input_ids"].shape[1])

    def dropping(index):
        def hook(module, args, kwargs):
            nonlocal alive
            hidden = args[0]
            for _, places, features in effect.merged.get(index, []):
                hidden = hidden.clone()
                hidden[0, (alive == places[:, None]).nonzero()[:, 1]] = features[(alive == places[:, None]).any(1)]
            if index in effect.keep:
                wanted = torch.nn.functional.pad(effect.keep[index][0], (0, extra), value=True)[alive]
                hidden, alive = hidden[:, wanted], alive[wanted]
            if any(stage <= index for stage in effect.keep):
                if effect.compact:
                    numbers = torch.arange(len(alive))[None]
                    kwargs["position_embeddings"] = model.model.language_model.rotary_emb(hidden, numbers)
                else:
                    cos, sin = kwargs["position_embeddings"]
                    kwargs["position_embeddings"] = (cos[:, alive], sin[:, alive])
                allowed = torch.ones(len(alive), len(alive), dtype=torch.bool).tril()[None, None]
                kwargs["attention_mask"] = as_mask(model, allowed, hidden.dtype)
            return (hidden, *args[1:]), kwargs

        return hook

    positions = prompt_positions(model, inputs)
    logits = _forward_with_hooks(model, dropping, **inputs, position_ids=positions, use_cache=False).logits
    return logits, alive


def random_keep(model, inputs: dict, fractions: dict[int, float], seed: int = 0) -> Keep:
    """A keep dict that drops visual tokens at random (nested stages), padding too, text never."""
    random = torch.Generator().manual_seed(seed)
    ids = inputs["input_ids"]
    luck = torch.rand(ids.shape, generator=random)
    visual, real = image_columns(model, ids), inputs["attention_mask"].bool()
    return {layer: real & (~visual | (luck < fraction)) for layer, fraction in fractions.items()}


@torch.no_grad()
def fastv_scores(eager_model, inputs: dict, layer: int, keep: Keep | None = None) -> torch.Tensor:
    """Attention [batch, sequence] from the last prompt token in decoder layer `layer - 1`, mean over heads."""
    attentions = masked_forward(eager_model, inputs, keep or {}, output_attentions=True).attentions
    return attentions[layer - 1].mean(1)[:, -1]


@torch.no_grad()
def cls_scores(eager_model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Attention [image, patch] from the class token in the tower layer whose output LLaVA uses, mean over heads."""
    output = eager_model.model.vision_tower(pixel_values, output_attentions=True)
    used = eager_model.config.vision_feature_layer  # -2: hidden_states[-2] is the output of the last layer but one
    assert used < 0
    return output.attentions[used + 1 - 1][:, :, 0, 1:].mean(1)


@torch.no_grad()
def projected_features(model, inputs: dict) -> list[torch.Tensor]:
    """Per image of the batch, in order, the features [visual, dim] that enter the language model."""
    wanted = {"pixel_values", "image_grid_thw", "image_sizes"} & inputs.keys()
    output = model.model.get_image_features(**{name: inputs[name] for name in wanted}, return_dict=True)
    return list(output.pooler_output)
