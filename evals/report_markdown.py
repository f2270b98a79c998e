"""A report as Markdown."""

from __future__ import annotations

from pathlib import Path

from vlmprune.evals.report_parts import Document, Facts, Figures, Paragraph, Part, Pictures, Sentences, Table


def markdown(page: Document, folder: Path) -> str:
    """The report as Markdown; in the place of drawings are the figures that the commands wrote into the folder."""
    blocks = [f"# {page.title}", page.lead]
    for section in page.sections:
        blocks.append(f"## {section.title}")
        for part in section.parts:
            blocks += _markdown(part)
        stem = section.anchor.rpartition("-")[2]
        if section.anchor in (f"accuracy-{stem}", stem) and (folder / f"{stem}.png").exists():
            blocks.append(f"![{section.title}: figure]({stem}.png)")
    return "\n\n".join(blocks) + "\n"


def _markdown(part: Part) -> list[str]:
    if isinstance(part, Table):
        return [f"{part.title}:", part.markdown()]
    if isinstance(part, Paragraph):
        return [f"**Warning.** {part.text}" if part.warning else part.text]
    if isinstance(part, Sentences):
        return ["\n".join(f"- {sentence}" for sentence in part.items)] if part.items else []
    if isinstance(part, Facts):
        return ["\n".join(f"- {name}: {f'`{value}`' if part.code else value}" for name, value in part.rows)]
    if isinstance(part, Figures):
        said = [f"- {figure.title}: {figure.note or figure.says}" for figure in part.figures if figure.title]
        return ["\n".join(said)] if said else []
    return [_pictures(part)]


def _pictures(part: Pictures) -> str:
    lines = [f"- {picture.title}: {', '.join((*picture.lines, *_right(picture.right)))}" for picture in part.pictures]
    return "\n".join([f"{part.title}:", "", *lines])


def _right(right: bool | None) -> list[str]:
    return [] if right is None else ["right" if right else "wrong"]
