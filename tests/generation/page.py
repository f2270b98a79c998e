"""Writes docs/generation.md from the results of the tests of ways of generating.

    VLMPRUNE_GENERATION=all VLMPRUNE_WAYS=docs/results/generation.json python -m pytest tests/generation/test_ways.py
    python tests/generation/page.py            # writes the page
    python tests/generation/page.py --check    # only says whether it agrees with the results

`make test-generation` does both. Columns of ways that the family matrix has come from its results.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from families import cells  # noqa: E402
from families.matrix import SHORT, count, table  # noqa: E402
from families.table import NAMES  # noqa: E402
from generation.ways import CELLS, WAYS  # noqa: E402

RESULTS = ROOT / "docs/results/generation.json"
FAMILIES = ROOT / "docs/results/families.json"
PAGE = ROOT / "docs/generation.md"
ELSEWHERE = ("greedy", "beams", "sampling", "no cache", "prompt lookup", "second turn")
"""Ways of the family matrix."""


def by_way(results: dict[str, Any]) -> str:
    rows = [
        [SHORT[name], *(count([c for c in CELLS if (c.family, c.way) == (name, way)], results["cells"]) for way in WAYS)]
        for name in NAMES
    ]
    return table(["family", *WAYS], rows)


def in_the_family_matrix(families: dict[str, Any]) -> str:
    rows = []
    for name in NAMES:
        mine = [cell for cell in cells.CELLS if cell.family == name and cell.id in families["cells"]]
        rows.append([SHORT[name], *(count([cell for cell in mine if cell.way == way], families["cells"]) for way in ELSEWHERE)])
    return table(["family", *ELSEWHERE], rows)


def refused(results: dict[str, Any]) -> str:
    outcomes = results["cells"]
    rows = []
    for reason, number in Counter(x["reason"] for x in outcomes.values() if x["outcome"] == "skipped").most_common():
        mine = [cell for cell in CELLS if outcomes[cell.id]["reason"] == reason]
        ways = ", ".join(dict.fromkeys(cell.way for cell in mine))
        names = dict.fromkeys(SHORT[cell.family] for cell in mine)
        rows.append([str(number), reason, ways, "all" if len(names) == len(NAMES) else ", ".join(names)])
    return table(["cells", "reason", "ways", "families"], rows)


def page(results: dict[str, Any], families: dict[str, Any]) -> str:
    """docs/generation.md."""
    outcomes, versions = results["cells"], results["versions"]
    passed = sum(found["outcome"] == "passed" for found in outcomes.values())
    return f"""# Ways of generating

Everything that `generate` can do with a picture, on a pruned model: computed exactly, or refused in one sentence. *Exactly*
means what [limits.md](limits.md) says: as the un-pruned model computes it if, from the layer of a stage on, only the kept
tokens are visible. Written by `python tests/generation/page.py` from [the results](results/generation.json) of `make
test-generation` (transformers {versions["transformers"]}, torch {versions["torch"]}, on a CPU); do not edit it.

## One picture, many questions

A recipe whose methods look at the picture alone prunes it once, however many questions are asked:

```python
with vlmprune.wrap(model, "divprune:tokens=64") as run:
    prefix = run.encode(**processor(text=before_the_question, images=picture, return_tensors="pt"))
    questions = processor.tokenizer(["…", "…"], padding=True, add_special_tokens=False, return_tensors="pt")
    answers = model.generate(**prefix.ask(**questions), max_new_tokens=32)
```

`before_the_question` is the chat template's text up to the question, and each question is the rest of the template. Cut where
the template has a special token or a line break, so that no word piece spans the cut. `prefix.ask` returns `input_ids` of
whole prompts, `attention_mask`, `past_key_values`, and `position_ids` for models with M-RoPE: transformers' own way to share
a prefix (a copy of a filled cache), with masks and positions made. What `generate` returns begins with these ids, as always.

* A batch of questions may be padded on either side; padding is moved between the prefix and each question. Where it would count
  there (recurrent layers, windows), only questions of equal length are taken together, and others are refused: ask them one at
  a time.
* Beams and several sequences need a row of the cache for each: `prefix.ask(**questions, copies=num_beams)`.
* Memory: the prefix holds what was kept of the picture and the text before the question, once (`prefix.bytes`). n questions in
  one batch hold it n times beside that, while they run; questions one after the other once.
