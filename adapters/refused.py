"""Model types that are known and not supported, each with what is different about it. A table for sentences: nothing else reads
it."""

from __future__ import annotations

_CROSS = "pictures are keys of cross-attention in it, and no tokens of the sequence"
_ENCODER = "it is an encoder and a decoder, and pictures are in the encoder's sequence"
_QUERIES = "learned queries stand for a picture in it, and have no places there"
_INDEXED = "an indexer with keys of its own chooses what its attention looks at, and pruning would have to shorten these, too"
_CODES = "pictures are words of its vocabulary, and not features of a tower"

REFUSED: dict[str, str] = {
    "blip": _CROSS,
    "evolla": _CROSS,
    "idefics": _CROSS,
    "mllama": _CROSS,
    "florence2": _ENCODER,
    "pix2struct": _ENCODER,
    "pp_formulanet": _ENCODER,
    "t5gemma2": _ENCODER,
    "udop": _ENCODER,
    "vision-encoder-decoder": _ENCODER,
    "blip-2": _QUERIES,
    "idefics2": _QUERIES,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "kosmos-2": _QUERIES,
    "kosmos-2.5": _QUERIES,
    "dots3_note": _INDEXED,
    "glm5_next": _INDEXED,
    "minimax_m3_vl": _INDEXED,
    "mistral_large4": _INDEXED,
    "qwen4_exp": _INDEXED,
    "chameleon": _CODES,
    "emu3": _CODES,
    "gemma3n": "its hidden states have an axis more than those of other decoders (AltUp), and each layer has inputs of its own",
    "llama4": "its layers see chunks of the padded sequence, and its rotary embeddings are complex numbers",
    "molmo2": "all pictures of a prompt see each other in both directions",
}
