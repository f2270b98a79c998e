"""Many callers, one model: what belongs to a call is that call's alone, and every answer is the one it gets alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import copy
import gc
import itertools
import multiprocessing.pool
import queue
import threading
import time
import weakref
from collections import Counter

import pytest
import torch
from server import (
    NEW_TOKENS,
    OVERRIDES,
    PATIENCE,
    PROMPTS,
    RECIPES,
    Alone,
    Request,
    Server,
    generate,
    requests,
    serve_one,
)
from tiny_models import FIRST_WORD, VOCAB, build, make_inputs, shared, warm_up

import vlmprune as vp

HALF = "divprune:layer=0,fraction=0.5"
PICTURE = [["text4", "image", "text5"]]
VISUAL = 16
"""Visual tokens of a picture of the tiny LLaVA."""


@pytest.fixture
def model():
    return shared("llava")


@pytest.fixture(scope="module")
def alone():
    return Alone()


def ask(model, samples=PICTURE, seed=0, **strategy):
    inputs = make_inputs("llava", model, samples, seed)
    with torch.inference_mode():
        return model.generate(**inputs, **{"max_new_tokens": 3, **strategy})


def kept(run) -> list[int]:
    """Tokens kept of each picture at the last stage of the caller's last prefill."""
    return list(run.report().stages[-1].kept)


def in_a_thread(job, *arguments):
    """The job's result, from a plain thread that is started here."""
    results, told = [], []

    def work():
        try:
            results.append(job(*arguments))
        except BaseException as error:
            told.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    if told:
        raise told[0]
    return results[0]


class Standing:
    """A thread that stands before anything is set, and does one job when it is asked to."""

    def __init__(self):
        self._go, self._done, self._job, self._result, self._error = threading.Event(), threading.Event(), None, None, None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self):
        assert self._go.wait(PATIENCE)
        try:
            self._result = self._job()
        except BaseException as error:
            self._error = error

    def do(self, job):
        self._job = job
        self._go.set()
        self._thread.join(PATIENCE)
        if self._error is not None:
            raise self._error
        return self._result


# --- the server -------------------------------------------------------------------------------------------------------
def living() -> Counter:
    """Objects of ours, tensors and threads that are alive, by their class."""
    gc.collect()
    names = Counter(
        type(thing).__qualname__
        for thing in gc.get_objects()
        if str(type(thing).__module__).startswith("vlmprune.") or type(thing) is torch.Tensor
    )
    names["threads"] = threading.active_count()
    return names


def hooks_of(model) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
    )


def test_a_server_under_load(alone):
    """500 requests, pictures and words, overrides and streams, 8 threads, the recipe replaced every 25 answers.

    Red: an answer under no recipe or a half one, an override that is lost or another request's, a report of another request,
    something that is kept per request.
    """
    server = Server(threads=8, every=25)
    warm_up(server.model, "llava")
    server.serve(requests(60))  # what is made once is made now
    before, hooks = living(), hooks_of(server.model)
    start = time.monotonic()
    served = server.serve(requests(500))
    took = time.monotonic() - start
    after = living()
    assert len(served) == 500
    refused = Counter(f"{type(one.error).__name__}: {one.error}" for one in served if one.error is not None)
    assert not refused, refused.most_common(3)
    under: Counter = Counter()
    for one in served:
        assert len(one.answers) == 1, f"{one.request}: {len(one.answers)} handles have a new record of it"
        ((recipe, late, found),) = one.answers
        assert found == alone.answer(recipe, one.request.prompt, one.request.override), one.request
        under[recipe, late > 0] += 1
    assert server.replaced >= 15
    assert {recipe for recipe, _ in under} == set(RECIPES)
    assert sum(bool(one.request.stream) for one in served) > 100
    assert sum(one.request.pictures == 0 for one in served) > 100
    grown = {name: (before[name], count) for name, count in after.items() if count > before[name]}
    assert not grown, f"in {took:.0f} s: {grown}"
    assert hooks_of(server.model) == hooks


def test_the_load_has_everything():
    load = requests(500)
    assert {one.prompt for one in load} == set(range(len(PROMPTS)))
    assert {one.override for one in load} == set(range(len(OVERRIDES)))
    assert {(one.stream, one.override, bool(one.pictures)) for one in load} >= {
        (stream, override, pictures) for stream in (False, True) for override in range(3) for pictures in (False, True)
    }


