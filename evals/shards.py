"""Several processes, on one machine or on many, that answer the same questions together.

They share a folder and nothing else: each answers the parts that its rank gives it and adds them to the store, and rank 0 waits
until the store holds all parts, then writes the result. Nothing is sent between processes, so that one that was killed is
replaced by running the command again, and a machine may come later than the others.

Rank and number of processes come from RANK and WORLD_SIZE, which torchrun sets, and which can be set by hand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vlmprune.errors import UsageError
from vlmprune.evals.store import Key, Store

USUAL_WAIT = 30.0
"""Minutes without a new answer after which rank 0 gives up."""
POLL = (0.1, 5.0)
"""Seconds between two looks into the folder: at first, and at most."""


@dataclass(frozen=True)
class Shard:
    """Which of the processes this one is.

    Attributes:
        rank: from 0 to `count` − 1.
        count: number of processes.
        launched: whether torchrun started it, which ends all processes if one fails and shows what all of them print.
        local: rank on this machine.
    """

    rank: int = 0
    count: int = 1
    launched: bool = False
    local: int | None = None

    def mine(self, number: int) -> bool:
        """Whether a part is this process's."""
        return number % self.count == self.rank

    @property
    def first(self) -> bool:
        """Whether this process writes the result."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether it shows its progress: under torchrun one does, elsewhere each has its own terminal."""
        return self.first or not self.launched

    @property
    def answered(self) -> str:
        """What a process says that has answered its parts and writes no result."""
        return f"rank {self.rank} of {self.count} has answered its parts; rank 0 writes the result."

    def device(self, name: str) -> str:
        """The device of this process: under torchrun, `cuda` is one GPU for each process of a machine."""
        return f"cuda:{self.local}" if name == "cuda" and self.local is not None and self.count > 1 else name


ALONE = Shard()


def shard_of(environment: Mapping[str, str] | None = None) -> Shard:
    """Rank and number of processes of this process.

    Args:
        environment: default: the process's.

    Raises:
        UsageError: only one of RANK and WORLD_SIZE is set, or they do not fit together.
    """
    environment = os.environ if environment is None else environment
    rank, count = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is None and count is None:
        return ALONE
    found = f"found RANK={'nothing' if rank is None else rank} and WORLD_SIZE={'nothing' if count is None else count}"
    if rank is None or count is None or not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise UsageError(
            f"several processes need WORLD_SIZE, and RANK from 0 to WORLD_SIZE − 1; {found}: set both, or neither for one "
            "process."
        )
    local = environment.get("LOCAL_RANK", "")
    launched = "TORCHELASTIC_RUN_ID" in environment
    return Shard(int(rank), int(count), launched, int(local) if local.isdecimal() else None)


def wait_for_others(
    store: Store,
    keys: Sequence[Key],
    shard: Shard,
    minutes: float = USUAL_WAIT,
    tick: Callable[[str], None] = lambda waiting_for: None,
) -> None:
    """Return when the store holds all parts.

    Args:
        keys: of all parts, in the order in which they were dealt out.
        minutes: how long to wait without a new answer.
        tick: called at every look with what is waited for.

    Raises:
        UsageError: nothing was added for too long, or another process runs other code; says which ranks are missing.
    """
    pause, stale = POLL[0], store.stale
    missing = [number for number, key in enumerate(keys) if key not in store]
    since = time.monotonic()
    while missing:
        ranks = sorted({number % shard.count for number in missing})
        whose = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''}"
        if store.stale > stale:
            raise UsageError(
                "another process adds answers of another version of vlmprune "
                f"({len(missing)} of {len(keys)} parts are missing, of {whose}): give all processes the same code, then run "
                "the same command again."
            )
        if time.monotonic() - since > 60 * minutes:
            raise UsageError(
                f"{len(missing)} of {len(keys)} parts are missing, of {whose}, and none was added for {minutes:g} minutes: run "
                "the same command again for all ranks, what is there is kept; or wait longer with --wait MINUTES."
            )
        tick(f"waiting for {whose}")
        time.sleep(pause)
        store.refresh()
        left = [number for number in missing if keys[number] not in store]
        if len(left) < len(missing):
            since, pause = time.monotonic(), POLL[0]
        else:
            pause = min(1.5 * pause, POLL[1])
        missing = left