* `run.last` and `run.report()` after `encode` are about the prefix. `run.override(tokens=…)` around `encode` sets its budget.
* `random` draws once for all questions of a prefix; in prompts of their own, it draws for each.

Refused, each with the reason: a method that looks at the question (the attention of the last prompt token or of the text,
words, their keys or embeddings), redistribution, a stage that removes tokens from the cache after prefill, and models in
which the whole prompt sees itself in both directions (PaliGemma). Time and memory against separate prompts:
[results](results/prefix-cpu.md).

## Pictures that the embeddings hold already

```python
with run.override(image_positions=places):  # [batch, token]: true at the tokens of pictures
    model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=32)
```

Every run of true is a picture. Where a picture's tokens have others between them, give numbers instead: 0 for words, n for
the tokens of a row's n-th picture. Which tokens are frames of a video cannot be said: methods that compare frames (EVS,
VidCom2, FastVID) and `per=frame` are refused. Methods that read token ids still need `input_ids`. Methods that look into the
vision tower find its probes by the features, if the wrapped model encoded them. DeepStack's features (Qwen3-VL) are not in
embeddings: transformers leaves them out, and so do we.

## Caches, guesses, servers

* **Quantised caches** (`cache_implementation="quantized"`): a pruned layer quantises what is left, as a cache of its own
  would, with the backend's own code. The tests run the backend of torch itself (`fp8`, transformers 5.23); quanto 0.2.7 and
  hqq 0.2.8 were run once, by hand (LLaVA and Qwen2.5-VL shapes, two recipes: within 7e-7 of the stock model whose dropped
  rows are cut out). `run.report()` counts bytes as if they were not quantised. Redistribution, and stages that remove tokens
  from the cache after prefill, are refused.
* **Offloaded caches** (`cache_implementation="offloaded"`): the same numbers as without. Tested on a CPU, where what is
  offloaded is really out of reach; not on a GPU. `offloaded_static` is refused.
* **`prefill_chunk_size`** is refused for a prompt with pictures: a method decides over whole pictures, and transformers cuts
  their features into pieces that do not say what picture they are of. Behind a prefix, questions may come in chunks.
* **Assisted decoding** says what greedy decoding says. An assistant may be wrapped, too, but transformers
  {versions["transformers"]} shows it the places of pictures and no picture, so that a recipe on it drops nothing. On a filled
  cache (a later turn, a prefix), transformers feeds the whole prompt once more behind what the cache holds: refused for
  pruned conversations.
* **A later picture** needs, for models with M-RoPE, `position_ids` of the whole conversation and the pixels of the new
  picture only: transformers' own continuation wants the grids of all pictures.
* **Continuous batching** (`generate_batch`, `continuous_batching_context_manager`, `cache_implementation="paged"`):
  transformers hands the model ids only. Prompts of words run as in the plain model; one with a picture's placeholders is
  refused, in the `error` of its result.
* **Guidance** (`guidance_scale`) prunes the prompt; the stream without it has no picture. **Contrastive search**, DoLa and
  constrained beams are no part of transformers any more: they come as code from the model hub (`custom_generate`), and were
  not run.
* **Static caches** and compiled decoding have tests of their own (`tests/generation/test_static.py`).

## Families

{len(outcomes)} cells: {passed} passed, {len(outcomes) - passed} refused for a reason below. A cell is a tiny random model of
the stock class, one way, and stages before layer 0 or at the layers 1 and 3. It passes if all logits behind the prompt and in
decoding are within 5e-5 of the stock model with the same tokens masked (recurrent layers: with their rows cut out), or, where
it says the same in another way, if tokens are equal, too. Numbers of cells that passed; "a of b" where the others are
refused.

{by_way(results)}

From the [family matrix](families.md), with more batches and stages (*sampling* has two sequences for each prompt):

{in_the_family_matrix(families)}

## What is refused

{refused(results)}
"""


def main() -> None:
    text = page(json.loads(RESULTS.read_text()), json.loads(FAMILIES.read_text()))
    if "--check" in sys.argv:
        sys.exit("run python tests/generation/page.py" if PAGE.read_text() != text else 0)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
