"""The plugin into lmms-eval, as far as it needs no lmms-eval: arguments, prompts, asking, likelihoods, the store, tasks, runs.

`tests/lmms/` runs it inside lmms-eval.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import vlmprune
from PIL import Image

import vlmprune as vp
from vlmprune import tiny
from vlmprune.evals import lmms_results, lmms_run, lmms_session, lmms_tasks, scene_tasks
from vlmprune.evals.lmms_arguments import Arguments, read_arguments, write_arguments
from vlmprune.evals.lmms_asking import Asker
from vlmprune.evals.lmms_prompts import check_system, make_prompt, simple_messages
from vlmprune.evals.lmms_results import numbers_of, read_finished, result
from vlmprune.evals.lmms_run import NoResultsError, Plan, run
from vlmprune.evals.lmms_session import Options, Request, Session
from vlmprune.evals.lmms_tasks import OURS, check_tasks, find_tasks, own_tasks
from vlmprune.tiny.answers import answer
from vlmprune.tiny.scenes import held_out

ASKED = [(scene, question) for scene in held_out(2) for question in scene.questions][:9]
SHORT = Options.of({}, 3)


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


def prompts(processor, asked=ASKED):
    return [make_prompt(processor, simple_messages(question.text, [scene.image])) for scene, question in asked]


# -- arguments ----------------------------------------------------------------------------------------------------------------


def test_arguments_travel_through_lmms_evals_command_line():
    """Commas, quotes and spaces included. Red: lmms-eval splits a recipe at its comma."""
    asked = Arguments(
        "my model", "fastv:layer=2,fraction=0.25 + pai", "bfloat16", system="Say 'yes', or no.", resume=Path("a b")
    )
    text = write_arguments(asked)
    pairs = re.findall(r"(\w+)=(\"[^\"]*\"|'[^']*')(?:,|$)", text)
    assert "".join(f"{name}={value}," for name, value in pairs)[:-1] == text
    assert read_arguments(dict(pairs)) == asked
    with pytest.raises(vp.UsageError, match="both kinds of quotes"):
        write_arguments(replace(asked, system="\"'"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"recipe": "none"}, "no model: say which with pretrained="),
        ({"pretrained": "tiny", "recipe": "random:layer=0", "fraction": 0.25}, 'recipe="random:layer=0,fraction=0.25"'),
        ({"pretrained": "tiny", "recip": "none"}, "unknown model argument 'recip': did you mean 'recipe'"),
        ({"pretrained": "tiny", "batch_size": "auto"}, "batch_size must be a whole number, found 'auto'"),
        ({"pretrained": "tiny", "batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"pretrained": "tiny", "max_batch_size": 64}, "--max_batch_size belongs to --batch_size auto"),
        ({"pretrained": "tiny", "dtype": "half"}, "unknown dtype 'half'"),
        ({"pretrained": "tiny", "device": "cpu", "device_map": "auto"}, "exclude each other"),
    ],
    ids=str,
)
def test_arguments_refused(given, sentence):
    with pytest.raises(vp.UsageError, match=re.escape(sentence)):
        read_arguments(given)


def test_options():
    """Greedy unless a task samples; what is no option is named; an answer ends before the texts of `until`."""
    wanted = {"until": ["\n\n"], "temperature": 0, "top_p": 1.0, "num_beams": 1, "modalities": ["image"], "max_gen_toks": 7}
    options = Options.of(wanted, 128)
    assert dict(options.generate) == {"do_sample": False, "max_new_tokens": 7, "num_beams": 1}
    assert options.ignored == ("modalities",)
    assert options.cut("yes\n\nno") == "yes"
    assert dict(Options.of({"temperature": 0.7}, 128).generate) == {
        "do_sample": True,
        "temperature": 0.7,
        "max_new_tokens": 128,
    }


# -- prompts ------------------------------------------------------------------------------------------------------------------


def test_prompts(loaded):
    """Of the embedded model as in training; pictures go where the text has the image token."""
    _, processor = loaded
    scene, question = ASKED[0]
    prompt = make_prompt(processor, simple_messages(question.text, [scene.image]))
    assert prompt.text == tiny.prompt(question.text)
    grey = Image.new("L", (10, 10))
    placed = make_prompt(processor, simple_messages("<image> and <image> ?", [scene.image, grey]))
    assert placed.text.count("<image>") == 2
    assert [image.mode for image in placed.images] == ["RGB", "RGB"]
    assert placed.digest() != prompt.digest() != prompt.digest("option")
    assert make_prompt(processor, [{"role": "user", "content": "how many ?"}]).images == ()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([{"type": "text", "text": "is <image> there ?"}], "document 3 of pope: its text has 1 <image>"),
        ([{"type": "video", "url": "a.mp4"}], "document 3 of pope: it has video beside text"),
        ([{"type": "image", "url": "nowhere.png"}], "document 3 of pope: there is no picture at nowhere.png"),
        ([{"type": "image", "url": 7}], "document 3 of pope: a picture was expected, found int"),
    ],
    ids=str,
)
def test_prompts_refused(loaded, content, sentence):
    with pytest.raises(vp.UsageError, match=re.escape(sentence)):
        make_prompt(loaded[1], [{"role": "user", "content": content}], where="document 3 of pope")


def test_system_texts(loaded):
    """Refused where the template has no place for them. Red: they are written as words of the assistant, or left out."""
    _, processor = tiny.load()
    with pytest.raises(vp.UsageError, match="has no system role"):
        check_system(processor, "be brief")
    own = processor.chat_template
    processor.chat_template = "{% for message in messages if message['role'] != 'system' %}" + own.partition("%}")[2]
    with pytest.raises(vp.UsageError, match="leaves a system text out"):
        check_system(processor, "be brief")
    processor.chat_template = own.replace(
        "{% else %}ASSISTANT: ", "{% elif message['role'] == 'system' %}SYSTEM: {% else %}ASSISTANT: "
    )
    check_system(processor, "be brief")
    written = make_prompt(processor, simple_messages("how many ?", []), "be brief").text
    assert written == "SYSTEM: be brief USER: how many ? ASSISTANT:"
    processor.chat_template = None
    with pytest.raises(vp.UsageError, match="no chat template"):
        check_system(processor, "be brief")


# -- asking -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, "flowcut:tokens=32", "divprune:tokens=60 + random:layer=4,tokens=10"])
def test_answers(loaded, recipe):
    """Those of `tiny.answers.answer`, with the columns of each sample; removing restores the model."""
    model, processor = loaded
    asker = Asker(model, processor, recipe and vp.Recipe.parse(recipe))
    found = asker.answer(prompts(processor), dict(SHORT.generate))
    assert [one.text for one in found] == answer(model, processor, [(scene.image, question.text) for scene, question in ASKED])
    kept = {None: 144, "flowcut:tokens=32": 32}.get(recipe, 10)
    entering = {None: 144, "flowcut:tokens=32": 32}.get(recipe, (4 * 60 + 4 * 10) / 8)
    for one in found:
        assert (one.columns["visual_tokens"], one.columns["kept_tokens"]) == (144, kept)
        assert one.columns["kept_entering_layers"] == entering
        assert one.columns["output_tokens"] == min(3, 1 + len(one.text.split()))
    if recipe is not None:
        report = asker.run.report()
        assert found[0].columns["prefill_gflops"] == pytest.approx(report.flops / len(ASKED) / 1e9)
        assert found[0].columns["kv_mib"] == pytest.approx(report.kv_bytes / len(ASKED) / (1 << 20))
    asker.close()
    assert repr(asker.run) == "None" or "removed" in repr(asker.run)


LOOKING = ("fastv:layer=2,fraction=0.25", "sparsevlm:layer=1|2|4,tokens=82|32|18", "adaptinfer:tokens=40", "cdpruner:tokens=30")


@pytest.mark.parametrize("recipe", LOOKING)
def test_the_answer_never_chooses_the_tokens(loaded, recipe):
    """The kept tokens are those of the prompt alone, whatever answer is judged, in a batch and alone.

    Red: prompt and answer in one forward pass, where the answer's tokens take part in the choice.
    """
    model, processor = loaded
    asked = prompts(processor)[:4]
    asker = Asker(model, processor, vp.Recipe.parse(recipe))
    asker.answer(asked, dict(SHORT.generate))
    alone = asker._kept(len(asked))
    for given in ("yes", "bottom right", "3 4 5"):
        batch = asker.likelihood(asked, [given] * 4)
        assert [one.kept for one in batch] == alone
        for prompt, one in zip(asked, batch, strict=True):
            (single,) = asker.likelihood([prompt], [given])
            assert single.kept == one.kept
            assert single.loss == pytest.approx(one.loss, abs=1e-4)
    asker.close()


def test_likelihood_of_the_unpruned_model(loaded):
    """The mean cross-entropy of one forward pass over prompt and answer. Red: a sum, other tokens, or shifted by one."""
    model, processor = loaded
    given = ["red", "bottom right", "3 4 5", "no"]
    found = Asker(model, processor, None).likelihood(prompts(processor)[:4], given)
    for one, text, (scene, question) in zip(found, given, ASKED, strict=False):
        inputs = processor(images=scene.image, text=f"{tiny.prompt(question.text)} {text}", return_tensors="pt")
        length = len(text.split())
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1 - length : -1]
        tokens = inputs["input_ids"][0, -length:]
        assert one.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, tokens)), abs=1e-4)
        assert one.greedy == bool((logits.argmax(-1) == tokens).all())
        assert one.columns["output_tokens"] == 3  # of the batch's longest
    with pytest.raises(vp.UsageError, match=re.escape("the answer whose likelihood is asked for is empty (' ')")):
        Asker(model, processor, None).likelihood(prompts(processor)[:1], [" "])


def test_an_answer_that_would_change_the_prompts_last_token(loaded):
    """The prompt's tokens stay, and the answer is tokenised on its own."""
    asker = Asker(*loaded, None)

    class Merging:
        def __call__(self, text, add_special_tokens):
            return type("Encoded", (), {"input_ids": [len(word) for word in text.split()]})

    asker.processor = type("Processor", (), {"tokenizer": Merging()})()
    prompt = make_prompt(loaded[1], simple_messages("how many ?", []))
    assert asker._tokens(prompt, " two three") == [3, 5]
    assert asker._tokens(prompt, "two three") == [3, 5]  # "ASSISTANT:two" is another last token


