"""Work in a process of its own: an illegal memory access ends a process's use of the GPU, and a kernel may hang."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


class OutOfTimeError(Exception):
    """The budget was spent before a step had anything to show."""


def in_a_line(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def serve(pipe: Connection) -> None:
    """The child: do what is asked until the other end is closed."""
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, work(*arguments))
        except Exception as error:  # many errors of CUDA cannot be sent as they are
            traceback.print_exc()
            answer = (False, in_a_line(error))
        pipe.send(answer)


class Apart:
    """A child process, started when there is work for it, and anew after it was lost."""

    def __init__(self) -> None:
        self.process: Any = None
        self.pipe: Connection | None = None

    def call(self, seconds: float, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work(*arguments)` returns in the child.

        Raises:
            OutOfTimeError: it took longer than `seconds`.
            RuntimeError: it raised, or its process ended. Whatever is raised, the next call has a fresh process.
        """
        if self.pipe is None:
            context = get_context("spawn")  # a fork cannot use CUDA
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()  # so that the end of the child is seen
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
        """Give back the child and its memory."""
        if self.pipe is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.pipe = None
