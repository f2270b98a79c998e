"""`TowerRun`: settings, records, threads, and what else can happen to a model while it is wrapped."""

from __future__ import annotations

import copy
import gc
import json
import threading
import weakref

import pytest
import torch
import torch._dynamo
from image_towers.promises import EXACT, MOVED, close, kept_by
from image_towers.towers import PATCHES, Tower, build, masked, pictures
from snapshot import Snapshot
from torch.overrides import _get_current_function_mode_stack

import vlmprune as vp

RECIPE = "flowcut:tokens=6"


@pytest.fixture
def clip():
    """A tower and its model, which no test leaves wrapped."""
    tower, model = build("clip")
    yield tower, model
    vp.unwrap(model)
    assert not _get_current_function_mode_stack()


def fresh() -> tuple[Tower, torch.nn.Module]:
    tower, model = build("clip vision")
    return tower, copy.deepcopy(model)


@pytest.mark.usefixtures("no_grad")
def test_settings(clip):
    tower, model = clip
    pixels = pictures(2)
    plain = tower.encode(model, pixels)
    run = vp.wrap(model, "divprune:layer=1,tokens=6")
    assert repr(run) == "<vlmprune.TowerRun 'divprune:layer=1,tokens=6' on the image tower of CLIPModel, attached>"
    assert run.last is None
    with pytest.raises(vp.UsageError, match="has not encoded a picture"):
        run.report()
    pruned = tower.encode(model, pixels)
    with run.override(fraction=0.5):
        tower.encode(model, pixels)
        assert run.report().stages[0].kept == (18, 18)
    tower.encode(model, pixels)
    assert run.report().stages[0].kept == (6, 6)
    run.enabled = False
    assert "switched off" in repr(run)
    assert torch.equal(tower.encode(model, pixels), plain)
    run.enabled = True
    assert torch.equal(tower.encode(model, pixels), pruned)
    other = vp.wrap(model, "divprune:layer=1,tokens=9")
    assert "replaced" in repr(run)
    run.remove()  # of a handle that was replaced: nothing
    tower.encode(model, pixels)
    assert other.report().stages[0].kept == (9, 9)
    with pytest.raises(vp.UsageError, match="no longer on the model"), run.override(tokens=3):
        pass
    other.remove()
    assert "removed" in repr(other)
    assert torch.equal(tower.encode(model, pixels), plain)


@pytest.mark.usefixtures("no_grad")
def test_report(clip):
    tower, model = clip
    with vp.wrap(model, "random:layer=2|4,tokens=12|4") as run:
        tower.encode(model, pictures(3))
        report = run.report()
    assert report.entering == (37, 37, 13, 13, 5, 5)
    assert report.patches_by_block == (36, 36, 12, 12, 4, 4)
    assert [(stage.layer, stage.kept) for stage in report.stages] == [(2, (12,) * 3), (4, (4,) * 3)]
    weights, dim = 4 * 32 * 32 + 2 * 32 * 48, 32
    assert report.flops == 3 * sum(2 * n * weights + 4 * n * n * dim for n in report.entering)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert "36 (0–1), 12 (2–3), 4 (4–5)" in str(report)
    assert "kept before block 2 (random)" in str(report)
    assert [len(kept.index) for kept in run.last.kept] == [12] * 3 + [4] * 3


def test_nothing_is_left():
    """Red: a hook, or the tower's `forward`, stays where it was put."""
    _, model = fresh()
    model.generation_config = None  # what the snapshot looks for in language models
    model.generation_config = torch.nn.Module()
    before = Snapshot(model)
    vp.wrap(model, RECIPE)
    assert before.differences(Snapshot(model))
    vp.unwrap(model)
    assert not before.differences(Snapshot(model))


def test_copies_are_refused(clip):
    _, model = clip
    with vp.wrap(model, RECIPE) as run:
        for wrapped in (model, run):
            with pytest.raises(vp.UsageError, match=r"cannot be copied or pickled: call run.remove\(\) first"):
                copy.deepcopy(wrapped)