def test_answers_differ_between_recipes_and_overrides(alone):
    """Otherwise the server test would not see a wrong recipe."""
    for prompt in range(4):
        kinds = {alone.answer(recipe, prompt, override) for recipe in RECIPES for override in range(3)}
        assert len(kinds) >= 3 * len(RECIPES) - 1
        plain = ask(alone.model, *PROMPTS[prompt], max_new_tokens=NEW_TOKENS)[0, -NEW_TOKENS:].tolist()
        tokens = [list(alone.answer(recipe, prompt, override).tokens) for recipe in RECIPES for override in range(3)]
        assert sum(answer == plain for answer in tokens) < len(tokens) / 2


# --- a recipe is replaced while a request runs (10) -------------------------------------------------------------------
class Pause:
    """Holds the first call of a module until it is released."""

    def __init__(self, module):
        self.inside, self.go_on = threading.Event(), threading.Event()
        self._handle = module.register_forward_hook(self._hold)

    def _hold(self, *_):
        if not self.inside.is_set():
            self.inside.set()
            assert self.go_on.wait(PATIENCE)

    def remove(self):
        self._handle.remove()


PLACES = {
    "in the tower": lambda model: model.model.vision_tower.encoder.layers[1],
    "behind the projector": lambda model: model.model.multi_modal_projector,
    "in the language model": lambda model: model.model.language_model.layers[1],
    "between two steps": lambda model: model.lm_head,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("old", RECIPES)
@pytest.mark.parametrize("new", [RECIPES[0], RECIPES[4], RECIPES[5]])
def test_a_request_has_the_old_recipe_or_the_new(alone, place, old, new):
    """Held at one place while the recipe is replaced. Red: the tower ran under one recipe and the decoder under another."""
    model = build("llava")
    pause = Pause(PLACES[place](model))
    vp.wrap(model, old)
    found = []

    def work():
        found.append(generate(model, Request(1)))

    worker = threading.Thread(target=work)
    worker.start()
    assert pause.inside.wait(PATIENCE)
    second = vp.wrap(model, new)
    pause.go_on.set()
    worker.join(PATIENCE)
    pause.remove()
    assert len(found) == 1
    tokens = tuple(found[0].flatten().tolist())
    allowed = [alone.answer(recipe, 1, 0).tokens for recipe in (old, new)]
    assert tokens == allowed[0] if place in ("in the language model", "between two steps") else tokens in allowed
    assert tuple(generate(model, Request(2)).flatten().tolist()) == alone.answer(new, 2, 0).tokens
    second.remove()


@pytest.mark.parametrize("old", [RECIPES[0], RECIPES[2], RECIPES[5]])
def test_a_conversation_finishes_under_its_recipe(model, old):
    """Two turns by hand: the first under the old recipe, the steps behind it after the replacement."""

    def steps(cache, mask, number):
        logits = []
        for step in range(number):
            mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], 1)
            logits.append(model(input_ids=torch.tensor([[20 + step]]), attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    inputs = make_inputs("llava", model, PICTURE)
    with torch.no_grad():
        with vp.wrap(model, old):
            expected = steps(model(**inputs).past_key_values, inputs["attention_mask"], 4)
        vp.wrap(model, old)
        cache = model(**inputs).past_key_values
        with vp.wrap(model, "uniform:layer=1,fraction=0.3"):
            assert torch.equal(steps(cache, inputs["attention_mask"], 4), expected)


@pytest.mark.parametrize("old", [RECIPES[0], RECIPES[2], RECIPES[5]])
def test_a_step_after_removal_is_refused_in_a_sentence(model, old):
    """Red: a raw tensor-size error, or an answer from a cache with gaps."""
    inputs = make_inputs("llava", model, PICTURE)
    step = {"input_ids": torch.tensor([[20]]), "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 1).long()}
    with torch.no_grad():
        with vp.wrap(model, old):
            cache = model(**inputs).past_key_values
        with pytest.raises(vp.UsageError) as refusal:
            model(**step, past_key_values=cache)
    assert "\n" not in str(refusal.value)


def test_unwrap_removes_whatever_is_attached(model):
    inputs = make_inputs("llava", model, PICTURE)
    hooks = hooks_of(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        vp.wrap(model, HALF)
        vp.wrap(model, "fastv:layer=2,fraction=0.5")
        assert not torch.equal(model(**inputs).logits, plain)
        vp.unwrap(model)
        assert torch.equal(model(**inputs).logits, plain)
        vp.unwrap(model)  # nothing is attached: nothing to do
    assert hooks_of(model) == hooks


def test_replaced_handles_are_forgotten(model):
    """Red: every replacement keeps the earlier handle, its records or its memory of pictures alive."""
    earlier = []
    for number in range(5):
        run = vp.wrap(model, "cls:layer=0,tokens=5")
        ask(model, seed=number)
        earlier.append(weakref.ref(run))
    run.remove()
    del run
    gc.collect()
    assert [ref() for ref in earlier] == [None] * 5


# --- the switch (08) --------------------------------------------------------------------------------------------------
def test_the_switch_is_the_callers(model):
    """Fault script 08: a thread that turns pruning off for its own prompts. Red: others ran un-pruned meanwhile, 70 of 84."""
    stop, stored = threading.Event(), Counter()
    with vp.wrap(model, HALF) as run:

        def chat():
            while not stop.is_set():
                run.enabled = False
                ask(model, [["text6"]])
                run.enabled = True

        thread = threading.Thread(target=chat)
        thread.start()
        for seed in range(40):
            cache = ask(model, seed=seed, max_new_tokens=1, return_dict_in_generate=True).past_key_values
            stored[cache.layers[-1].keys.shape[2]] += 1
        stop.set()
        thread.join(PATIENCE)
        assert run.enabled
    assert stored == {9 + VISUAL // 2: 40}


def test_a_plain_switch_reaches_the_stream_that_is_started_after_it(model):
    """Red: `run.enabled = False`, then a stream: it runs pruned, in silence. When the handle is gone, threads start as ever."""
    original = threading.Thread.start
    with vp.wrap(model, HALF) as run:
        earlier = Standing()
        ask(model)
        run.enabled = False
        cache = in_a_thread(lambda: ask(model, max_new_tokens=1, return_dict_in_generate=True)).past_key_values
        assert cache.layers[-1].keys.shape[2] == 9 + VISUAL
        assert earlier.do(lambda: run.enabled) is True
        ask(model)
        with pytest.raises(vp.UsageError, match="ran its last prompt with the recipe switched off"):
            run.report()
        run.enabled = True
        assert in_a_thread(lambda: run.enabled) is True
    assert threading.Thread.start is original


def test_a_switch_in_a_block_reaches_threads_that_are_started_in_it(model):
    """And no others: neither one that stood before, nor the caller of one that turned itself off."""
    with vp.wrap(model, HALF) as run:
        before = Standing()
        with run.override(enabled=False):
            assert in_a_thread(lambda: run.enabled) is False
            assert before.do(lambda: run.enabled) is True
            cache = in_a_thread(lambda: ask(model, max_new_tokens=1, return_dict_in_generate=True)).past_key_values
            assert cache.layers[-1].keys.shape[2] == 9 + VISUAL
        assert in_a_thread(lambda: run.enabled) is True

        def off():
            run.enabled = False
            with run.override():
                return in_a_thread(lambda: run.enabled)

        assert in_a_thread(off) is False
        assert run.enabled is True


def test_the_switch_in_coroutines(model):
    """Each task has its own; `asyncio.to_thread` takes it along."""
    with vp.wrap(model, HALF) as run:

        async def off():
            run.enabled = False
            await asyncio.sleep(0.01)
            return run.enabled, await asyncio.to_thread(lambda: run.enabled)

        async def on():
            await asyncio.sleep(0.005)
            return run.enabled, await asyncio.to_thread(lambda: run.enabled)

        async def both():
            return await asyncio.gather(off(), on())

        assert asyncio.run(both()) == [(False, False), (True, True)]
        assert run.enabled


WORDS_ALONE = {
    "generate": lambda model, words: model.generate(**words, max_new_tokens=4),
    "plain forward": lambda model, words: model(**words).logits,
    "guidance": lambda model, words: model.generate(**words, max_new_tokens=4, guidance_scale=1.5),
    "beams": lambda model, words: model.generate(**words, max_new_tokens=4, num_beams=3),
    "no cache": lambda model, words: model.generate(**words, max_new_tokens=4, use_cache=False),
}


@pytest.mark.parametrize("way", WORDS_ALONE)
@pytest.mark.parametrize("samples", [[["text9"]], [["text9"], ["text4"]]], ids=["one", "a batch"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_words_alone_run_as_if_unwrapped(model, recipe, samples, way):
    """Nothing to prune: bit for bit, and the report says so. Red: refused, with advice that turned others' pruning off."""
    words = make_inputs("llava", model, samples)
    with torch.no_grad():
        expected = WORDS_ALONE[way](model, words)
        with vp.wrap(model, recipe) as run:
            assert torch.equal(WORDS_ALONE[way](model, words), expected)
            if way == "no cache":
                return  # its last run is of the prompt and what was generated
            report = run.report()
    batch = len(samples) * (3 if way == "beams" else 1)
    assert (report.batch, report.visual_tokens, report.stages) == (batch, 0, ())
    assert report.flops == report.flops_unpruned > 0
    assert report.kv_bytes == report.kv_bytes_unpruned > 0
    assert "0 visual" in str(report) or "no picture" in str(report)


def test_a_picture_under_guidance(model):
    """Classifier-free guidance runs words alone beside our prompt. Red: refused."""
    inputs = make_inputs("llava", model, PICTURE)
    settings = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), vp.wrap(model, HALF):
        guided = model.generate(**inputs, **settings, guidance_scale=1.5)
        assert torch.equal(guided.logits[0], model.generate(**inputs, **settings).logits[0])


def test_a_chat_that_begins_with_words(model):
    """The picture comes in the second turn, pruned there; the first turn is the plain model's."""
    opening = make_inputs("llava", model, [["text9"]])
    later = make_inputs("llava", model, [["text3", "image", "text6"]], seed=5)
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True}
    with torch.no_grad():
        plain = model.generate(**opening, **settings).sequences
        with vp.wrap(model, HALF) as run:
            first = model.generate(**opening, **settings)
            assert torch.equal(first.sequences, plain)
            ids = torch.cat([first.sequences, later["input_ids"]], 1)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=later["pixel_values"],
                past_key_values=first.past_key_values,
                **settings,
            )
            assert kept(run) == [VISUAL // 2]


def test_as_assistant_of_another_model(model):
    """A wrapped model drafts for a plain one, with words alone. Red: refused."""
    drafting = build("llava", seed=1)
    words = make_inputs("llava", model, [["text9"]])
    with torch.no_grad():
        expected = model.generate(**words, max_new_tokens=5, assistant_model=drafting)
        with vp.wrap(drafting, HALF):
            assert torch.equal(model.generate(**words, max_new_tokens=5, assistant_model=drafting), expected)


# --- overrides (09) ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [True, False])
def test_an_override_reaches_a_stream(model, alone, stream):
    """Fault script 09. Red: `generate` in a thread of its own ran with the recipe's budget, in silence."""
    with vp.wrap(model, HALF) as run:
        _, found = serve_one(model, run, Request(0, 1, stream))
    assert found == alone.answer(HALF, 0, 1)
    assert [len(index) for *_, index in found.kept] == [3]


def test_nested_overrides(model):
    """The inner one counts, also in threads; leaving restores the outer one."""
    with vp.wrap(model, HALF) as run:

        def now():
            ask(model)
            return kept(run)

        with run.override(tokens=7):
            with run.override(tokens=2):
                assert (now(), in_a_thread(now)) == ([2], [2])
            assert (now(), in_a_thread(now)) == ([7], [7])
            with contextlib.suppress(ZeroDivisionError), run.override(fraction=0.25):
                assert now() == [4]
                raise ZeroDivisionError
            assert now() == [7]
        assert now() == [VISUAL // 2]


def test_a_thread_keeps_what_it_was_started_with(model):
    """Generation goes on in its thread when the block is left: the request keeps its budget, and a second request of it."""
    with vp.wrap(model, HALF) as run:
        left = threading.Event()

        def work():
            assert left.wait(PATIENCE)
            ask(model)
            return kept(run)

        found: list = []
        thread = threading.Thread(target=lambda: found.append(work()))
        with run.override(tokens=3):
            thread.start()
        ask(model)
        assert kept(run) == [VISUAL // 2]
        left.set()
        thread.join(PATIENCE)
        assert found == [[3]]


def test_a_thread_from_before_does_not_take_it_over(model):
    with vp.wrap(model, HALF) as run:
        before = Standing()

        def now():
            ask(model)
            return kept(run)

        with run.override(tokens=3):
            assert before.do(now) == [VISUAL // 2]
            assert now() == [3]


def test_an_executor_is_told_explicitly(model):
    """Workers of a pool take nothing over, whoever started them; `copy_context().run` hands it on."""
    with vp.wrap(model, HALF) as run, concurrent.futures.ThreadPoolExecutor(1) as pool:

        def now():
            ask(model)
            return kept(run)

        assert pool.submit(now).result(PATIENCE) == [VISUAL // 2]
        with run.override(tokens=3):
            assert pool.submit(now).result(PATIENCE) == [VISUAL // 2]
            assert pool.submit(contextvars.copy_context().run, now).result(PATIENCE) == [3]
            assert pool.submit(now).result(PATIENCE) == [VISUAL // 2]


def test_overrides_of_coroutines(model):
    """Two requests of one event loop, each with its own budget, generating in `asyncio.to_thread`."""
    with vp.wrap(model, HALF) as run:

        def now():
            ask(model)
            return kept(run)

        async def request(tokens):
            with run.override(tokens=tokens):
                await asyncio.sleep(0.01)
                return await asyncio.to_thread(now)

        async def all_of_them():
            return await asyncio.gather(*(request(tokens) for tokens in (3, 5, 7)))

        assert asyncio.run(all_of_them()) == [[3], [5], [7]]


def test_an_override_is_its_handles(model):
    """Two handles on two models in one thread."""
    other = build("llava", seed=1)
    with vp.wrap(model, HALF) as one, vp.wrap(other, "fastv:layer=2,fraction=0.25") as two, one.override(tokens=3):
        ask(model)
        ask(other, [["text3", "image", "text2", "image", "text2"]])
        assert (kept(one), kept(two)) == ([3], [4, 4])
        assert (one.report().batch, one.report().visual_tokens, two.report().visual_tokens) == (1, VISUAL, 2 * VISUAL)


def test_an_override_of_a_removed_handle_is_refused(model):
    """Red: requests of a server that still holds the old handle run with another budget, in silence."""
    run = vp.wrap(model, HALF)
    run.remove()
    with pytest.raises(vp.UsageError, match="was removed from the model and overrides nothing"), run.override(tokens=3):
        pass
    other = vp.wrap(model, "uniform:fraction=0.5")
    with pytest.raises(vp.UsageError, match="was removed from the model and overrides nothing"), run.override(tokens=3):
        pass
    other.remove()


def test_a_block_is_served_by_its_handle_though_it_was_replaced(model):
    """Red: a recipe that is replaced between taking the handle and opening the block takes the override with it."""
    run = vp.wrap(model, HALF)
    with vp.wrap(model, "uniform:fraction=0.25") as other:
        with run.override(tokens=3):
            ask(model)
            assert (kept(run), run.report().stages[0].method) == ([3], "divprune")
        ask(model)
        assert (kept(other), other.report().stages[0].method) == ([4], "uniform")


# --- records (10) -----------------------------------------------------------------------------------------------------
def test_reports_belong_to_their_requests(model):
    """Fault script 10: a single prompt and a batch of three at once. Red: a thread read the other's report."""
    wrong, told = [], []
    with vp.wrap(model, HALF) as run:

        def work(samples, seeds):
            try:
                for seed in range(seeds):
                    ask(model, samples, seed)
                    report = run.report()
                    wrong.append((report.batch, report.visual_tokens) != (len(samples), VISUAL * len(samples)))
            except BaseException as error:
                told.append(error)

        threads = [threading.Thread(target=work, args=(PICTURE * rows, 25)) for rows in (1, 3, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert not told
    assert len(wrong) == 75
    assert sum(wrong) == 0


def test_a_thread_without_a_prompt_has_no_report(model):
    """Red: it gets another thread's."""
    with vp.wrap(model, HALF) as run:
        before = Standing()
        ask(model)
        assert kept(run) == [VISUAL // 2]
        with pytest.raises(vp.UsageError, match="nothing to report here"):
            before.do(run.report)
        assert Standing().do(lambda: run.last) is None


def test_a_report_after_a_stream(model):
    """The block has the record of what the threads that were started in it did; behind it, the caller's own is the last."""
    with vp.wrap(model, HALF) as run:
        ask(model, PICTURE * 2)
        with run.override():
            in_a_thread(ask, model, PICTURE * 3)
            assert run.report().batch == 3
            ask(model)
            assert run.report().batch == 1
        with run.override(tokens=3):
            with pytest.raises(vp.UsageError, match="nothing to report here"):
                run.report()
            in_a_thread(ask, model, PICTURE * 3)
        assert run.report().batch == 1


def test_two_streams_at_once(model):
    """Two threads, each streams in a block of its own: neither reads the other's record."""
    with vp.wrap(model, HALF) as run:

        def request(rows, tokens):
            for _ in range(10):
                with run.override(tokens=tokens):
                    in_a_thread(ask, model, PICTURE * rows)
                    yield run.report().batch, kept(run)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(list, request(rows, tokens)) for rows, tokens in ((1, 3), (2, 7))]
            assert jobs[0].result(PATIENCE) == [(1, [3])] * 10
            assert jobs[1].result(PATIENCE) == [(2, [7, 7])] * 10


def test_a_grandchild_is_of_its_own_family(model):
    """A thread's thread: both of those above it, in whose blocks it was started, know what it did."""
    with vp.wrap(model, HALF) as run:

        def child():
            in_a_thread(ask, model, PICTURE * 2)
            return run.report().batch

        with run.override():
            assert in_a_thread(child) == 2
            assert run.report().batch == 2


def test_a_report_after_an_exception(model):
    """A prompt that is refused leaves no half of a record, and the one before is not taken for its own."""
    with vp.wrap(model, HALF) as run:
        ask(model)
        assert run.last is not None
        inputs = make_inputs("llava", model, PICTURE)
        inputs["input_ids"][0, 5] = 9  # one placeholder too few
        with pytest.raises((vp.UsageError, ValueError)), torch.no_grad():
            model(**inputs)
        assert run.last is None
        ask(model, PICTURE * 2)
        assert run.report().batch == 2


# --- what the tower knew (07) -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("threads", "pictures"), [(2, 4), (3, 30), (8, 10)])
def test_requests_do_not_push_each_other_out(threads, pictures):
    """Fault script 07, with as many visual tokens as LLaVA-1.5. Red: refused, with a sentence that blames the caller."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=96, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=2, vision_feature_layer=-2)
    config.text_config.eos_token_id = config.text_config.bos_token_id = None
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = list(range(FIRST_WORD))

    def job(seed):
        random = torch.Generator().manual_seed(seed)
        ids = torch.full((pictures, 580), 2)
        ids[:, -4:] = 20
        pixels = torch.randn(pictures, 3, 96, 96, generator=random)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    told, done, jobs = [], [], [job(seed) for seed in range(threads)]
    with vp.wrap(model, "cls:layer=0,tokens=64"):

        def work(inputs):
            try:
                for _ in range(3):
                    with torch.inference_mode():
                        model.generate(**inputs, max_new_tokens=1)
                    done.append(len(inputs))
            except BaseException as error:
                told.append(str(error))

        workers = [threading.Thread(target=work, args=(inputs,)) for inputs in jobs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE)
    assert told == []
    assert len(done) == 3 * threads


@pytest.mark.parametrize("recipe", ["cls:layer=0,fraction=0.4", "visionzip:fraction=0.5", "flowcut:fraction=0.4"])
def test_pictures_that_one_thread_encoded_and_others_use(model, recipe):
    """A server that encodes a picture once: questions about it, later and in other threads, are answered as if alone."""
    if not hasattr(model.generation_config, "prefill_chunk_size"):
        pytest.skip("this transformers cannot be given encoded pictures")
    prompts = [make_inputs("llava", model, [["text2", "image", f"text{words}"]]) for words in (3, 5, 7, 9)]
    prompts = [{**prompt, "pixel_values": prompts[0]["pixel_values"]} for prompt in prompts]
    with torch.no_grad(), vp.wrap(model, recipe):
        expected = [model(**prompt).logits for prompt in prompts]
        encoded = in_a_thread(encode, model, prompts[0]["pixel_values"])
        for seed in range(70):  # more pictures than a memory of fixed size would hold
            encode(model, torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
        for prompt, logits in zip(prompts, expected, strict=True):
            rest = {name: value for name, value in prompt.items() if name != "pixel_values"}
            found = in_a_thread(forward, model, {**rest, "mm_encoder_outputs": {"image": copy.copy(encoded)}})
            torch.testing.assert_close(found, logits, atol=5e-5, rtol=0)


@torch.no_grad()
def encode(model, pixels):
    return model.get_image_features(pixels, return_dict=True)


@torch.no_grad()
def forward(model, inputs):
    return model(**inputs).logits


# --- found by a second reader -----------------------------------------------------------------------------------------
def steps(model, when, do, **strategy):
    """Logits of every step of a generation, in which `do` is called when the base model has run `when` times."""
    count = itertools.count(1)

    def hook(*_):
        if next(count) == when:
            do()

    handle = model.model.register_forward_hook(hook)
    how = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 6}
    try:
        return torch.stack(ask(model, **how, **strategy).logits)
    finally:
        handle.remove()


REPLACED = [
    ("fastv:layer=2,tokens=4", "divprune:layer=0,tokens=2"),
    ("flowcut:tokens=4", "divprune:layer=0,tokens=3"),
    ("divprune:layer=0,tokens=3", "flowcut:tokens=4"),
    ("pai:alpha=2,layers=1:", "divprune:layer=0,tokens=3"),
]


@pytest.mark.parametrize(("old", "new"), REPLACED)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_request_without_a_cache_is_whole(model, old, new, beams):
    """Red: nobody holds the old recipe between two steps; an answer begins under one and ends under the other, or in NaN."""
    how = {"use_cache": False, "num_beams": beams}
    with vp.wrap(model, old):
        expected = steps(model, 0, None, **how)
    first = vp.wrap(model, old)
    later: list = []
    found = steps(model, 2, lambda: later.append(vp.wrap(model, new)), **how)
    assert torch.equal(found, expected)
    first.remove()  # was replaced: nothing happens
    assert later[0]._attachment.current is later[0]._owner()
    later[0].remove()


@pytest.mark.parametrize("recipe", ["fastv:layer=2,tokens=4", "random:layer=0,tokens=4", "vhr"])
def test_two_prompts_without_a_cache_in_one_thread(model, recipe):
    """Red: there is one place for what was chosen, and a second prompt takes it away in mid-answer."""
    with vp.wrap(model, recipe):
        expected = steps(model, 0, None, use_cache=False)
        found = steps(model, 2, lambda: ask(model, seed=3, use_cache=False, max_new_tokens=2), use_cache=False)
    assert torch.equal(found, expected)


def test_a_switch_in_mid_answer_without_a_cache(model):
    """What the caller had said when the prompt began holds for all of its steps."""
    with vp.wrap(model, HALF) as run:
        expected = steps(model, 0, None, use_cache=False)

        def off():
            run.enabled = False

        assert torch.equal(steps(model, 2, off, use_cache=False), expected)


class AsAnyioDoes(threading.Thread):
    """Stands for the workers of anyio, which serve one caller after the other in its own context."""

    def __init__(self):
        super().__init__(daemon=True)
        self.jobs: queue.Queue = queue.Queue()

    def run(self):
        while (job := self.jobs.get()) is not None:
            context, work, done = job
            done.put(context.run(work))

    def do(self, work):
        done: queue.Queue = queue.Queue()
        self.jobs.put((contextvars.copy_context(), work, done))
        return done.get(timeout=PATIENCE)


AsAnyioDoes.__module__ = "anyio._backends._asyncio"


def test_workers_of_pools_keep_nothing(model):
    """Red: a worker that is started inside a block has its override for ever, and gives it to other callers."""
    with vp.wrap(model, HALF) as run:

        def one(_=None):
            ask(model)
            return kept(run)

        with run.override(tokens=2):
            worker = AsAnyioDoes()
            worker.start()
            assert worker.do(one) == [2], "the context is handed over by the caller"
            pool = multiprocessing.pool.ThreadPool(1)
            assert pool.map(one, [0]) == [[8]], "a pool's workers take nothing over"
        assert worker.do(one) == [8]
        assert pool.map(one, [0]) == [[8]]
        pool.close()
        worker.jobs.put(None)


def test_blocks_end_in_any_order(model):
    """Red: a block that ends puts back what it found, and takes away, or brings back, what others say."""
    with vp.wrap(model, HALF) as run:

        def stream(tokens):
            with run.override(tokens=tokens):
                while True:
                    ask(model)
                    yield kept(run)

        first, second = stream(2), stream(3)
        assert (next(first), next(second)) == ([2], [3])
        first.close()
        assert next(second) == [3]
        second.close()
        ask(model)
        assert kept(run) == [8]
        with run.override(tokens=2):
            run.enabled = False
        assert run.enabled is False
        run.enabled = True


def test_the_innermost_block_of_several_handles(model):
    one = vp.wrap(model, HALF)
    two = vp.wrap(model, "uniform:fraction=0.25")
    with vp.wrap(model, "random:layer=0,fraction=0.75"):
        for outer, inner in ((one, two), (two, one)):
            with outer.override(tokens=5), inner.override(tokens=3):
                ask(model)
                assert (kept(inner), inner.report().recipe) == ([3], str(inner.recipe))


def test_a_stream_keeps_its_block_when_the_recipe_is_replaced_and_the_block_is_over(model):
    go, results = threading.Event(), []

    def work():
        go.wait(PATIENCE)
        cache = ask(model, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        results.append(cache.layers[-1].keys.shape[2])

    run = vp.wrap(model, HALF)
    with run.override(tokens=3):
        thread = threading.Thread(target=work)
        thread.start()
    with vp.wrap(model, "uniform:fraction=0.5"):
        go.set()
        thread.join(PATIENCE)
    assert results == [9 + 3]


@pytest.mark.parametrize("how", ["remove", "unwrap"])
def test_pictures_of_a_removed_recipe_say_so(model, how):
    """Red: patches that were dropped inside the tower are rows of NaN, and the plain model answers NaN."""
    run = vp.wrap(model, "flowcut:tokens=4")
    inputs = make_inputs("llava", model, PICTURE)
    encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    run.remove() if how == "remove" else vp.unwrap(model)
    with pytest.raises(vp.UsageError, match="encode them again"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


def test_pictures_of_a_replaced_recipe_stay_its_own(model):
    """Red: only the first prompt finds out whose they are; the second gets NaN."""
    first = vp.wrap(model, "flowcut:tokens=4")
    inputs = make_inputs("llava", model, PICTURE)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        expected = model(**inputs, pixel_values=pixels).logits
        encoded = model.get_image_features(pixels, return_dict=True)
        with vp.wrap(model, HALF):
            for _ in range(2):
                assert torch.equal(model(**inputs, mm_encoder_outputs={"image": encoded}).logits, expected)
    assert "removed" in repr(first)


def test_removing_waits_and_gives_up_in_a_sentence(model, monkeypatch):
    """Red: hooks are pulled out of another thread's forward pass, which ends in an error about sizes, or half edited."""
    monkeypatch.setattr("vlmprune.live.attachment.PATIENCE", 0.3)
    ask(model)
    before = hooks_of(model)  # transformers has its own
    inside, go = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        go.wait(PATIENCE)

    run = vp.wrap(model, "divprune:layer=0,tokens=4")
    ask(model)
    expected = run.last.entering
    handle = model.model.language_model.layers[3].register_forward_pre_hook(hold)
    results: list = []
    thread = threading.Thread(target=lambda: results.append((ask(model, max_new_tokens=1), run.last)))
    thread.start()
    assert inside.wait(PATIENCE)
    with pytest.raises(vp.UsageError, match="another thread has been running the model"):
        run.remove()
    go.set()
    thread.join(PATIENCE)
    handle.remove()
    assert results[0][1].entering == expected, "the pass that was inside came to its end"
    vp.unwrap(model)
    assert hooks_of(model) == before


def test_ctrl_c_leaves_nothing_behind(model):
    """Red: torch runs no hook when Ctrl-C ends a forward pass; what was noted of it is taken for the next call's."""
    ask(model)
    before = hooks_of(model)
    with vp.wrap(model, "fastv:layer=2,tokens=4"):
        ask(model)
        expected = ask(model)

    def stop(*_):
        raise KeyboardInterrupt

    first = vp.wrap(model, "flowcut:tokens=4")
    inputs = make_inputs("llava", model, PICTURE)
    handle = model.model.language_model.layers[3].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(**inputs)
    handle.remove()
    with vp.wrap(model, "fastv:layer=2,tokens=4"):
        assert torch.equal(ask(model), expected)
    first.remove()
    assert hooks_of(model) == before


def test_unwrapping_lets_threads_start_as_ever(model):
    original = threading.Thread.start
    run = vp.wrap(model, HALF)
    run.enabled = False
    assert threading.Thread.start is not original
    vp.unwrap(model)
    assert threading.Thread.start is original


def test_wrapping_inside_ones_own_block(model):
    """A block holds against what other threads wrap, and not against what its own thread wraps in it."""
    with vp.wrap(model, HALF) as run, run.override(tokens=3), vp.wrap(model, "uniform:fraction=0.25") as inner:
        ask(model)
        assert (kept(inner), inner.report().stages[0].method) == ([4], "uniform")
    run = vp.wrap(model, HALF)
    with run.override(tokens=3):
        other = in_a_thread(vp.wrap, model, "uniform:fraction=0.25")
        ask(model)
        assert (kept(run), run.report().stages[0].method) == ([3], "divprune")
    other.remove()
