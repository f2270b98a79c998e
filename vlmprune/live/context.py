"""What belongs to the caller and not to the handle: the switch, another budget, and the record of the last prefill.

The rule. A setting belongs to the context that made it: a thread, or an asyncio task. It reaches the threads that are started
from there by `threading.Thread` afterwards, because that is how answers are streamed: `generate` runs in a thread of its own,
which its caller starts, and which keeps what it was started with. It does not reach threads that were there before, nor
workers of a pool (`concurrent.futures`, `multiprocessing.pool`, anyio), which serve many callers; hand the context over with
`contextvars.copy_context().run` (`asyncio.to_thread` and anyio do so by themselves). Blocks may be closed in any order. A
record belongs to the thread that ran the prefill, and to the blocks (`run.override(…)`) that it ran in.

Python hands a context to new threads from 3.14 on, and only if it is asked to (`sys.flags.thread_inherit_context`). Before
that, nothing tells a thread who started it. Therefore `Thread.start` is replaced while a block is open anywhere, or a handle
was switched off that is still attached, and only then; the replacement notes the caller's settings and calls the original.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary, finalize

from vlmprune.errors import UsageError, shown
from vlmprune.schedule import Budget, plain

POOLS = ("concurrent.futures", "multiprocessing.pool", "anyio", "trio")
"""Modules whose threads serve many callers."""


@dataclass(eq=False)
class OverrideBlock:
    """One `with run.override(…)` block.

    Attributes:
        number: rises with every block that is opened anywhere.
        thread: the thread that opened it.
        owner: what conversations that begin in it belong to. It is held: it lives as long as a thread has these settings.
        enabled, budget, image_positions: what the block sets, or None.
        last: the record of the last prefill that ran in it.
    """

    number: int
    thread: threading.Thread
    owner: Any
    enabled: bool | None = None
    budget: Budget | None = None
    image_positions: Any = None
    last: Any = None


@dataclass(frozen=True, eq=False)
class Settings:
    """The settings of one context for one handle.

    Attributes:
        switched: False if it was switched off outside of any block.
        blocks: the open blocks, the innermost last.
    """

    switched: bool = True
    blocks: tuple[OverrideBlock, ...] = ()

    @property
    def enabled(self) -> bool:
        """False runs prompts un-pruned."""
        for block in reversed(self.blocks):
            if block.enabled is not None:
                return block.enabled
        return self.switched

    @property
    def budget(self) -> Budget | None:
        """In the place of the recipe's, or None."""
        for block in reversed(self.blocks):
            if block.budget is not None:
                return block.budget
        return None

    @property
    def image_positions(self) -> Any:
        """Where the pictures are that `inputs_embeds` holds, or None."""
        for block in reversed(self.blocks):
            if block.image_positions is not None:
                return block.image_positions
        return None


DEFAULT = Settings()
_mine: ContextVar[Mapping[int, Settings] | None] = ContextVar("vlmprune", default=None)
_started_with: WeakKeyDictionary[threading.Thread, Mapping[int, Settings]] = WeakKeyDictionary()
_numbers = count()


def truth(name: str, value: Any) -> bool:
    """A bool of Python's or NumPy's; nothing else counts as one.

    Raises:
        UsageError: says what was found.
    """
    if not isinstance(value := plain(value), bool):
        raise UsageError(f"{name} must be True or False, found {shown(value)}.")
    return value


def now() -> int:
    """A number that rises: whether a block was opened before or after something else happened."""
    return next(_numbers)


def open_blocks(since: int = -1) -> list[OverrideBlock]:
    """The blocks of the calling context, of all handles, that were opened after `since`, the innermost first."""
    blocks = [block for settings in _settings().values() for block in settings.blocks if block.number > since]
    return sorted(blocks, key=lambda block: -block.number)