def test_a_session_keeps_every_answer(tmp_path, monkeypatch):
    """In batches of equal options, pictures apart from texts; a second session asks nothing. Red: answers in another order."""
    requests = [
        *(Request(lambda s=scene, q=question: simple_messages(q.text, [s.image]), "", SHORT) for scene, question in ASKED),
        Request(lambda: simple_messages("how many objects are there ?", []), "", SHORT),
    ]
    arguments = Arguments("tiny", "flowcut:tokens=32", resume=tmp_path, batch_size=4)
    sizes = []
    ask = Asker.answer
    monkeypatch.setattr(Asker, "answer", lambda self, batch, options: (sizes.append(len(batch)), ask(self, batch, options))[1])
    first = Session(arguments)
    ticks = []
    rows = first.generate(reversed(requests), ticks.append)
    assert (sizes, first.asked, sum(ticks)) == ([4, 4, 1, 1], 10, 10)
    first.close()
    second = Session(arguments)
    assert [row["answer"] for row in second.generate(requests)] == [row["answer"] for row in reversed(rows)]
    assert (second.asked, len(sizes)) == (0, 4)
    judged = [replace(requests[0], answer="red"), replace(requests[1], answer="yes")]
    assert second.judge(judged)[1]["greedy"] in (True, False)
    assert second.asked == 2
    second.close()
    with pytest.raises(vp.UsageError, match="recipe 'flowcut:tokens=32' there, 'none' here"):
        Session(replace(arguments, recipe="none"))
    monkeypatch.setattr(lmms_session, "processor_fingerprint", lambda processor: "other pixels")
    with pytest.raises(vp.UsageError, match=r"processor '[0-9a-f]+' there, 'other pixels' here"):
        Session(arguments)  # the key of an answer holds the picture, and not what the processor makes of it


