"""Every method once: what the tests need to know of it. A new method adds one row here; the tests run over the rows.

`tests/promises/` holds what is promised for all methods, `tests/methods/` and `tests/redistribution/` what one paper says.
Arguments are those of recipe strings: the row `fastv` with the arguments `layer=2,tokens=4` is the recipe
`fastv:layer=2,tokens=4`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import vlmprune as vp


@dataclass(frozen=True)
class Form:
    """A pruning method in one form, at one of its stages, for views of random numbers (`methods/views.py`).

    Attributes:
        method: the method.
        layer: decoder layer of the stage.
        merges: it returns hidden states for the kept tokens.
        idle: probes that it declares and this form does not read.
    """

    method: vp.Pruner
    layer: int = 2
    merges: bool = False
    idle: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Row:
    """A method, by its name in recipes."""

    name: str

    def recipe(self, arguments: str) -> str:
        """`fastv:layer=2,tokens=4`, or the name alone."""
        return f"{self.name}:{arguments}" if arguments else self.name


@dataclass(frozen=True)
class Pruning(Row):
    """A pruning method.

    Attributes:
        tiny: arguments for the tiny models (6 layers, pictures of 16 to 39 tokens), one for each form. The first is used where
            one form is enough. Each drops tokens of every picture, and later stages drop more.
        few: arguments that keep a few tokens of each picture, by number.
        long: arguments for a prompt of 8,192 tokens with a picture of 8,100, in a model of 4 layers.
        written: arguments in which each parameter appears at least once with a value other than its default.
        views: its forms on views of random numbers, by their names.
        everything: arguments that keep every token; `tiny` with full budgets if empty.
        reads: how often a prompt waits for values from the device.
        cls: it needs a CLS token in the vision tower.
        drops_only: inside the language model, and without merging: equal to masking.
    """

    tiny: tuple[str, ...]
    few: str
    long: tuple[str, ...]
    written: tuple[str, ...]
    views: dict[str, Form]
    everything: tuple[str, ...] = ()
    reads: int = 1
    cls: bool = False
    drops_only: bool = True

    def all_kept(self) -> Iterator[str]:
        """Arguments that keep every token, as shares and as numbers."""
        if self.everything:
            yield from self.everything
            return
        for arguments in self.tiny:
            budget = re.search(r"fraction=([\d.|]+)", arguments)
            assert budget is not None, arguments
            stages = budget[1].count("|") + 1
            yield arguments.replace(budget[0], "fraction=" + "|".join(["1.0"] * stages))
            yield arguments.replace(budget[0], "tokens=" + "|".join(["1000000"] * stages))


@dataclass(frozen=True)
class Redistribution(Row):
    """A redistribution method.

    Attributes:
        tiny: arguments for the tiny models, by the names of their cases. Each changes what the model computes.
        neutral: arguments under which the method changes nothing.
        few: arguments for one layer.
        long: arguments for layers 1 and 2 of 4, in a prompt of 8,192 tokens.
        reads: how often a prompt waits for values from the device.
        attention_runs: how many more (or fewer) times than the stock model a `long` prompt runs SDPA.
        cls: it needs a CLS token in the vision tower.
    """

    tiny: dict[str, str]
    neutral: tuple[str, ...]
    few: str
    long: str
    reads: int = 1
    attention_runs: int = 0
    cls: bool = False


def relevance(tower_features: Tensor, text_ids: Tensor, text_valid: Tensor) -> Tensor:
    """A relevance for CDPruner, of patches and words."""
    words = (text_ids * text_valid).sum(dim=1) / text_valid.sum(dim=1)  # [image]
    return (tower_features.float() * torch.linspace(-1, 1, tower_features.shape[-1])).sum(-1) + 0.01 * words[:, None].cos()


MUSTDROP = "layer=2|4,fraction=0.5|0.3,merge=0.3,cache_layer=1"
THRESHOLDS = "global_threshold=0.05,individual_threshold=0.2,merge=2,layer=2|4,fraction=1.0|1.0"
VAR = "sink_dims=5|40,tau=2.0,keep=0.2,max_sink_share=0.6,min_image_mass=0.1"
"""In random models of width 64, about one token in ten has a dimension as large: enough sinks without planting any."""
MERGED_IN_TOWER = frozenset({"tower_keys", "tower_features", "features", "project"})

PRUNING = (
    Pruning(
        "adaptinfer",
        tiny=("layer=2,fraction=0.4",),
        few="layer=2,tokens=4",
        long=("layer=1|2,tokens=300|100",),
        written=("layer=2|4,tokens=9|4,positions=compact", "preset=llava-64"),
        views={"adaptinfer": Form(vp.AdaptInfer())},
    ),
    Pruning(
        "cdpruner",
        tiny=("layer=0,fraction=0.4",),
        few="tokens=4",
        long=("tokens=100",),
        written=("layer=0,tokens=9,positions=compact",),
        views={
            "cdpruner": Form(vp.CDPruner(), layer=0),
            "cdpruner-relevance": Form(vp.CDPruner(relevance=relevance), layer=0),
        },
    ),
    Pruning(
        "cls",
        tiny=("layer=0,fraction=0.4",),
        few="tokens=4",
        long=("tokens=300",),
        written=("layer=1,fraction=0.125,positions=compact,newlines=drop",),
        views={"cls": Form(vp.CLS(), layer=0)},
        reads=2,  # also whether the tower's memory holds the picture
        cls=True,
    ),
    Pruning(
        "dart",
        tiny=("layer=2,fraction=0.4",),
        few="layer=2,tokens=4",
        long=("layer=2,tokens=300",),
        written=("layer=3,fraction=0.222,positions=compact",),
        views={"dart": Form(vp.DART())},
    ),
    Pruning(
        "divprune",
        tiny=("layer=0,fraction=0.4",),
        few="tokens=4",
        long=("tokens=100",),
        written=("layer=0,fraction=0.098,positions=compact",),
        views={"divprune": Form(vp.DivPrune(), layer=0)},
    ),
    Pruning(
        "evit",
        tiny=("fraction=0.4,fuse=no", "fraction=0.4,blocks=1"),  # gradients take what weights the fused patch as constant
        few="tokens=8",
        long=("tokens=300", "tokens=300,blocks=0,fuse=mean"),
        written=("tokens=64,blocks=1|2,fuse=mean,positions=compact,newlines=drop", "fraction=0.25,blocks=3,fuse=no"),
        views={"evit": Form(vp.EViT(), layer=0)},
        reads=6,
        cls=True,
        drops_only=False,
    ),
    Pruning(
        "evs",
        tiny=("layer=0,fraction=0.4",),
        few="tokens=4",
        long=("tokens=300",),
        written=("layer=0|3,fraction=0.5|0.25,positions=compact",),
        views={"evs": Form(vp.EVS(), layer=0, idle=frozenset({"features", "frame"}))},  # a picture has one frame
    ),
    Pruning(
        "fastv",
        tiny=("layer=2,fraction=0.4",),
        few="layer=2,tokens=4",
        long=("layer=2,tokens=300",),
        written=("layer=2|4,fraction=0.5|0.25,positions=compact",),
        views={"fastv": Form(vp.FastV())},
    ),
    Pruning(
        "fastvid",
        tiny=("layer=0,fraction=0.4",),
        few="tokens=4",
        long=("tokens=300",),
        written=("tokens=64,segments=3,threshold=-0.5,context=0.4,every=2,own=0.25,positions=compact",),
        views={
            "fastvid": Form(vp.FastVID(), layer=0, merges=True),
            "fastvid-salient": Form(vp.FastVID(context=0.4), layer=0, merges=True),
        },
        drops_only=False,
    ),
    Pruning(
        "flowcut",
        tiny=("fraction=0.3", "layer=2,fraction=0.4"),
        few="tokens=8",
        long=("tokens=300", "layer=2,tokens=300"),
        written=(
            "tokens=64,semantic_scale=paper,newlines=drop,variant_on_units=official,decoder_layer=3,positions=compact",
            "layer=0|2,fraction=0.6|0.3,site=vision|llm",
            "layer=3,fraction=0.3",
        ),
        views={
            "flowcut-decoder": Form(vp.FlowCut(layer=2, tokens=5)),
            "flowcut-unit": Form(vp.FlowCut(variant_on_units="unit"), layer=0),
        },
        reads=6,  # the number of patches that stay, at each place in the tower where some are dropped
        drops_only=False,
    ),
    Pruning(
        "holov",
        tiny=("layer=0,fraction=0.4",),
        few="tokens=4",
        long=("tokens=300",),
        written=("layer=2,tokens=9,positions=compact,newlines=drop",),
        views={"holov": Form(vp.HoloV(), layer=0)},
        reads=2,
        cls=True,
    ),
    Pruning(
        "mustdrop",
        tiny=(MUSTDROP, THRESHOLDS),
        few="layer=2,tokens=4,cache_layer=3",
        long=(
            "layer=1|2,tokens=300|100,merge=0.3,cache_layer=0",
            "layer=1,fraction=1.0,global_threshold=0.001,individual_threshold=0.001,cache_layer=0",
        ),
        written=(
            "layer=2|4,fraction=0.5|0.3,merge=0.25,windows=3,cache_layer=-1,positions=compact",
            "layer=2,fraction=1.0,global_threshold=0.0012,individual_threshold=0.001,merge=2,cache_layer=0",
            "global_threshold=0.011,individual_threshold=0.01",
        ),
        views={
            "mustdrop": Form(vp.MustDrop()),
            "mustdrop-thresholds": Form(vp.MustDrop(global_threshold=0.04, individual_threshold=0.3)),
        },
        everything=(
            "layer=2|4,fraction=1.0|1.0,merge=2,cache_layer=1",
            "layer=2|4,tokens=1000000|1000000,windows=0",
            "layer=2,fraction=1.0,global_threshold=1.0,individual_threshold=0.0,merge=2",  # the published code's defaults
        ),
        reads=6,
        cls=True,
        drops_only=False,
    ),
    Pruning(
        "pdrop",
        tiny=("layer=2|4,fraction=0.5|0.25",),
        few="layer=2,tokens=4",
        long=("layer=1|2,tokens=300|100",),
        written=("layer=1|2|3,fraction=0.5|0.25|0.125,positions=compact",),
        views={"pdrop": Form(vp.PDrop())},
    ),
    Pruning(
        "pixelprune",
        tiny=("fraction=0.4",),
        few="tokens=4",
        long=("tokens=300",),
        written=("tokens=9,tolerance=0.5,positions=compact",),
        views={
            "pixelprune": Form(vp.PixelPrune(), layer=0),
            "pixelprune-tolerance": Form(vp.PixelPrune(tolerance=0.5), layer=0),
        },
        reads=3,
        drops_only=False,
    ),
    Pruning(
        "random",
        tiny=("layer=0,fraction=0.4",),
        few="layer=0,tokens=4",
        long=("tokens=300",),
        written=("layer=0|3,tokens=9|0,seed=-7,positions=compact", "tokens=9,site=pixels"),
        views={"random": Form(vp.Random(), layer=0)},
    ),
    Pruning(
        "sparsevlm",
        tiny=("layer=2,fraction=0.4", "layer=2,fraction=0.4,version=2"),
        few="layer=2,tokens=4",
        # Half of the tokens, where as many clusters as possible would show
        long=("layer=2,fraction=0.5", "layer=2,tokens=300,version=2"),
        written=("preset=v2-96,version=2,positions=compact", "layer=2|4,fraction=0.5|0.3,version=1.5"),
        views={"sparsevlm-1.5": Form(vp.SparseVLM(), merges=True), "sparsevlm-2": Form(vp.SparseVLM(version=2))},
        drops_only=False,
    ),
    Pruning(
        "tome",
        tiny=("layer=1,fraction=0.4",),
        few="layer=0,tokens=4",
        long=("fraction=0.5",),
        written=("layer=1,fraction=0.3333333333333333,positions=compact",),
        views={"tome": Form(vp.ToMe(), layer=0, merges=True)},
        drops_only=False,
    ),
    Pruning(
        "uniform",
        tiny=("layer=0,fraction=0.4",),
        few="layer=0,tokens=4",
        long=("tokens=300",),
        written=("layer=5,tokens=3,positions=compact", "fraction=0.5,site=pixels"),
        views={"uniform": Form(vp.Uniform(), layer=0)},
    ),
    Pruning(
        "vidcom2",
        tiny=("layer=0,fraction=0.4",),
        few="tokens=4",
        long=("tokens=300",),
        written=("layer=0|2,fraction=0.5|0.125,positions=compact",),
        views={"vidcom2": Form(vp.VidCom2(), layer=0)},
    ),
    Pruning(
        "visionzip",
        tiny=("fraction=0.4",),
        few="tokens=4",
        long=("fraction=0.5",),
        written=("tokens=64,contextual=10,positions=compact",),
        views={
            "visionzip": Form(vp.VisionZip(), layer=0, merges=True),
            "visionzip-0": Form(vp.VisionZip(contextual=0), layer=0, idle=MERGED_IN_TOWER),
            "visionzip-3": Form(vp.VisionZip(contextual=3), layer=0, merges=True),
        },
        reads=2,
        cls=True,
        drops_only=False,
    ),
    Pruning(
        "vscan",
        tiny=("layer=0|3,fraction=0.5|0.25",),
        few="tokens=4",
        long=("layer=0|2,fraction=0.5|0.2",),
        written=("layer=0|3,fraction=0.5|0.25,positions=compact",),
        views={"vscan": Form(vp.VScan(), layer=0, merges=True), "vscan-decoder": Form(vp.VScan(), layer=16)},
        reads=3,  # also which crop each token belongs to
        cls=True,
        drops_only=False,
    ),
)
"""One row for each pruning method."""

REDISTRIBUTION = (
    Redistribution(
        "act",
        tiny={"act": "alpha=2"},
        neutral=("beta=1",),
        few="layers=2",
        long="layers=1|2",
        attention_runs=-2,  # it computes all rows of its layers itself
    ),
    Redistribution("pai", tiny={"pai": "alpha=0.5"}, neutral=("alpha=0",), few="layers=1", long="layers=1|2"),
    Redistribution(
        "paint",
        tiny={"paint": ""},
        neutral=("alpha=0,beta=0",),
        few="layers=2",
        long="layers=1|2",
        reads=2,
        cls=True,
    ),
    Redistribution(
        "var",
        tiny={"var": VAR, "var, all layers": f"{VAR},layers=0:"},
        neutral=(
            "keep=1,sink_dims=5",
            "p=0,sink_dims=5",
            "sink_dims=5,tau=0.1,min_image_mass=1",
            "sink_dims=5,tau=7.9",
        ),
        few="sink_dims=5|40,layers=1",
        long="layers=1|2,sink_dims=cosine",
    ),
    Redistribution(
        "vhr",
        tiny={"vhr": ""},
        neutral=("alpha=1",),
        few="layers=2",
        long="layers=1|2",
        attention_runs=3,  # layers 0 to 2 run once more, without the picture
    ),
    Redistribution(
        "zerotuning",
        tiny={"zerotuning": "gain=4,layers=1|3:"},
        neutral=("",),
        few="layers=2,gain=2",
        long="layers=1|2,gain=2",
        attention_runs=-2,
    ),
)
"""One row for each redistribution method."""

ROWS: dict[str, Pruning | Redistribution] = {row.name: row for row in (*PRUNING, *REDISTRIBUTION)}
