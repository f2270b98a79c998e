"""Train the embedded model for clips from the picture model: `python -m vlmprune.tiny.train_clips`.

Two stages (see `vlmprune.tiny.training`): pooling and projector learn the code of cells of 2x2 patches on the frozen tower;
then the language model learns to answer questions about clips, whose visual tokens are computed once. One process with one
thread. Data depend on seeds and the schedule on steps, so that `--resume` continues a killed run exactly.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.tiny import load, load_for_clips
from vlmprune.tiny.train import machine, precision_of, save_checkpoint

if TYPE_CHECKING:
    from vlmprune.tiny.training.loop import Schedule, Stage

BATCH = {"pooling": 32, "clips": 8}
"""Frames and clips per step."""


def schedules() -> dict[str, Schedule]:
    """The recipe of the shipped checkpoint."""
    from vlmprune.tiny.training.loop import Schedule

    return {
        "pooling": Schedule(steps=300, muon_lr=0.01, adam_lr=3e-3, weight_decay=0.1, decay_from=0.4),
        "clips": Schedule(steps=620, muon_lr=0.01, adam_lr=2e-3, weight_decay=0.5, decay_from=0.4),
    }


def work(options: argparse.Namespace) -> None:
    """Both stages, from their start or from the saved state."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from vlmprune.tiny.clip_model import build_clip_model, save_clip_processor
    from vlmprune.tiny.training.clip_language import ClipLanguageStage, adopt, encode
    from vlmprune.tiny.training.clip_pooling import PoolingStage
    from vlmprune.tiny.training.loop import Team, batch_seed, precision_context, replace_file, run_stage

    torch.set_num_threads(1)
    disable_progress_bar()
    torch.manual_seed(options.seed)
    model = build_clip_model()
    adopt(model, load()[0])
    state_file = options.out / "state.pt"
    saved = torch.load(state_file, weights_only=True) if options.resume and state_file.exists() else None
    spent = saved["seconds"] if saved else 0.0
    begun = time.process_time()

    def save(stage: str, state: dict[str, Any]) -> None:
        whole = {
            "stage": stage,
            "model": model.state_dict(),
            "seconds": spent + time.process_time() - begun,
            "state": state,
        }
        replace_file(state_file, lambda path: torch.save(whole, path))
        save_checkpoint(model, options.out / "checkpoint")
        save_clip_processor(options.out / "checkpoint")

    def train(stage: Stage, state: dict[str, Any] | None) -> None:
        schedule = schedules()[stage.name]
        run_stage(
            stage,
            replace(schedule, steps=max(2, round(schedule.steps * options.steps_scale))),
            seed=options.seed,
            team=Team(0, 1),
            precision=options.precision,
            state=state,
            save=partial(save, stage.name),
            save_every=options.save_every,
            log=options.out / "log.jsonl",
        )

    if saved and saved["stage"] == "clips":
        model.load_state_dict(saved["model"])
    else:
        train(PoolingStage(model, BATCH["pooling"]), saved and saved["state"])
    first = batch_seed(options.seed, "pool of clips", 0, 0)
    seeds = range(first, first + options.clips)
    with precision_context(options.precision):
        visual = encode(model, seeds, options.out / "encoded")
    language = ClipLanguageStage(model, BATCH["clips"], seeds, visual, options.seed)
    train(language, saved["state"] if saved and saved["stage"] == "clips" else None)


def report(options: argparse.Namespace) -> None:
    """Evaluate the finished checkpoint on the test split and write `PROVENANCE.json` beside it."""
    import torch

    from vlmprune.tiny.answers import accuracy_by_skill
    from vlmprune.tiny.clip_questions import CLIP_SKILLS
    from vlmprune.tiny.clips import held_out_clips
    from vlmprune.tiny.evaluate_clips import clip_records

    folder = options.out / "checkpoint"
    held_out = held_out_clips(options.test_clips, "test")
    reached = accuracy_by_skill(clip_records(*load_for_clips(checkpoint=folder), held_out), skills=CLIP_SKILLS)
    facts = {
        "command": "python -m vlmprune.tiny.train_clips " + " ".join(sys.argv[1:]),
        "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "training_cpu_minutes": round(torch.load(options.out / "state.pt", weights_only=True)["seconds"] / 60, 1),
        "seed": options.seed,
        "precision": options.precision,
        "steps_scale": options.steps_scale,
        "clips": options.clips,
        "batch": BATCH,
        "schedules": {name: vars(schedule) for name, schedule in schedules().items()},
        **machine(),
        "test_clips": options.test_clips,
        "test": {skill: asdict(entry) for skill, entry in reached.items()},
    }
    for skill, entry in reached.items():
        print(f"  {skill:<10} {entry}")
    (folder / "PROVENANCE.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"checkpoint, accuracies and provenance: {folder}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-clips-training"), help="folder for state, log and checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from the state in --out if there is one")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on the steps of both stages")
    parser.add_argument("--clips", type=int, default=2_400, help="clips in the pool of the second stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--test-clips", type=int, default=400, help="held-out clips of the final report")
    options = parser.parse_args(arguments)
    options.precision = precision_of(options.precision)
    return options


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    work(options)
    report(options)


if __name__ == "__main__":
    main()
