"""Stage 2: the language model learns to answer, on frozen visual tokens.

About fifteen questions share one picture: they are packed after its visual tokens into one sequence, in which every question
attends to the picture and to itself only. Auxiliary losses, whose weight falls to zero, start circuits that next-word
prediction alone finds late or never: one head attends from the last word of a noun phrase to the word before it, two heads of
some layers attend from a word to the patches that it means, and a linear probe reads the object's place from that last word.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaNextVideoForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from vlmprune.tiny.architecture import TEXT_WIDTH, VOCABULARY
from vlmprune.tiny.questions import COLUMNS, ROWS, SKILLS
from vlmprune.tiny.scenes import COLOURS, SHAPES, Scene, compose
from vlmprune.tiny.training.code import FIELDS, SCALE, directions, target
from vlmprune.tiny.training.packing import PREFIX, SINGULAR, Batch, Looks, pack, pose
from vlmprune.tiny.training.vision import pixels, projected

if TYPE_CHECKING:
    from vlmprune.tiny.training.clip_packing import ClipBatch

WORD_LAYER, NOUN_LAYER = 1, 3
"""Layers with auxiliary losses on the first heads: attention from a colour or shape word to the patches that encode it, and
from the last word of a noun phrase to the object that it means. One layer later: from the token before a digit to the digit."""
_GROUNDED_HEADS = 2
_HELP, _HELP_UNTIL = 0.3, 0.6
"""Weight of the auxiliary losses at the start, and the share of the stage after which it is zero."""


def initialise(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Weights with which attention compares like with like and copies the values.

    Keys equal queries, and output projections invert value projections. Embeddings and output weights of the words for colours,
    shapes and places have the directions in which visual tokens encode them.
    """
    generator = torch.Generator().manual_seed(seed)
    language = model.model.language_model
    with torch.no_grad():
        for block in language.layers:
            attention, mlp = block.self_attn, block.mlp
            attention.q_proj.weight.normal_(0, TEXT_WIDTH**-0.5, generator=generator)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            nn.init.orthogonal_(attention.v_proj.weight, generator=generator)
            attention.o_proj.weight.copy_(0.5 * attention.v_proj.weight.T)
            for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                linear.weight.normal_(0, 0.5 * linear.in_features**-0.5, generator=generator)
        spoken = torch.zeros(len(VOCABULARY), TEXT_WIDTH)
        code = directions(TEXT_WIDTH) * SCALE
        for words, field in ((COLOURS, "colour"), (SHAPES, "shape"), (SINGULAR, "shape"), (COLUMNS, "column"), (ROWS, "row")):
            for word, direction in zip(words, code[FIELDS[field]], strict=True):
                spoken[VOCABULARY[word]] = direction
        language.embed_tokens.weight.normal_(0, 0.4, generator=generator).add_(spoken)
        model.lm_head.weight.normal_(0, 0.02, generator=generator).add_(0.05 * spoken)