@pytest.mark.usefixtures("no_grad")
def test_model_is_freed():
    """Red: hooks keep the model alive until the garbage collector finds them."""
    tower, model = fresh()
    found = weakref.ref(model)
    run = vp.wrap(model, RECIPE)
    tower.encode(model, pictures(1))
    gc.collect()
    gc.disable()
    try:
        del model, run
        assert found() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted(clip, error):
    """Red: torch's mode stays on in the thread when a block fails, or the next pass begins in the middle of this one."""
    tower, model = clip
    pixels = pictures(2)
    with vp.wrap(model, RECIPE):
        pruned = tower.encode(model, pixels)

        def fail(*_):
            raise error("in the middle")

        handle = model.get_submodule(f"{tower.blocks}.2.mlp").register_forward_hook(fail)
        with pytest.raises(error, match="in the middle"):
            tower.encode(model, pixels)
        assert not _get_current_function_mode_stack()
        handle.remove()
        assert torch.equal(tower.encode(model, pixels), pruned)


@pytest.mark.usefixtures("no_grad")
def test_threads(clip):
    """Two threads at once, one with another budget, one that switched the recipe off: each as if it were alone."""
    tower, model = clip
    batches = [pictures(2, seed=seed) for seed in range(3)]
    plain = tower.encode(model, batches[2])
    with vp.wrap(model, RECIPE) as run:
        alone = [tower.encode(model, batches[0])]
        with run.override(tokens=3):
            alone.append(tower.encode(model, batches[1]))
        alone.append(plain)
        wrong, start = [], threading.Barrier(3)

        def work(number):
            with torch.no_grad(), run.override(tokens=[None, 3, None][number], enabled=number != 2):
                start.wait()
                for _ in range(10):
                    if not torch.equal(tower.encode(model, batches[number]), alone[number]):
                        wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.usefixtures("no_grad")
def test_removed_while_another_thread_is_inside(clip):
    """Removing waits until the other thread has left the tower: half of a pass cannot go on without its hooks."""
    tower, model = clip
    pixels = pictures(2)
    run = vp.wrap(model, RECIPE)
    pruned = tower.encode(model, pixels)
    inside, go_on, found = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is worker:
            inside.set()
            go_on.wait()

    handle = model.get_submodule(f"{tower.blocks}.3").register_forward_pre_hook(wait)

    def work():
        with torch.no_grad():
            found.append(tower.encode(model, pixels))

    worker = threading.Thread(target=work)
    worker.start()
    inside.wait()
    remover = threading.Thread(target=run.remove)
    remover.start()
    remover.join(timeout=0.2)
    waits = remover.is_alive()
    go_on.set()
    worker.join()
    remover.join()
    handle.remove()
    assert waits
    assert torch.equal(found[0], pruned)
    assert "removed" in repr(run)


def test_gradients(clip):
    """Of the features by the pixels: those of the masked tower."""
    tower, model = clip
    plain = pictures(2).requires_grad_()
    tower.encode(model, plain).square().sum().backward()
    with vp.wrap(model, "flowcut:tokens=9") as run:
        pixels = pictures(2).requires_grad_()
        tower.encode(model, pixels).square().sum().backward()
        kept = kept_by(run.last)
    same = pictures(2).requires_grad_()
    masked(tower, model, same, kept).square().sum().backward()
    largest = same.grad.abs().max()
    assert (plain.grad - same.grad).abs().max() > 0.1 * largest
    assert (pixels.grad - same.grad).abs().max() < EXACT[torch.float32] * largest


