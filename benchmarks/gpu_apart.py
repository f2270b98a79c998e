"""Work in a separate process: after an illegal memory access a process cannot use the GPU any more, and a kernel may hang."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


class OutOfTimeError(Exception):
    """The budget was spent before a step had a result."""


def in_a_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def serve(pipe: Connection) -> None:
    """The child process: do the work that it gets until the other end is closed."""
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, work(*arguments))
        except Exception as error:  # many CUDA errors cannot be pickled
            traceback.print_exc()
            answer = (False, in_a_line(error))
        pipe.send(answer)


class Apart:
    """A child process, started when there is work for it, and again after it was lost."""

    def __init__(self) -> None:
        self.process: Any = None
        self.pipe: Connection | None = None

    def call(self, seconds: float, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work(*arguments)` returns in the child.

        Raises:
            OutOfTimeError: it took longer than `seconds`.
            RuntimeError: it raised, or its process ended. In each case the next call has a fresh process.
        """
        if self.pipe is None:
            context = get_context("spawn")  # a fork cannot use CUDA
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()  # so that `recv` fails when the child ends
        try:
            self.pipe.send((work, arguments))
            if not self.pipe.poll(max(seconds, 0)):
                raise OutOfTimeError(f"stopped after {seconds:.0f} s, the budget was spent")
            fine, found = self.pipe.recv()
            if not fine:
                raise RuntimeError(found)
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            self.end()
            raise RuntimeError(f"its process ended with exit code {code}") from None
        except BaseException:
            self.end()
            raise
        return found

    def end(self) -> None:
        """End the child, which frees its memory."""
        if self.pipe is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.pipe = None