def test_drawn_answers_have_a_draw_each(tmp_path):
    """Greedy answers to one prompt are one answer. Red: n draws are one draw, n times."""
    scene, question = ASKED[0]
    drawn = Options.of({"temperature": 50.0, "top_k": 0}, 3)
    session = Session(Arguments("tiny", "none", resume=tmp_path, batch_size=4))
    for options, different in ((SHORT, 1), (drawn, 4)):
        requests = [Request(lambda: simple_messages(question.text, [scene.image]), "", options)] * 4
        torch.manual_seed(0)
        rows = session.generate(requests)
        assert len({row["answer"] for row in rows}) == different
        assert [row["answer"] for row in session.generate(requests)] == [row["answer"] for row in rows]
    session.close()


# -- tasks --------------------------------------------------------------------------------------------------------------------

STOCK = {
    "pope/pope.yaml": "task: pope\ndataset_path: lmms-lab/POPE\nprocess_results: !function utils.f\n",
    "judged/judged.yaml": "task: judged\ndataset_path: json\nmetric_list: [{metric: gpt_eval_score, aggregation: mean}]\n",
    "judged/static.yaml": "include: judged.yaml\ntask: judged_static\nmetric_list:\n"
    "  - {metric: gpt_eval_score, aggregation: !function utils.static}\n",
    "choice/choice.yaml": "task: choice\ndataset_path: json\noutput_type: multiple_choice\ntag: several\n",
    "choice/group.yaml": "group: both\ntask: [choice, {task: pope}]\n",
    "video/video.yaml": "task: video\ndataset_path: a/b\ndataset_kwargs: {video: true}\ntag: [several]\n",
    "agent/agent.yaml": "task: agent\ndataset_path: json\noutput_type: generate_until_agentic\n",
    "disk/disk.yaml": "task: disk\ndataset_path: /nowhere\ndataset_kwargs: {load_from_disk: true}\n",
}