def test_gradient_checkpointing_is_refused():
    tower, model = fresh()
    model.train()
    model.gradient_checkpointing_enable()
    with vp.wrap(model, RECIPE), pytest.raises(vp.UsageError, match="gradient checkpointing runs the blocks"):
        tower.encode(model, pictures(1))
    with vp.wrap(model, RECIPE) as run, torch.no_grad():
        tower.encode(model, pictures(1))
        assert run.report().stages[0].kept == (6,)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("recipe", [RECIPE, "tome:layer=2,tokens=6"])
def test_half_precision(recipe):
    """In bfloat16, and inside autocast: the same dtype as un-pruned, and a batch keeps what its pictures keep alone."""
    tower, model = fresh()
    pixels = pictures(3)
    with vp.wrap(model, recipe) as run, torch.autocast("cpu", dtype=torch.bfloat16):
        assert tower.encode(model, pixels).isfinite().all()
        together = [kept.index.tolist() for kept in run.last.kept]
        alone = []
        for picture in pixels:
            tower.encode(model, picture[None])
            alone += [kept.index.tolist() for kept in run.last.kept]
    assert together == alone
    model.to(torch.bfloat16)
    with vp.wrap(model, recipe) as run:
        features = tower.encode(model, pixels.bfloat16())
        assert features.dtype == torch.bfloat16
        assert features.isfinite().all()
        assert {len(kept.index) for kept in run.last.kept} == {6}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("recipe", [RECIPE, "divprune:layer=2,tokens=6"])
def test_compiled(recipe, monkeypatch):
    """`torch.compile` of a wrapped model runs the tower as it is."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch._dynamo.reset()
    tower, model = fresh()
    pixels = pictures(2)
    with vp.wrap(model, recipe) as run:
        expected = tower.encode(model, pixels)
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            close(compiled(pixels).pooler_output, expected)
        assert run.report().stages[0].kept == (6, 6)
        run.enabled = False
        assert (compiled(pixels).pooler_output - expected).abs().max() > MOVED
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_grad")
def test_replaced_block_is_refused():
    tower, model = fresh()
    with vp.wrap(model, RECIPE):
        blocks = model.get_submodule(tower.blocks)
        blocks[3] = type(blocks[3])(model.config).eval()
        with pytest.raises(vp.UsageError, match=r"5 of 6 blocks ran .* a block was replaced"):
            tower.encode(model, pictures(1))


@pytest.mark.usefixtures("no_grad")
def test_block_by_itself_is_refused(clip):
    """As in open_clip's `forward_intermediates`, which needs every patch of every block."""
    tower, model = clip
    block = model.get_submodule(f"{tower.blocks}.1")
    hidden = torch.zeros(1, PATCHES + 1, 32)
    with vp.wrap(model, RECIPE) as run:
        with pytest.raises(vp.UsageError, match="was called by itself"):
            block(hidden, None)
        run.enabled = False
        block(hidden, None)


@pytest.mark.usefixtures("no_grad")
def test_other_attention_is_refused():
    """Eager attention is seen nowhere: a method that looks at none needs none."""
    tower, model = fresh()
    model.set_attn_implementation("eager")
    plain = tower.encode(model, pictures(2))
    with vp.wrap(model, RECIPE), pytest.raises(vp.UsageError, match=r'set_attn_implementation\("sdpa"\)'):
        tower.encode(model, pictures(2))
    with vp.wrap(model, "divprune:layer=2,tokens=6"):
        assert (tower.encode(model, pictures(2)) - plain).abs().max() > MOVED


@pytest.mark.usefixtures("no_grad")
def test_other_sizes():
    """Pictures of another size are refused, unless the model is asked to interpolate its positions."""
    _, model = fresh()
    with vp.wrap(model, "divprune:layer=1,fraction=0.5") as run:
        with pytest.raises(vp.UsageError, match="takes pictures of 48 × 48 pixels, found 64 × 32"):
            model(torch.zeros(1, 3, 64, 32))
        model(torch.randn(1, 3, 64, 32), interpolate_pos_encoding=True)
        assert run.report().patches == 32
        assert run.report().stages[0].kept == (16,)
