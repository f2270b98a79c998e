"""Writes the support matrix from the results of the family tests: docs/families.md, and the table of README.md.

    VLMPRUNE_FAMILIES=all VLMPRUNE_MATRIX=docs/results/families.json python -m pytest tests/families/test_matrix.py
    python tests/families/matrix.py            # writes both texts
    python tests/families/matrix.py --check    # only says whether they agree with the results

`make test-families` does both.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from families.cells import CELLS, KINDS, WAYS, Cell  # noqa: E402
from families.table import NAMES, TINY  # noqa: E402
from video.cells import CELLS as OF_VIDEOS  # noqa: E402
from video.cells import NAMES as WITH_VIDEOS  # noqa: E402
from video.cells import WAYS as WAYS_OF_VIDEOS  # noqa: E402
from video.cells import WITH_VIDEO  # noqa: E402

RESULTS = ROOT / "docs/results/families.json"
OLDEST = ROOT / "docs/results/families-oldest.json"
VIDEOS = ROOT / "docs/results/families-video.json"
PAGE = ROOT / "docs/families.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- families: python tests/families/matrix.py -->", "<!-- end of families -->"

SHORT = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL, experts",
    "qwen3_5": "Qwen3.5, Qwen3.6",
    "qwen3_5_moe": "Qwen3.5, Qwen3.6, experts",
    "internvl": "InternVL 3, 3.5",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "gemma4_moe": "Gemma 4, experts",
    "gemma4_e": "Gemma 4 E2B, E4B",
    "llava_onevision": "LLaVA-OneVision",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "mistral3": "Mistral 3",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
    "glm46v": "GLM-4.6V",
    "paligemma": "PaliGemma",
    "paligemma2": "PaliGemma 2",
    "lfm2_vl": "LFM2-VL",
    "aya_vision": "Aya Vision",
    "cohere2_vision": "Cohere2 Vision",
    "llava_next_video": "LLaVA-NeXT-Video",
    "video_llama_3": "VideoLLaMA 3",
    "perception_lm": "Perception-LM",
    "ovis2": "Ovis2",
    "fast_vlm": "FastVLM",
    "janus": "Janus",
    "deepseek_vl": "DeepSeek-VL",
    "deepseek_vl_hybrid": "DeepSeek-VL, hybrid tower",
}
"""What the families are called outside."""


def traits(name: str) -> str:
    """What a family has that plain decoders do not."""
    tiny = TINY[name]
    words = [
        f"windows of some layers ({tiny.window} tokens in the tests)" if tiny.window else "",
        "blocks that see both ways" if tiny.blocks else "",
        f"features injected after {tiny.injected} layers" if tiny.injected else "",
        "recurrent layers" if tiny.recurrent else "",
    ]
    return ", ".join(word for word in words if word) or "–"


Outcomes = dict[str, dict[str, str]]


def count(cells: list[Cell], outcomes: Outcomes) -> str:
    """`12` if all passed, `10 of 12` if others are refused, "–" if there is no such cell."""
    if not cells:
        return "–"
    passed = sum(outcomes[cell.id]["outcome"] == "passed" for cell in cells)
    return str(passed) if passed == len(cells) else f"{passed} of {len(cells)}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_way(outcomes: Outcomes, cells: Sequence[Cell], ways: Sequence[str]) -> str:
    names = dict.fromkeys(cell.family for cell in cells)
    rows = [
        [SHORT[name], f"`{TINY[name].model_type}`"]
        + [count([cell for cell in cells if cell.family == name and cell.way == way], outcomes) for way in ways]
        for name in names
    ]
    return table(["family", "type", *ways], rows)


def by_batch(outcomes: Outcomes) -> str:
    rows = [
        [SHORT[name]]
        + [count([cell for cell in OF_VIDEOS if (cell.family, cell.batch) == (name, batch)], outcomes) for batch in WITH_VIDEO]
        for name in WITH_VIDEOS
    ]
    return table(["family", *WITH_VIDEO], rows)


def by_kind(outcomes: Outcomes) -> str:
    rows = []
    for name in NAMES:
        greedy = [cell for cell in CELLS if cell.family == name and cell.way == "greedy"]
        stages = [count([cell for cell in greedy if cell.stages == stage], outcomes) for stage in ("0", "2", "1+3", "4")]
        kinds = [count([cell for cell in greedy if cell.kind == kind], outcomes) for kind in KINDS]
        attentions = [
            count([cell for cell in greedy if cell.attention == attention], outcomes) for attention in ("sdpa", "eager")
        ]
        rows.append([SHORT[name], traits(name), *stages, *kinds, *attentions])
    stages = ["before layer 0", "layer 2", "layers 1 and 3", "layer 4"]
    return table(["family", "beside plain decoders", *stages, *KINDS, "SDPA", "eager"], rows)


def refused(outcomes: Outcomes, cells: Sequence[Cell]) -> str:
    reasons = Counter(found["reason"] for found in outcomes.values() if found["outcome"] == "skipped")
    rows = []
    for reason, number in reasons.most_common():
        names = {cell.family: None for cell in cells if outcomes[cell.id]["reason"] == reason}
        rows.append([str(number), reason, ", ".join(SHORT[name] for name in names)])
    return table(["cells", "reason", "families"], rows)


def page(results: dict[str, Any]) -> str:
    """docs/families.md."""
    outcomes, versions = results["cells"], results["versions"]
    passed = sum(found["outcome"] == "passed" for found in outcomes.values())
    return f"""# Model families

