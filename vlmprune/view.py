"""What a pruning method may look at: a closed list of read-only probes, one entry each.

The first axis of every probe is the picture: `image` counts pictures of equal size, from any sample of the batch, so that a
method neither loops over samples nor meets padding. `visual` counts the tokens of a picture that are left, `text` those of the
prompt after its last picture (as many as the longest of the group has; `text_valid` is False where a shorter one is padded).

A video is a picture with frames: `frames` of them, and its tokens follow each other frame by frame. Videos and pictures are
never in one view, nor are videos with different numbers of frames.

To add a probe, write its entry here and one function of the same name in `vlmprune/live/probes.py` (in `vlmprune/live/tower.py`
if it is taken from a block of the vision tower).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from vlmprune.errors import Renamed

Taken = Literal["pixels", "host", "prompt", "stage", "layer before", "layer ahead", "tower block", "tower end", "tower method"]


@dataclass(frozen=True)
class Probe:
    """One thing that a method may look at.

    Attributes:
        name: what a method lists in `needs` and reads from its `View`.
        shape: its axes; empty if it is no tensor.
        meaning: what it holds.
        taken: where.
            "pixels": what enters the vision tower; for stages at site "pixels" only.
            "host": known before anything is computed.
            "prompt": what enters the language model.
            "stage": what enters the decoder layer of the stage.
            "layer before": the attention of the decoder layer before the stage.
            "layer ahead": the attention of the stage's own layer, computed ahead of it.
            "tower block": the attention of a block of the vision tower.
            "tower end": between the tower and the language model.
            "tower method": inside the tower, by the method that provides it (`TowerPruner.provides`).
        part: of the layer before: "last row", "text rows" or "projections". Of the tower, the block: "first", "early" (a
            quarter into the tower), "feature" (its output feeds the projector) or "final".
        looks_at: what a score from this probe looks at, in the words of the README's table; empty for what only helps to read
            other probes.
        fp32: whether it is fp32 whatever the model's dtype.
    """

    name: str
    shape: str
    meaning: str
    taken: Taken
    part: str = ""
    looks_at: str = ""
    fp32: bool = False

    @property
    def in_tower(self) -> bool:
        """Whether it is taken inside the vision tower."""
        return self.taken.startswith("tower")

    @property
    def per_head(self) -> bool:
        """Whether its second axis counts heads."""
        return self.shape.startswith("[image, head")


_TOKENS, _WORDS, _BOTH = "token features", "embeddings of words", "embeddings of tokens and words"
_LAST, _CLS = "attention of the last prompt token", "attention of the tower's CLS token"
_TURNED = "after rotary embedding as if the sample began at position 0, whatever padding or packing precedes it"

PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Probe("features", "[image, visual, dim]", "hidden states (layer 0: the projector's output)", "stage", "", _TOKENS),
        Probe("text_features", "[image, text, dim]", "the same of the text; 0 where padded", "stage", "", _WORDS),
        Probe("text_valid", "[image, text]", "bool, False where a shorter text is padded", "host"),
        Probe("text_ids", "[image, text]", "token ids of the text", "host"),
        Probe("normed_features", "[image, visual, dim]", "`features` after the final norm", "stage", "", _TOKENS),
        Probe("normed_text_features", "[image, text, dim]", "`text_features` after the final norm", "stage"),
        Probe(
            "embeddings",
            "[image, original, dim]",
            "embeddings of all tokens of the picture, of dropped ones too (NaN if dropped in the tower, or hidden by the mask)",
            "prompt",
            "",
            _BOTH,
        ),
        Probe("text_embeddings", "[image, text, dim]", "embeddings of the text; 0 where padded", "prompt", "", _BOTH),
        Probe(
            "attention_from_last",
            "[image, head, visual]",
            "attention from the last prompt token",
            "layer before",
            "last row",
            _LAST,
            fp32=True,
        ),
        Probe(
            "attention_of_layer",
            "[image, head, visual]",
            "attention from the last prompt token, computed ahead of time with the projections of the stage's own layer",
            "layer ahead",
            "",
            "attention of the last prompt token, one layer on",
            fp32=True,
        ),
        Probe(
            "attention_from_text",
            "[image, head, text, visual]",
            "attention from the text; 0 in rows of padding",
            "layer before",
            "text rows",
            "attention of the text",
            fp32=True,
        ),
        Probe(
            "attention_among_text",
            "[image, head, text, text]",
            "attention from the text to itself; 0 where padded",
            "layer before",
            "text rows",
            "attention within the text",
            fp32=True,
        ),
        Probe(
            "query_of_last",
            "[image, head, dim]",
            f"query of the last prompt token, {_TURNED}",
            "layer before",
            "projections",
            _LAST,
        ),
        Probe("value_of_last", "[image, kv_head, dim]", "value of the last prompt token", "layer before", "projections"),
        Probe("keys", "[image, kv_head, visual, dim]", f"keys, {_TURNED}", "layer before", "projections", "keys"),
        Probe("values", "[image, kv_head, visual, dim]", "values", "layer before", "projections", "values"),
        Probe("text_keys", "[image, kv_head, text, dim]", "the same of the text", "layer before", "projections"),
        *(
            Probe(
                f"attention_from_cls{suffix}",
                "[image, head, visual]",
                f"attention from the tower's CLS token in {block}",
                "tower block",
                part,
                _CLS,
                fp32=True,
            )
            for suffix, part, block in (
                ("", "feature", "the block whose output feeds the projector"),
                ("_first", "first", "the first block"),
                ("_early", "early", "the block a quarter into the tower (block 5 of 24)"),
                ("_final", "final", "the last block"),
            )
        ),
        Probe(
            "tower_keys",
            "[image, visual, dim]",
            "keys of the tower's block that feeds the projector, mean over heads",
            "tower block",
            "feature",
            "keys of the tower",
            fp32=True,
        ),
        Probe("tower_features", "[image, visual, dim]", "what enters the projector", "tower end"),
        Probe("cell", "[image, visual]", "cell of each token in its crop of `side` × `side`, row by row", "tower end"),
        Probe(
            "pixels",
            "[image, visual, value]",
            "pixels of each token's patches, as the processor normalised them",
            "pixels",
            "",
            "pixels",
        ),
        Probe("project", "", "the model's projector, from `tower_features` to `features`", "host"),
        Probe("rotary", "[image, visual, 2, dim]", "cosines and sines of the tokens' rotary positions", "stage"),
        Probe("text_rotary", "[image, text, 2, dim]", "the same of the text; 0 where padded", "stage"),
        Probe("frame", "[image, visual]", "int64, the frame that each token shows, rising from 0; all 0 of a picture", "host"),
        Probe("times", "[image, frame]", "seconds at which each frame is shown; NaN where unknown, and of a picture", "host"),
        Probe(
            "identity",
            "",
            "one whole number per picture, equal for equal prompts whatever the batch: a seed for random choices",
            "host",
        ),
    )
}
"""Every probe, by its name."""

PROVIDED: dict[str, Probe] = {}
"""The probes that methods which work inside the tower provide, by name (`TowerPruner.provides`)."""


def _names(taken: Taken, part: str | None = None) -> frozenset[str]:
    return frozenset(name for name, probe in PROBES.items() if probe.taken == taken and part in (None, probe.part))


EMBEDDINGS = _names("prompt")
LAST_ROW = _names("layer before", "last row")
TEXT_ROWS = _names("layer before", "text rows")
PROJECTIONS = _names("layer before", "projections")
BEFORE_THE_STAGE = LAST_ROW | TEXT_ROWS | PROJECTIONS
"""Probes that are taken from the attention of the layer before a stage."""

AHEAD = _names("layer ahead")
WEIGHTS = LAST_ROW | TEXT_ROWS | AHEAD
"""Probes that are attention weights of the language model."""

OF_QUESTION = WEIGHTS | frozenset(name for name, probe in PROBES.items() if "text" in probe.shape or name.endswith("_of_last"))
"""Probes that look at what follows the picture."""

AT_PIXELS = _names("pixels") | {"cell", "identity"}
"""Probes that a stage at site "pixels" can look at. `identity` is then equal for equal pictures, whatever is asked."""
FROM_TOWER = frozenset(name for name, probe in PROBES.items() if probe.in_tower)
"""Probes that are taken in the vision tower, of towers that have a CLS token."""


def known_probes() -> dict[str, Probe]:
    """All probes that a method may list: ours, and those that methods inside the tower provide."""
    return {**PROBES, **PROVIDED}


def taken_in_tower(needs: Iterable[str]) -> frozenset[str]:
    """Those of some probes that are taken inside the vision tower."""
    found = []
    for name in needs:
        probe = PROBES.get(name) or PROVIDED.get(name)
        if probe is not None and probe.in_tower:
            found.append(name)
    return frozenset(found)


@dataclass(frozen=True)
class TowerFacts(Renamed):
    """Facts about a model that a method may use before it runs.

    Attributes:
        cls: the vision tower has a CLS token whose attention can be used.
        crops: a picture may be cut into several crops (LLaVA-NeXT).
        patches_per_token: patches that become one visual token (Qwen-VL, InternVL: 4).
        windows: the attention of some blocks of the tower is limited to windows of the picture (Qwen2.5-VL).
        whole: the tower needs every patch up to its end: it takes features from several blocks, or merges squares of patches.
        width: numbers of a patch in the tower, or 0 if unknown.
        blocks: blocks of the tower up to the one whose output feeds the projector, or 0 if unknown.
        refusal: why there is no usable CLS token.
    """

    cls: bool = False
    crops: bool = False
    patches_per_token: int = 1
    windows: bool = False
    whole: bool = False
    width: int = 0
    blocks: int = 0
    refusal: str = "its vision tower has no CLS token"

    _former: ClassVar[Mapping[str, str]] = {"unit": "patches_per_token"}


@dataclass(frozen=True, eq=False)
class View:
    """What a pruning method sees at one stage: some pictures of equal size, and the probes that it lists in `needs`.

    Attributes:
        layer: decoder layer of the stage.
        original: tokens the picture had before any pruning.
        position: `[image, visual]` index of each remaining token in its picture, 0 … original − 1, rising.
        entered: tokens of the picture that entered the language model: fewer than `original` if the tower dropped some.
        side: rows, and columns, of a crop where `cell` is available.
        grid: rows and columns of the picture's tokens, row by row, at site "pixels"; None at other sites.
        frames: frames of each video; 1 of a picture, and where each frame is decided by itself (`Pruner.per`). Where a model
            makes one token of several frames that follow each other (Qwen-VL), these count as one.
        over_picture: `[image, visual]` what `Pruner.over_picture` returned for the whole pictures, where each `image` here is
            one crop of a picture (LLaVA-NeXT); None where it is the whole picture.
    """

    layer: int
    original: int
    position: Tensor
    probes: dict[str, Any] = field(repr=False)
    entered: int = 0
    side: int = 0
    grid: tuple[int, int] | None = None
    over_picture: Tensor | None = None
    frames: int = 1

    @property
    def images(self) -> int:
        """Number of pictures."""
        return self.position.shape[0]

    @property
    def visual(self) -> int:
        """Tokens of each picture that are left."""
        return self.position.shape[1]

    def __getattr__(self, name: str) -> Any:
        if name in (probes := self.__dict__.get("probes", {})):
            return probes[name]
        known = known_probes()
        if name not in known:
            raise AttributeError(f"a view has no {name!r}; probes: {', '.join(known)}.")
        raise AttributeError(f"the method looks at {name!r} but does not declare it: add it to its `needs`.")