@pytest.fixture
def stock(tmp_path, monkeypatch):
    """A folder of tasks in the place of lmms-eval's."""
    for name, text in STOCK.items():
        path = tmp_path / "stock" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(lmms_tasks, "stock_folder", lambda: tmp_path / "stock")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for key in lmms_tasks.KEYS:
        monkeypatch.delenv(key, raising=False)
    return tmp_path


def test_tasks_are_found(stock):
    """By name, group and tag, with what a file includes; functions are not imported."""
    assert [task.name for task in find_tasks(["both"])] == ["choice", "pope"]
    assert [task.name for task in find_tasks(["several", "choice"])] == ["choice", "video"]
    (static,) = find_tasks(["judged_static"])
    assert static.config["dataset_path"] == "json"
    assert [task.name for task in find_tasks(["vlmprune_existence"])] == [
        "vlmprune_existence_adversarial",
        "vlmprune_existence_popular",
        "vlmprune_existence_random",
    ]
    (stock / "own").mkdir()
    (stock / "own/pope.yaml").write_text("task: pope\ndataset_path: json\n")
    (own,) = find_tasks(["pope"], stock / "own")
    assert own.path.parent.name == "own"
    with pytest.raises(vp.UsageError, match="unknown task 'chioce': did you mean 'choice'"):
        find_tasks(["chioce"])
    (stock / "own/broken.yaml").write_text("task: broken\n  x: [")
    with pytest.raises(vp.UsageError, match=r"broken.yaml cannot be read as a task"):
        find_tasks(["broken"], stock / "own")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "pope",
            "pope needs the dataset lmms-lab/POPE, which is not in the cache on this machine, and the hub cannot be asked ",
        ),
        ("judged", "neither of OPENAI_API_KEY and AZURE_API_KEY is set: take judged_static"),
        (
            "choice",
            "choice is scored by likelihood (multiple_choice), which lmms-eval asks of simple classes only: add --force-simple",
        ),
        ("video", "video is about videos"),
        ("agent", "agent asks for generate_until_agentic"),
        ("disk", "disk reads its data from /nowhere, and there is no such folder"),
    ],
)
def test_tasks_refused(stock, name, sentence):
    with pytest.raises(vp.UsageError, match=re.escape(sentence)):
        check_tasks(find_tasks([name]), force_simple=False)


def test_tasks_that_can_run(stock, monkeypatch):
    """A static metric, a key, the simple class, and a dataset in the cache."""
    check_tasks(find_tasks(["judged_static", "vlmprune_scenes"]), force_simple=False)
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    check_tasks(find_tasks(["judged", "choice"]), force_simple=True)
    (stock / "home/hub/datasets--lmms-lab--POPE").mkdir(parents=True)
    check_tasks(find_tasks(["pope"]), force_simple=False)


