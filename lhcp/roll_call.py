"""What the ranks of a job tell each other of their being alive, through its store and beside all process groups.

A rank that hangs inside a collective still has a thread that answers here; one that is stopped, has died, or cannot
run Python has none, and is named.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from lhcp.distributed.env import ProcessEnv

WINDOW = 4
"""Ticks in which a rank that is alive shows it."""
_NAMED = 4
_HUNG, _CLAIMS, _VERDICT = "hung", "claims", "verdict"
_CONNECT_S = 300.0


@dataclass(frozen=True)
class Sign:
    """Of life, from one rank."""

    tick: int
    """Goes up with each one."""
    time: str
    host: str
    beats: int
    """Boundaries passed: all ranks pass the same ones."""
    doing: str
    """`in step 58`, say."""
    since: str


def verdict(before: Mapping[int, Sign], after: Mapping[int, Sign], world: int) -> str:
    """Which ranks hold up the others, from what was seen of them twice, `WINDOW` ticks apart."""
    furthest = max(after.values(), key=lambda sign: sign.beats)
    blamed = [f"rank {rank} has not come forward at all" for rank in range(world) if rank not in after]
    blamed += [
        f"rank {rank} on host {sign.host} gives no sign of life since {sign.time}, when it was {sign.doing}"
        for rank, sign in after.items()
        if rank in before and before[rank].tick == sign.tick
    ]
    if not blamed:
        blamed = [
            f"rank {rank} on host {sign.host} is alive, but {sign.doing} since {sign.since}"
            for rank, sign in after.items()
            if sign.beats < furthest.beats
        ]
    if blamed:
        return f"{_some(blamed)}; the furthest is {furthest.doing}"
    if world == 1:
        return alone(0, furthest)
    return f"all {world} ranks are alive and {furthest.doing}, since {furthest.since}"


def alone(rank: int, sign: Sign) -> str:
    """What a rank knows of itself."""
    return f"rank {rank} on host {sign.host} is {sign.doing} since {sign.since}"


def _some(texts: list[str]) -> str:
    more = len(texts) - _NAMED
    return "; ".join(texts[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


class RollCall:
    """One rank's part, in a thread of its own: the store may keep any call waiting.

    Args:
        env: of this rank.
        tick_s: seconds between signs of life.
        sign: this rank's, given its number.

    Attributes:
        hung: set when a rank, this or another, has found the run to hang.
        settled: set when the verdict is known, or never will be.
        verdict: which ranks hold up the others; None: no store, or no answer.
        speaks: whether this rank is the one to tell it.
    """

    def __init__(self, env: ProcessEnv, tick_s: float, sign: Callable[[int], Sign]) -> None:
        self._env, self._tick_s, self._sign = env, tick_s, sign
        self._ticks = 0
        self._closed = threading.Event()
        self.hung, self.settled = threading.Event(), threading.Event()
        self.verdict: str | None = None
        self.speaks = False
        self._thread = threading.Thread(target=self._run, name="roll call", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give no more signs."""
        self._closed.set()
        self._thread.join(1.0)  # it may wait for the store for longer, which keeps no process from ending

    def _run(self) -> None:
        with suppress(DistError):  # without the store each rank speaks for itself
            if store := self._connect():
                while not (self._closed.wait(self._tick_s) or self.hung.is_set()):
                    self._tick(store)
                    if store.check([_HUNG]):
                        self.hung.set()
                if self.hung.is_set():
                    self._settle(store)
        self.settled.set()

    def _settle(self, store: Store) -> None:
        """Let all know, and let one of those who do find out who is to blame."""
        store.set(_HUNG, "1")
        if store.add(_CLAIMS, 1) == 1:
            store.set(_VERDICT, self._judge(store))
            self.speaks = True
        while not store.check([_VERDICT]):
            time.sleep(self._tick_s)
            self._tick(store)
        self.verdict = store.get(_VERDICT).decode()

    def _connect(self) -> Store | None:
        """A connection apart from that of the process groups, whose calls may be waiting on theirs."""
        if "MASTER_ADDR" not in os.environ:
            return None
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=_CONNECT_S)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
        # torchrun starts ranks again with the store of the ones before.
        return PrefixStore(f"lhcp/hang/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _tick(self, store: Store) -> None:
        self._ticks += 1
        store.set(str(self._env.rank), json.dumps(asdict(self._sign(self._ticks))))

    def _judge(self, store: Store) -> str:
        before = self._signs(store)
        for _ in range(WINDOW):
            time.sleep(self._tick_s)
            self._tick(store)
        return verdict(before, self._signs(store), self._env.world_size)

    def _signs(self, store: Store) -> dict[int, Sign]:
        ranks = [rank for rank in range(self._env.world_size) if store.check([str(rank)])]
        return {rank: Sign(**json.loads(store.get(str(rank)))) for rank in ranks}
