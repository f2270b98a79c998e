"""POPE, MME, VQAv2, TextVQA, ChartQA, ScienceQA, MMBench (static) and SEED-Bench on lmms-eval's own task code, offline.

Prompts, answers and metrics are those of lmms-eval 0.7; the data is local: questions about drawn scenes, in the columns of each
benchmark. So this shows that the benchmarks run through vlmprune, with batches, recipes and columns. It says nothing about a
model on the real benchmarks: the embedded model has 60 words, and the suffixes of the prompts ("Answer the question using a
single word…") are left out, because it does not know them. ScienceQA wants a letter, which the embedded model never gives.

    python benchmarks/lmms_stock.py --out docs/results/lmms      in the environment with lmms-eval (docs/lmms.md)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console

from vlmprune.evals import scene_tasks
from vlmprune.evals.lmms_results import result
from vlmprune.evals.lmms_tasks import stock_folder
from vlmprune.evals.results import stamp
from vlmprune.loading.outputs import make_folder

RECIPES = ("none", "flowcut:tokens=32")
LETTERS = "ABCD"
BARE = {"pre_prompt": "", "post_prompt": ""}
Row = dict[str, Any]


def documents(kind: str, wanted: int) -> list[Row]:
    """The first documents of one of our tasks, each with its picture."""
    made = getattr(scene_tasks, kind)([{"split": "test", "scenes": wanted}])
    return [{**made[number], "image": scene_tasks.picture(made[number])[0]} for number in range(min(wanted, len(made)))]


def pope(wanted: int) -> Iterator[Row]:
    for number, one in enumerate(documents("existence_adversarial", wanted)):
        yield {"question_id": str(number), "question": one["question"], "answer": one["answer"], "image": one["image"]}


def mme(wanted: int) -> Iterator[Row]:
    """In pairs about one picture, one with yes and one with no, as MME counts."""
    pairs: dict[int, dict[str, Row]] = {}
    for one in documents("existence_random", 2 * wanted):
        pairs.setdefault(one["scene"], {}).setdefault(one["answer"], one)
    whole = [(scene, pair) for scene, pair in pairs.items() if len(pair) == 2]
    for scene, pair in whole[: wanted // 2]:
        for answer, one in pair.items():
            row = {"question_id": str(scene), "question": one["question"], "answer": answer.capitalize(), "image": one["image"]}
            yield {**row, "category": "existence"}


def vqav2(wanted: int) -> Iterator[Row]:
    for number, one in enumerate(documents("everything", wanted)):
        people = [{"answer": one["answer"], "answer_id": person} for person in range(10)]
        yield {
            "question_id": number,
            "question": one["question"],
            "answers": people,
            "image": one["image"],
            "answer": one["answer"],
        }


def textvqa(wanted: int) -> Iterator[Row]:
    """The task writes the first letter as a capital, which the embedded model does not know: a space comes first."""
    for number, one in enumerate(documents("reading", wanted)):
        row = {"question_id": number, "question": f" {one['question']}", "answers": [one["answer"]] * 10, "ocr_tokens": [""]}
        yield {**row, "image": one["image"], "answer": one["answer"]}


def chartqa(wanted: int) -> Iterator[Row]:
    for number, one in enumerate(documents("counting", wanted)):
        kind = "human_test" if number % 2 else "augmented_test"
        yield {"type": kind, "question": one["question"], "answer": one["answer"], "image": one["image"]}


def scienceqa(wanted: int) -> Iterator[Row]:
    for one, choices, right in _with_choices(wanted):
        yield {"hint": "", "question": one["question"], "choices": choices, "answer": right, "image": one["image"]}


def mmbench(wanted: int) -> Iterator[Row]:
    for number, (one, choices, right) in enumerate(_with_choices(wanted)):
        row = {"index": number, "question": one["question"], "hint": "nan", "source": "scenes", "split": "dev"}
        names = {"category": one["skill"], "L2-category": "attributes", "answer": LETTERS[right]}
        yield {**row, **names, **dict(zip(LETTERS, choices, strict=True)), "image": one["image"]}


def seedbench(wanted: int) -> Iterator[Row]:
    for number, (one, choices, right) in enumerate(_with_choices(wanted)):
        row = {"question_id": str(number), "question": one["question"], "answer": LETTERS[right], "data_type": "image"}
        named = {f"choice_{letter.lower()}": choice for letter, choice in zip(LETTERS, choices, strict=True)}
        yield {**row, **named, "image": [one["image"]]}


def _with_choices(wanted: int) -> Iterator[tuple[Row, list[str], int]]:
    """Attributes with four choices, and the number of the right one."""
    for number, one in enumerate(documents("attributes", wanted)):
        wrong = [choice for choice in one["choices"] if choice != one["answer"]][:3]
        right = number % 4
        yield one, [*wrong[:right], one["answer"], *wrong[right:]], right


TASKS: dict[str, tuple[str, str, Callable[[int], Iterator[Row]], dict[str, Any]]] = {
    "pope": ("pope/pope.yaml", "test", pope, BARE),
    "mme": ("mme/mme.yaml", "test", mme, BARE),
    "vqav2_val": ("vqav2/vqav2_val.yaml", "validation", vqav2, BARE),
    "textvqa_val": ("textvqa/textvqa_val.yaml", "validation", textvqa, {**BARE, "ocr": False}),
    "chartqa": ("chartqa/chartqa.yaml", "test", chartqa, BARE),
    "scienceqa_img": ("scienceqa/scienceqa_img.yaml", "test", scienceqa, {**BARE, "format": "default"}),
    "mmbench_en_dev_static": ("mmbench/mmbench_en_dev_static.yaml", "dev", mmbench, BARE),
    "seedbench_ppl": ("seedbench/seedbench_ppl.yaml", "test", seedbench, {}),
}
"""By name: lmms-eval's file, the split that it asks, what makes its documents, and the words around a question."""
BY_LIKELIHOOD = ("seedbench_ppl",)