def test_our_tasks_are_whole():
    """Every file names itself, and functions that exist; all are part of the package."""
    assert len(own_tasks()) == 10
    for name in own_tasks():
        (task,) = find_tasks_of_ours(name)
        functions = re.findall(r"!function vlmprune\.evals\.scene_tasks\.(\w+)", json.dumps(task.config))
        assert functions
        assert all(hasattr(scene_tasks, function) for function in functions)
        assert (OURS / "scenes.jsonl").exists()
    assert "evals/tasks/*" in Path("pyproject.toml").read_text()


def find_tasks_of_ours(name):
    return lmms_tasks._defined(name, [OURS])


LINES = [{"split": "test", "scenes": 60}]


@pytest.fixture
def documents(monkeypatch):
    """The documents of a task, without `datasets`."""
    monkeypatch.setattr(scene_tasks, "_dataset", list)
    return lambda name: getattr(scene_tasks, name)(LINES)


def test_documents_are_the_questions_of_eval(documents):
    wanted = [(scene.seed, question.text, question.answer) for scene in held_out(60) for question in scene.questions]
    assert [(one["scene"], one["question"], one["answer"]) for one in documents("everything")] == wanted
    for name, skills in {"attributes": {"colour", "shape"}, "reading": {"reading"}, "counting": {"counting"}}.items():
        assert {one["skill"] for one in documents(name)} == skills
    assert all(one["answer"] in one["choices"] for one in documents("attributes"))
    for name in ("position", "relation"):
        assert {one["skill"] for one in documents(name)} == {name}
    one = documents("reading")[0]
    assert scene_tasks.picture(one)[0].tobytes() == next(iter(held_out(1))).image.tobytes()
    assert scene_tasks.question(one, {"post_prompt": " briefly"}) == f"{one['question']} briefly"


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_existence(documents, kind):
    """As many yes as no about each picture, and all right; the negatives are as hard as they should be."""
    scenes = {scene.seed: {(thing.colour, thing.shape) for thing in scene.objects} for scene in held_out(60)}
    frequency = Counter(thing for things in scenes.values() for thing in things)
    asked = documents(f"existence_{kind}")
    by_scene = {}
    for one in asked:
        colour, shape = one["question"].split()[3:5]
        assert ((colour, shape) in scenes[one["scene"]]) == (one["answer"] == "yes")
        by_scene.setdefault(one["scene"], Counter())[one["answer"]] += 1
        if one["answer"] == "no" and kind == "adversarial":
            assert colour in {colour for colour, _ in scenes[one["scene"]]}
            assert shape in {shape for _, shape in scenes[one["scene"]]}
    assert all(counts["yes"] == counts["no"] > 0 for counts in by_scene.values())
    assert len(by_scene) > 40
    no = [tuple(one["question"].split()[3:5]) for one in asked if one["answer"] == "no"]
    usual = sum(frequency[thing] for thing in no) / len(no)
    assert (
        usual > 1.3 * sum(frequency.values()) / len(frequency) if kind == "popular" else usual < 1.3 * sum(frequency.values())
    )


def test_metrics():
    """Red: the yes-ratio counts the right answers, which are half yes whatever was said."""
    given = ["yes", "Yes, there is.", "yes", "no", "perhaps", "yes"]
    right = ["yes", "yes", "no", "no", "yes", "no"]
    entries = [scene_tasks.judge_existence({"answer": r, "scene": 1}, [g])["f1"] for g, r in zip(given, right, strict=True)]
    assert scene_tasks.yes_ratio(entries) == 4 / 6
    assert scene_tasks.unclear(entries) == 1 / 6
    assert scene_tasks.accuracy(entries) == 3 / 6
    assert (scene_tasks.precision(entries), scene_tasks.recall(entries)) == (2 / 4, 2 / 3)
    assert scene_tasks.f1(entries) == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert scene_tasks.f1([entry for entry in entries if entry["given"] == "no"]) == 0
    numbers = [
        scene_tasks.judge({"answer": "4 7 2", "scene": 1, "skill": "reading"}, [text]) for text in ("472.", "4 7 2", "4 7 3")
    ]
    assert [entry["accuracy"]["score"] for entry in numbers] == [1, 1, 0]
    other = scene_tasks.judge({"answer": "top left", "scene": 1, "skill": "position"}, ["Top left"])
    assert scene_tasks.mean_of_skills([*(entry["accuracy"] for entry in numbers), other["accuracy"]]) == (2 / 3 + 1) / 2