Every supported family, and what was tested of it. Written by `python tests/families/matrix.py` from
[the results](results/families.json) of `make test-families` (transformers {versions["transformers"]}, torch
{versions["torch"]}, on a CPU); do not edit it.

{on_oldest()}

{len(outcomes)} cells: {passed} passed, {len(outcomes) - passed} refused for a reason below. Each cell is a tiny random
model of the stock class (six decoder layers, boosted weights), one batch, one recipe and one way of running. It passes if all
logits behind the prompt and in five decoding steps are within 5e-5 of the un-pruned model with the same tokens masked, or, in
families with recurrent layers, of one whose dropped rows are really cut out; and if pruning moved them by more than 0.1.
*keep all* and *removed* pass if they are bit-identical to the plain model. Nothing here says how accurate a checkpoint stays.

## Ways of running

Numbers of cells that passed; "a of b" where the others are refused. *greedy* has batches of one, long prompts (beyond the
windows), several pictures, ragged rows padded on the left, and a row without a picture.

{by_way(outcomes, CELLS, WAYS)}

## Stages, kinds of methods, attention

Of *greedy*. A method of each kind: *blind* looks at nothing (`random`), *features* at token features (`divprune`),
*attention* at the attention of the layer before its stage (`fastv`), *ahead* at that of the stage's own layer (`pdrop`).

{by_kind(outcomes)}

## What is refused

{refused(outcomes, CELLS)}

`tests/families/test_methods.py` has every method on every family: its contract is tested, or the sentence by which it is
refused. What is refused in general is in [limits.md](limits.md).

{of_videos()}

## Other families

`vlmprune.wrap(model, recipe, family="auto")` looks at a model of an unknown family. It finds the text model, the placeholder
and the kinds of layers, and refuses whatever might be silently wrong: arguments of the text model or of its layers that nobody
knows, attention that is not causal, token types by which masks may not be causal, keys that layers share. What is left runs
methods that look at nothing but features; a budget then is of all visual tokens of a sample together, because where a picture
ends is unknown. `print(run.found)` shows what was found. `vlmprune.check(model, inputs, recipe, family="auto")` compares it
with the un-pruned model on your own prompt; on the command line, `vlmprune check` does so for supported families.

The towers of FastVLM and Perception-LM are those of timm, which the tests replace by a small one of their own.
"""


def of_videos() -> str:
    """The section on videos."""
    results = json.loads(VIDEOS.read_text())
    outcomes, versions = results["cells"], results["versions"]
    passed = sum(found["outcome"] == "passed" for found in outcomes.values())
    return f"""## Videos

The families that take videos, in {len(outcomes)} more cells of the same kind: {passed} passed, {len(outcomes) - passed} refused
for a reason below ([results](results/families-video.json) of `make test-video`, transformers {versions["transformers"]}). The
stages are before layer 0, before layer 2, and before layers 1 and 3. *per frame* gives every frame the budget, and also passes
only if every frame keeps exactly that.

{by_way(outcomes, OF_VIDEOS, WAYS_OF_VIDEOS)}

By batch: a video, two in a row, ragged rows padded on the left, a picture before and behind a video in one row, and a row
without either.

{by_batch(outcomes)}

{refused(outcomes, OF_VIDEOS)}"""


def on_oldest() -> str:
    """A sentence about the oldest supported transformers."""
    results = json.loads(OLDEST.read_text())
    found = [cell["outcome"] for cell in results["cells"].values()]
    return (
        f"With transformers {results['versions']['transformers']}, the oldest supported version, two cells of each family\n"
        f"were run: {found.count('passed')} passed, {found.count('skipped')} refused for the same reason as on the newest\n"
        "([results](results/families-oldest.json))."
    )


def short(results: dict[str, Any]) -> str:
    """The table of README.md."""
    outcomes, versions = results["cells"], results["versions"]
    rows = []
    for name in NAMES:
        mine = [cell for cell in CELLS if cell.family == name]
        missing = {outcomes[cell.id]["reason"]: None for cell in mine if outcomes[cell.id]["outcome"] == "skipped"}
        rows.append([SHORT[name], f"`{TINY[name].model_type}`", count(mine, outcomes), "; ".join(missing) or "–"])
    oldest = json.loads(OLDEST.read_text())
    newest = (
        f"Cells of the [family matrix](docs/families.md) that passed with transformers {versions['transformers']}; with "
        f"{oldest['versions']['transformers']}, the oldest supported version, two cells of each family are run."
    )
    return f"{newest}\n\n{table(['family', 'type', 'cells', 'refused because'], rows)}"


def with_table(text: str, results: dict[str, Any]) -> str:
    """README.md with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"README.md has no line {BEGIN}"
    return f"{before}{BEGIN}\n{short(results)}\n{END}{after}"


def differing() -> list[str]:
    """The files that do not agree with the results."""
    results = json.loads(RESULTS.read_text())
    readme = README.read_text()
    wrong = [] if PAGE.read_text() == page(results) else [PAGE.name]
    return wrong + ([] if readme == with_table(readme, results) else [README.name])


def main() -> None:
    if "--check" in sys.argv:
        sys.exit(f"run python tests/families/matrix.py: {', '.join(wrong)}" if (wrong := differing()) else 0)
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(page(results))
    README.write_text(with_table(README.read_text(), results))


if __name__ == "__main__":
    main()