class Contexts:
    """The settings and records of one handle, by context and by thread."""

    _all: ClassVar[WeakValueDictionary[int, Contexts]] = WeakValueDictionary()

    def __init__(self) -> None:
        self._number = next(_numbers)  # never given twice, so that a later handle inherits nothing
        self._handed_on: finalize[..., Contexts] | None = None
        self._records: WeakKeyDictionary[threading.Thread, Any] = WeakKeyDictionary()
        self._switches = 0  # how often somebody switched it off; a block counts while it is open
        self._all[self._number] = self

    @property
    def settings(self) -> Settings:
        """The calling context's settings."""
        return _settings().get(self._number, DEFAULT)

    @property
    def always_on(self) -> bool:
        """No caller has switched the handle off, so that nobody needs to be asked."""
        return self._switches == 0

    def switch(self, enabled: bool) -> None:
        """Switch the calling context on or off, and the threads that it starts from now on; inside a block that sets it itself,
        until that block ends."""
        self._switches += not enabled
        for block in reversed(self.settings.blocks):
            if block.enabled is not None:
                block.enabled = enabled
                return
        if not enabled and self._handed_on is None:
            _inheriting.begin()
            self._handed_on = finalize(self, _inheriting.end)
        self._change(switched=enabled)

    def close(self) -> None:
        """The handle is removed: new threads need no settings of it any more."""
        if self._handed_on is not None:
            self._handed_on()  # once, however often it is called

    def _change(self, **changes: Any) -> None:
        alive = {number: settings for number, settings in _settings().items() if number in self._all}
        _mine.set({**alive, self._number: replace(self.settings, **changes)})

    @contextmanager
    def block(
        self, owner: Any, enabled: bool | None = None, budget: Budget | None = None, image_positions: Any = None
    ) -> Iterator[None]:
        """Settings of the calling context, and of the threads that it starts, inside a `with`."""
        opened = OverrideBlock(next(_numbers), threading.current_thread(), owner, enabled, budget, image_positions)
        self._change(blocks=(*self.settings.blocks, opened))
        _inheriting.begin()
        off = enabled is False
        self._switches += off
        try:
            yield
        finally:
            self._switches -= off
            _inheriting.end()
            self._change(blocks=tuple(block for block in self.settings.blocks if block is not opened))

    @property
    def last(self) -> Any:
        """The record of the last prefill that is the caller's, or None."""
        me, blocks = threading.current_thread(), self.settings.blocks
        if blocks and blocks[-1].thread is me:
            return blocks[-1].last
        mine = self._records.get(me)
        return blocks[-1].last if mine is None and blocks else mine

    def note(self, record: Any, blocks: tuple[OverrideBlock, ...]) -> None:
        """Keep the record of a prefill that the calling thread ran, in the blocks that were open when it began."""
        self._records[threading.current_thread()] = record
        for block in blocks:
            block.last = record


def _settings() -> Mapping[int, Settings]:
    mine = _mine.get()
    return _started_with.get(threading.current_thread(), {}) if mine is None else mine


def _serves_many(thread: threading.Thread) -> bool:
    modules = (type(thread).__module__, getattr(getattr(thread, "_target", None), "__module__", None) or "")
    return any(module == pool or module.startswith(f"{pool}.") for module in modules for pool in POOLS)


class _Inheriting:
    """`Thread.start`, replaced while a context has settings to hand on."""

    def __init__(self) -> None:
        self._lock, self._open, self._original = threading.RLock(), 0, threading.Thread.start

    def begin(self) -> None:
        with self._lock:
            self._open += 1
            if self._open == 1:
                self._original = original = threading.Thread.start

                def start(thread: threading.Thread) -> None:
                    if (settings := _settings()) and not _serves_many(thread):
                        _started_with[thread] = settings
                    original(thread)

                self._ours = threading.Thread.start = start  # type: ignore[method-assign, assignment]

    def end(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and threading.Thread.start is self._ours:  # else other code replaced it after us
                threading.Thread.start = self._original  # type: ignore[method-assign]


_inheriting = _Inheriting()