def write_task(folder: Path, name: str, wanted: int) -> str:
    """Store the data of a task, and a file that puts it into lmms-eval's; returns the name of the task."""
    from datasets import Dataset, DatasetDict

    file, split, make, words = TASKS[name]
    data = folder / "data" / name
    DatasetDict({split: Dataset.from_list(list(make(wanted)))}).save_to_disk(str(data))
    own = {
        "include": str(stock_folder() / file),
        "task": f"{name}_scenes",
        "dataset_path": str(data),
        "dataset_name": None,
        "dataset_kwargs": {"load_from_disk": True},
        "test_split": split,
        **({"lmms_eval_specific_kwargs": {"default": words}} if words else {}),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return f"{name}_scenes"


def run(folder: Path, tasks: list[str], batch: int, *more: str) -> list[Row]:
    """Run `vlmprune lmms` on tasks, and return its rows.

    Raises:
        subprocess.CalledProcessError: it failed; what it printed is on stderr.
    """
    chosen = [part for task in tasks for part in ("--task", task)] + [
        part for recipe in RECIPES for part in ("--recipe", recipe)
    ]
    settings = ["--include", str(folder), "--batch", str(batch), "--out", str(folder / "out"), "--json", *more]
    done = subprocess.run([sys.executable, "-m", "vlmprune", "lmms", *chosen, *settings], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60, help="of each task (default: 60)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write the table and the numbers here")
    arguments = parser.parse_args()
    if arguments.out:
        make_folder(arguments.out)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made = {name: write_task(folder, name, arguments.documents) for name in TASKS}
        rows = run(folder, [task for name, task in made.items() if name not in BY_LIKELIHOOD], arguments.batch)
        rows += run(folder, [made[name] for name in BY_LIKELIHOOD], arguments.batch, "--force-simple")
    for row in rows:
        row.pop("file")  # it is gone with the temporary folder
    out = f" --out {arguments.out}" if arguments.out else ""
    command = f"python benchmarks/lmms_stock.py --documents {arguments.documents} --batch {arguments.batch}{out}"
    numbers = {"model": "tiny", "batch": arguments.batch, **stamp(command), "rows": rows}
    result(numbers).deliver(Console(), arguments.out / "stock" if arguments.out else None)


if __name__ == "__main__":
    main()