# -- running ------------------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1]) / "model"
print("started")
{body}
"""
RESULTS = """
folder.mkdir(parents=True, exist_ok=True)
scores = {"pope": {"alias": "pope", "accuracy,none": 1 / 3, "accuracy_stderr,none": 0.1, "f1,strict": 1}}
(folder / "20261128_101500_results.json").write_text(json.dumps({"results": scores, "n-samples": {"pope": {"effective": 3}}}))
rows = [{"doc_id": n, "filtered_resps": "yes", "token_counts": [{"kept_tokens": n, "ttft_ms": 1.0}],
    "accuracy": {"score": float(n == 1), "picture": n // 2}, "f1": {"score": 1.0}} for n in (0, 2, 1)]
(folder / "20261128_101500_samples_pope.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


@pytest.fixture
def pretending(stock, monkeypatch, tmp_path):
    """A plan, and a function that runs a script instead of lmms-eval."""
    plan = Plan(Arguments("tiny"), ("none",), ("pope",), tmp_path / "out")
    tasks = find_tasks(["pope"])

    def run_script(body):
        command = plan.command("none", tasks)
        wanted = [sys.executable, "-c", SCRIPT.format(body=body), *command[1:]]
        monkeypatch.setattr(Plan, "command", lambda self, recipe, tasks: wanted)
        return run(plan, tasks, lambda piece: None)

    return run_script


def test_a_run_is_read(pretending):
    """Samples by document, scores without errors, means of the columns over all of them."""
    (finished,) = pretending(RESULTS)
    assert [sample.number for sample in finished.samples["pope"]] == [0, 1, 2]
    assert finished.scores == {"pope": {"accuracy": 1 / 3, "f1,strict": 1.0}}
    assert finished.columns("pope") == {"kept_tokens": 1.0, "ttft_ms": 1.0}
    better = [replace(sample, scores={"accuracy": 1.0}) for sample in finished.samples["pope"]]
    other = replace(finished, recipe="fastv", samples={"pope": better}, scores={"pope": {"accuracy": 1.0}})
    rows = numbers_of([finished, other])
    assert rows[1]["same"] == 1
    assert rows[1]["against"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert (rows[1]["against"]["accuracy"]["n"], rows[1]["against"]["accuracy"]["units"]) == (3, 2)
    twice = [replace(sample, scores={"accuracy": 1.0, "f1": 1.0}) for sample in better]
    both = [replace(run, samples={"pope": twice}, scores={"pope": {"accuracy": 1.0, "f1": 1.0}}) for run in (finished, other)]
    assert set(both[0].differences(both[1], "pope")) == {"accuracy"}  # F1 of all right answers is 1, and no mean of scores
    mixed = [replace(sample, scores={"f1": sample.scores["accuracy"], **sample.scores}) for sample in finished.samples["pope"]]
    both = [replace(run, samples={"pope": mixed}, scores={"pope": {"f1": 0.5, "accuracy": 1 / 3}}) for run in (finished, other)]
    assert set(both[0].differences(both[1], "pope")) == {"accuracy"}  # also behind a metric that has its scores, and is no mean
    other = replace(other, scores={"pope": {"accuracy": 0.9}})  # not the mean of its scores: nothing to compare
    assert other.differences(finished, "pope") == {}
    text = result({"model": "tiny", "batch": 1, "rows": rows}).markdown()
    assert "| pope | accuracy | 0.3333 | 1 |" in text
    assert re.search(r"\| pope \| accuracy, points more than none \| — \| \+66\.7 \[", text)
    assert "| pope | `fastv` | 1 | — |" in text
    alone = result({"model": "tiny", "batch": 1, "rows": rows[:1]}).markdown()
    assert "same answer as" not in alone
    assert "oints more than" not in alone


def test_of_judged_answers_the_likeliest_counts():
    """Red: losses are compared, which no two recipes have in common."""
    assert lmms_results._answer([["2.5", "False"], ["0.25", "True"], ["10.0", "False"]]) == 1
    assert lmms_results._answer(["yes", "no"]) == ["yes", "no"]
    assert lmms_results._answer("yes") == "yes"


@pytest.mark.parametrize(
    ("body", "error", "sentence"),
    [
        ("", NoResultsError, "(exit code 0): started. Its output is in"),
        (RESULTS.replace("20261128_101500_results", "pope_results"), NoResultsError, "(exit code 0)"),
        ("raise MemoryError('too large')", NoResultsError, "(exit code 1): MemoryError: too large. Its output is in"),
        ("print('vlmprune.errors.UsageError: no such thing: do that.')", vp.UsageError, "no such thing: do that."),
        (RESULTS.replace("(0, 2, 1)", "(0, 2, 2)"), vp.UsageError, "3 samples about 2 documents, and 3 were to be asked"),
        (RESULTS.replace("(0, 2, 1)", "(0, 2, 1, 1)"), vp.UsageError, "4 samples about 3 documents, and 3 were to be asked"),
        (RESULTS.replace("samples_pope", "samples_other"), vp.UsageError, "no samples of pope"),
    ],
    ids=("silent", "submission", "crash", "mistake", "lost", "double", "missing"),
)
def test_a_run_that_failed(pretending, body, error, sentence):
    """lmms-eval returns 0 after a crash, and swallows errors while it saves. Red: they look like success."""
    with pytest.raises(error, match=re.escape(sentence)):
        pretending(body)


def test_an_old_result_is_not_taken_for_a_new_one(pretending, tmp_path):
    pretending(RESULTS)
    with pytest.raises(NoResultsError):
        pretending("")


def test_commands(stock, monkeypatch):
    """One recipe each; ours need no path; what lmms-eval would not pass on to the model is refused."""
    monkeypatch.setattr(lmms_run, "_check_plugin", lambda: None)
    plan = Plan(
        Arguments("tiny", device="cpu", batch_size=8), ("none",), ("vlmprune_scenes",), stock / "out", limit=5, processes=2
    )
    text = " ".join(plan.command("fastv:layer=2,fraction=0.5", plan.check()))
    assert f"--include_path {OURS.resolve()}" in text
    assert "--nproc-per-node=2 -m lmms_eval eval --model vlmprune" in text
    assert "--batch_size 8" in text
    assert "--limit 5" in text
    assert 'recipe="fastv:layer=2,fraction=0.5"' in text
    assert plan.folder("none").name == "none"
    assert plan.folder("a:b=1,c=2") != plan.folder("a:b=1-c=2")
    for extra in ("--use_cache", "--model_args=x", "--apply_chat_template"):
        with pytest.raises(vp.UsageError, match="cannot be passed on to lmms-eval"):
            replace(plan, extra=(extra,)).check()
    (stock / "own").mkdir()
    (stock / "own/mine.yaml").write_text("task: mine\ndataset_path: json\n")
    with pytest.raises(vp.UsageError, match="one after the other"):
        replace(plan, include=stock / "own", tasks=("mine", "vlmprune_scenes")).check()


def test_an_installation_without_the_entry_point(monkeypatch):
    monkeypatch.setattr(lmms_run, "entry_points", lambda group: ())
    with pytest.raises(vp.UsageError, match="install it again"):
        lmms_run._check_plugin()


def test_without_lmms_eval(monkeypatch, capsys, tmp_path):
    """One sentence, at once, from the command and from the classes."""
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setattr(lmms_tasks, "find_spec", lambda name: None)
    assert vlmprune(monkeypatch, "lmms", "--out", tmp_path / "out") == 2
    assert "vlmprune: lmms-eval is not installed in this environment: `pip install 'vlmprune[lmms]'`" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "vlmprune.evals.lmms", raising=False)
    with pytest.raises(vp.UsageError, match=r"lmms-eval 0\.7 cannot be imported here"):
        __import__("vlmprune.evals.lmms")
    assert read_finished is not None


def test_dtypes(tmp_path):
    """Weights are read as they are wanted, the embedded model's in float32 otherwise."""
    for dtype, device_map in ((None, None), ("bfloat16", None), ("bfloat16", "auto")):
        session = Session(Arguments("tiny", dtype=dtype, device_map=device_map))
        assert str(session._asker.model.dtype) == f"torch.{dtype or 'float32'}"
        (row,) = session.generate([Request(lambda: simple_messages(ASKED[0][1].text, [ASKED[0][0].image]), "", SHORT)])
        assert row["answer"] == ASKED[0][1].answer
        session.close()
