"""Write docs/methods.md: what every method computes, from the docstrings of its file.

    python docs/methods.py

`tests/test_docs.py` compares. `vlmprune methods NAME` prints a method's parameters, ranges and an example.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import vlmprune
from vlmprune.adapters.registry import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# What every method computes

Written by `python docs/methods.py` from the docstrings. `vlmprune methods NAME` prints a method's parameters, their ranges and
an example. The [glossary](architecture.md#glossary) explains the words.
"""


def section(name: str, method: type) -> str:
    """One method: its name, paper and file, and the docstring of the file."""
    path = Path(*method.__module__.split(".")).with_suffix(".py")
    text = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    return f"### {name}\n\n[`{path}`](../{path})\n\n{text}\n"  # what is indented, the equations, is code in Markdown


VIDEOS = """## On videos

A video is a picture with frames. `per="frame"`, a parameter of every pruning method, gives every frame the budget and decides
it by itself, as if it were a picture. Without it, the budget is the video's, and this table says what is decided together. A
budget inside the vision tower is that of a frame, for the tower sees frames one by one. Before the tower (`site=pixels`),
videos are refused. Every method is tested on videos of every family, or the sentence by which it is refused
(`tests/video/test_video_methods.py`; all pairs: `make test-video`).
"""


def on_videos() -> str:
    """A table: what every method does with a video, and of which families."""
    videos = [family for family in FAMILIES.values() if family.videos is not None]
    lines = ["| method | of a video | families |", "| --- | --- | --- |"]
    for name, method in sorted(vlmprune.METHODS.items()):
        if any(stage.site == "pixels" for stage in method().stages):
            lines.append(f"| `{name}` | refused | none: patches before the tower are followed for pictures only |")
        else:
            lines.append(f"| `{name}` | {_together(method)} | {_where(method(), videos)} |")
    for name, method in sorted(vlmprune.REDISTRIBUTORS.items()):
        mine = [family for family in videos if family.facts.cls] if method().needs else videos
        lines.append(f"| `{name}` | the tokens of all frames are visual tokens | {_names(mine, videos)} |")
    return "\n".join(lines) + "\n"


def _together(method: type) -> str:
    """What a pruning method decides together."""
    if method.in_tower:
        return "in the tower, every frame by itself; in the language model, all frames together"
    if method.per_crop:
        return (
            "all frames together; before the language model of llava_next_video, every frame by itself, with its share of the "
            "budget"
        )
    return "all frames together"


def _where(method: vlmprune.Pruner, videos: list[Any]) -> str:
    """The families in which a method runs on videos."""
    mine = []
    for family in videos:
        try:
            stages = list(method.plan(family.facts))
        except vlmprune.UsageError:
            continue
        drops = any(stage.site == "vision" for stage in stages)
        if not (drops and (family.facts.whole or family.videos.pool is not None)):  # both need all patches to the end
            mine.append(family)
    return _names(mine, videos)


def _names(families: list[Any], videos: list[Any]) -> str:
    if len(families) == len(videos):
        return "all that take videos"
    return ", ".join(family.name for family in families) or "none: it works between blocks of a tower that videos need whole"


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, methods in (("Pruning", vlmprune.METHODS), ("Redistribution", vlmprune.REDISTRIBUTORS)):
        parts += [f"## {title}\n", *(section(name, methods[name]) for name in sorted(methods))]
    return "\n".join([*parts, VIDEOS, on_videos()])


if __name__ == "__main__":
    (ROOT / "docs/methods.md").write_text(markdown())