def read(
    model: LlavaForConditionalGeneration | LlavaNextVideoForConditionalGeneration,
    visual: Tensor,
    batch: Batch | ClipBatch,
    on_layer: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Hidden states `[B, Q, D]` of packed questions after visual tokens `[B, P, D]`, before the final norm.

    `places` `[B, P]` are the visual tokens' positions, where some were left out; otherwise they follow each other.

    It computes what the stock forward pass computes with a block mask. `on_layer(index, hidden, queries, keys)` receives each
    layer's input `[B, prefix + Q, D]`, and all scaled queries and keys `[B, H, prefix + Q, d]`; the prefix is `<s> USER:` and
    the visual tokens.
    """
    language = model.model.language_model
    size = batch.ids.shape[0]
    prefix = 2 + visual.shape[1]
    start = language.embed_tokens(torch.tensor([VOCABULARY["<s>"], VOCABULARY["USER:"]]))
    hidden = torch.cat([start.expand(size, -1, -1), visual, language.embed_tokens(batch.ids)], 1)
    seen_at = torch.arange(prefix).expand(size, -1)
    if places is not None:
        seen_at = torch.cat([seen_at[:, :2], places], 1)
    positions = torch.cat([seen_at, batch.position_ids], 1)
    rotation = language.rotary_emb(hidden, positions)
    head = language.layers[0].self_attn.head_dim
    causal = _penalty(torch.ones(prefix, prefix, dtype=torch.bool).tril(), hidden.dtype)
    forbidden = _penalty(batch.mask, hidden.dtype)
    for index, block in enumerate(language.layers):
        attention = block.self_attn
        x = normed(block.input_layernorm, hidden)
        queries, keys, values = (
            linear(x).unflatten(2, (-1, head)).transpose(1, 2)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotation)
        queries = queries * head**-0.5
        if on_layer is not None:
            on_layer(index, hidden, queries, keys)
        seen = _attend(queries[:, :, :prefix], keys[:, :, :prefix], values[:, :, :prefix], causal)
        told = _attend(queries[:, :, prefix:], keys, values, forbidden)
        hidden = hidden + attention.o_proj(torch.cat([seen, told], 2).transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(normed(block.post_attention_layernorm, hidden))
    return hidden[:, prefix:]


def _penalty(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -1e4)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, penalty: Tensor) -> Tensor:
    """Attention written out: at this size the backward of PyTorch's fused CPU kernel takes several times longer."""
    return (queries @ keys.mT + penalty).softmax(-1) @ values


def normed(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    """A Llama norm through PyTorch's fused operator."""
    return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


class LanguageStage:
    """Loss of one batch of packed questions; see `vlmprune.tiny.training.loop` for the contract of a stage."""

    name = "language"

    def __init__(self, model: LlavaForConditionalGeneration, seed: int, batch: int) -> None:
        initialise(model, seed)
        torch.manual_seed(seed + 1)
        self.model, self.batch = model, batch
        self.probe = nn.Linear(TEXT_WIDTH, 2)
        self.trained = nn.ModuleDict({"language": model.model.language_model, "lm_head": model.lm_head, "probe": self.probe})

    def visual(self, scenes: list[Scene]) -> Tensor:
        """Visual tokens of the scenes from the frozen tower and projector: `[B, P, D]`."""
        with torch.no_grad():
            return projected(self.model, pixels(scenes))[0].float()

    def loss(self, seed: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(seed)
        scenes = [compose(seed + index) for index in range(self.batch)]
        batch = pack(scenes, [target(scene) for scene in scenes], [pose(scene, rng) for scene in scenes])
        help_weight = _HELP * max(0.0, 1 - progress / _HELP_UNTIL)
        helped: dict[str, Tensor] = {}

        def on_layer(index: int, hidden: Tensor, queries: Tensor, keys: Tensor) -> None:
            if help_weight:
                helped.update(self._help(index, batch, hidden, queries, keys))

        hidden = read(self.model, self.visual(scenes), batch, on_layer)
        return answer_loss(self.model, hidden, batch, helped, help_weight, SKILLS)

    def _help(self, layer: int, batch: Batch, hidden: Tensor, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """Auxiliary losses of one layer."""
        if layer == WORD_LAYER:
            scores = _log_attention(queries, keys, batch, batch.words)[:, :_GROUNDED_HEADS, :PREFIX]
            # Any patch that encodes the word is right, so the loss is on the attention to all of them together.
            mass = scores.masked_fill(batch.words.wanted[:, None] == 0, -1e4).logsumexp(-1)
            before = _log_attention(queries, keys, batch, batch.nouns)[:, _GROUNDED_HEADS]
            column = PREFIX + batch.nouns.token - 1
            return {"word": -mass.mean(), "phrase": -before.gather(1, column[:, None]).mean()}
        if layer == NOUN_LAYER:
            return {"noun": _attention_loss(queries, keys, batch, batch.nouns)}
        if layer == NOUN_LAYER + 1:
            terms = {}
            if len(batch.digits.token):
                terms["digit"] = _attention_loss(queries, keys, batch, batch.digits)
            if len(batch.placed):
                nouns = batch.nouns
                guess = self.probe(hidden[nouns.picture[batch.placed], PREFIX + nouns.token[batch.placed]]).float()
                terms["place"] = 4 * functional.mse_loss(guess, batch.places)
            return terms
        return {}


def _log_attention(queries: Tensor, keys: Tensor, batch: Batch, looks: Looks) -> Tensor:
    """Log-attention of the given tokens in all heads: `[n, H, PREFIX + Q]`."""
    scores = queries[:, :, PREFIX:].float() @ keys.float().mT
    return scores.masked_fill(~batch.mask, -1e4).log_softmax(-1)[looks.picture, :, looks.token]


def _attention_loss(queries: Tensor, keys: Tensor, batch: Batch, looks: Looks) -> Tensor:
    """Cross-entropy between the attention of the grounded heads and the wanted attention."""
    scores = _log_attention(queries, keys, batch, looks)[:, :_GROUNDED_HEADS, :PREFIX]
    return -(scores * looks.wanted[:, None]).sum(-1).mean()


def answer_loss(
    model: LlavaForConditionalGeneration | LlavaNextVideoForConditionalGeneration,
    hidden: Tensor,
    batch: Batch | ClipBatch,
    helped: dict[str, Tensor],
    help_weight: float,
    skills: Iterable[str],
) -> tuple[Tensor, dict[str, float]]:
    """The loss of packed questions, and what to log of it.

    Args:
        hidden: what `read` returned.
        helped: the auxiliary losses by name, weighted by `help_weight`.
        skills: those to log, in this order.
    """
    final = normed(model.model.language_model.norm, hidden[batch.picture, batch.token])
    logits = model.lm_head(final).float()
    loss = functional.cross_entropy(logits, batch.labels)
    if helped:
        loss = loss + help_weight * torch.stack(list(helped.values())).sum()
    return loss, {**{name: term.item() for name, term in helped.items()}, **_right_by_skill(logits, batch, skills)}


def _right_by_skill(logits: Tensor, batch: Batch | ClipBatch, skills: Iterable[str]) -> dict[str, float]:
    """Share of answers predicted right to the last token, per skill."""
    wrong = torch.zeros(len(batch.skills)).index_add(0, batch.question, (logits.argmax(1) != batch.labels).float())
    shares = {}
    for skill in skills:
        own = [w == 0 for w, s in zip(wrong.tolist(), batch.skills, strict=True) if s == skill]
        if own:
            shares[skill] = sum(own) / len(own)
    return shares
