"""Train the tiny model from scratch: `python -m vlmprune.tiny.train`.

Two stages (see `vlmprune.tiny.training`): first the vision tower and the projector learn a designed code for each patch, then
the language model learns to answer from these frozen tokens. Data depend on seeds and the schedule on steps, so that
`--resume` continues a killed run exactly from its last saved state.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.tiny import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import (
        LlavaForConditionalGeneration,
        LlavaNextVideoForConditionalGeneration,
        LlavaProcessor,
    )

    from vlmprune.tiny.answers import Accuracy
    from vlmprune.tiny.training.loop import Schedule, Stage, Team

IMAGES_PER_STEP = {"vision": 32, "language": 16}
"""Pictures per step over all workers; the number of workers changes the order of the data but not the schedule."""


def schedules() -> dict[str, Schedule]:
    """The recipe of the shipped checkpoint."""
    from vlmprune.tiny.training.loop import Schedule

    return {
        "vision": Schedule(steps=1_200, muon_lr=0.02, adam_lr=3e-3, weight_decay=0.1, decay_from=0.4),
        "language": Schedule(steps=2_600, muon_lr=0.015, adam_lr=4e-3, weight_decay=0.5, decay_from=0.4),
    }


def precision_of(choice: str) -> str:
    """Resolve `"auto"`: bfloat16 where the CPU multiplies it natively, float32 elsewhere (there it is slow)."""
    if choice != "auto":
        return choice
    capabilities = _cpu_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def _cpu_capabilities() -> dict[str, Any]:
    """PyTorch's description of the CPU; empty in versions without one."""
    import torch

    return getattr(torch.cpu, "get_capabilities", dict)()


def save_checkpoint(
    model: LlavaForConditionalGeneration | LlavaNextVideoForConditionalGeneration,
    folder: Path,
    processor: LlavaProcessor | None = None,
) -> None:
    """Write weights (rounded to bfloat16), and a processor, for `from_pretrained`; the model is not changed."""
    import torch

    weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=weights)
    if processor is not None:
        processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only


def work(rank: int, options: argparse.Namespace) -> None:
    """One data-parallel worker: both stages, from their start or from the saved state."""
    from vlmprune.tiny.training.loop import joined

    with joined(rank, options.workers, options.out / f"meeting-{options.started}") as team:
        _train(team, options)


def _train(team: Team, options: argparse.Namespace) -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from vlmprune.tiny.architecture import build_model, build_processor
    from vlmprune.tiny.training.language import LanguageStage
    from vlmprune.tiny.training.loop import replace_file, run_stage
    from vlmprune.tiny.training.vision import VisionStage

    disable_progress_bar()
    torch.manual_seed(options.seed)
    model, processor = build_model(), build_processor()
    model.set_attn_implementation("eager")  # the fused kernel's backward is slower on a CPU
    stages: dict[str, Callable[..., Stage]] = {"vision": VisionStage, "language": LanguageStage}
    state_file = options.out / "state.pt"
    saved = torch.load(state_file, weights_only=True) if options.resume and state_file.exists() else None
    spent = saved["seconds"] if saved else 0.0
    if saved:
        model.load_state_dict(saved["model"])
    begun = time.perf_counter()

    def save(stage: str, state: dict[str, Any]) -> None:
        seconds = spent + time.perf_counter() - begun
        whole = {"stage": stage, "model": model.state_dict(), "seconds": seconds, "state": state}
        replace_file(state_file, lambda path: torch.save(whole, path))
        save_checkpoint(model, options.out / "checkpoint", processor)

    for name, schedule in schedules().items():
        if saved and list(stages).index(name) < list(stages).index(saved["stage"]):
            continue
        resumed = saved["state"] if saved and saved["stage"] == name else None
        run_stage(
            stages[name](model, options.seed, IMAGES_PER_STEP[name] // team.size),
            replace(schedule, steps=max(2, round(schedule.steps * options.steps_scale))),
            seed=options.seed,
            team=team,
            precision=options.precision,
            state=resumed,
            save=partial(save, name),
            save_every=options.save_every,
            log=options.out / "log.jsonl",
        )


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """How, where and with which versions a checkpoint was made."""
    import torch

    cpu = os.times()
    return {
        "command": "python -m vlmprune.tiny.train " + " ".join(sys.argv[1:]),
        "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "training_minutes": round(torch.load(options.out / "state.pt", weights_only=True)["seconds"] / 60, 1),
        "cpu_minutes_of_this_call": round((cpu.children_user + cpu.children_system) / 60, 1),
        "seed": options.seed,
        "workers": options.workers,
        "precision": options.precision,
        "steps_scale": options.steps_scale,
        "images_per_step": IMAGES_PER_STEP,
        "schedules": {name: vars(schedule) for name, schedule in schedules().items()},
        **machine(),
    }


def machine() -> dict[str, Any]:
    """The processor, and the versions of what computes."""
    import numpy
    import torch
    import transformers

    capabilities = _cpu_capabilities()
    return {
        "cpu": f"{capabilities.get('cpu_name', platform.processor())}, {capabilities.get('num_physical_cores')} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
    }


def _reached(folder: Path, images: int, shift: int) -> dict[str, Accuracy]:
    """Accuracy by skill on test scenes moved by `shift` pixels, computed with one thread."""
    import torch

    from vlmprune.tiny.answers import accuracy_by_skill
    from vlmprune.tiny.evaluate import records
    from vlmprune.tiny.scenes import held_out

    torch.set_num_threads(1)
    return accuracy_by_skill(records(*load(checkpoint=folder), held_out(images, "test"), shift))


def report(options: argparse.Namespace) -> None:
    """Evaluate the finished checkpoint on the test split and write `PROVENANCE.json` beside it."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    folder = options.out / "checkpoint"
    facts = {**provenance(options), "test_images": options.test_images}
    with ProcessPoolExecutor(min(2, options.workers), get_context("spawn")) as pool:
        jobs = {shift: pool.submit(_reached, folder, options.test_images, shift) for shift in (0, 1)}
        for shift, job in jobs.items():
            name = "test_shifted_by_one_pixel" if shift else "test"
            facts[name] = {skill: asdict(entry) for skill, entry in job.result().items()}
            print(f"{name} ({options.test_images} scenes)")
            for skill, entry in job.result().items():
                print(f"  {skill:<10} {entry}")
    (folder / "PROVENANCE.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"checkpoint, accuracies and provenance: {folder}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-training"), help="folder for state, log and checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from the state in --out if there is one")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on the steps of both stages")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2, 4, 8), help="data-parallel processes, one per core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--test-images", type=int, default=1_200, help="held-out scenes of the final report")
    options = parser.parse_args(arguments)
    options.precision = precision_of(options.precision)
    options.started = time.time_ns()
    return options


def main() -> None:
    import torch

    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.workers == 1:
        work(0, options)
    else:
        torch.multiprocessing.spawn(work, args=(options,), nprocs=options.workers)
    report(options)


if __name__ == "__main__":
    main()
