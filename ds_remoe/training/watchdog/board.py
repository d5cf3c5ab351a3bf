"""Where ranks leave word of themselves: the key-value store by which they met, reached by a thread of its own."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ds_remoe.training.watchdog.verdict import Sighting
from ds_remoe.training.watchdog.whereabouts import Whereabouts

_CONNECT = timedelta(seconds=60)
_VERDICT = "ds_remoe_watchdog/verdict"


class Board:
    """Publishes this rank's whereabouts again and again, and reads: rank 0 all others', another rank those of rank 0.

    So the store serves a few small requests a rank and period. It lives in rank 0's process, and its own thread answers
    there whatever Python does. Nothing here blocks the caller: a store that does not answer only lets what was heard
    grow old.

    Args:
        publish: this rank's whereabouts as JSON.
        period: seconds between two rounds.
        now: the clock by which words age.
    """

    def __init__(self, publish: Callable[[], str], period: float, now: Callable[[], float]) -> None:
        self._publish, self._period, self._now = publish, period, now
        self._rank, world = dist.get_rank(), dist.get_world_size()
        self._read = [rank for rank in range(world) if rank != self._rank] if self._rank == 0 else [0]
        self._heard: dict[int, tuple[bytes, float]] = {rank: (b"", now()) for rank in self._read}
        self._verdict, self._to_post = "", ""
        self._posted, self._wake, self._closed = threading.Event(), threading.Event(), False
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="watchdog's board", daemon=True)
        self._thread.start()

    @property
    def verdict(self) -> str:
        """What rank 0 has posted; empty before."""
        return self._verdict

    def sightings(self) -> dict[int, Sighting]:
        """What is known of the ranks that this one reads."""
        return {
            rank: Sighting(_read_word(word), self._now() - since) for rank, (word, since) in dict(self._heard).items()
        }

    def silent(self, after: float) -> set[int]:
        """Ranks among them of which nothing was heard for that many seconds."""
        return {rank for rank, (_, since) in dict(self._heard).items() if self._now() - since > after}

    def post_verdict(self, text: str, patience: float) -> None:
        """Rank 0 tells all others how the run ends; gives up after `patience` seconds."""
        self._to_post = text
        self._wake.set()
        self._posted.wait(patience)

    def close(self) -> None:
        """Publish and read no more."""
        self._closed = True
        self._wake.set()
        self._thread.join(self._period)

    def _run(self) -> None:
        with contextlib.suppress(dist.DistError):  # the store is gone: what was heard grows old
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=_CONNECT)
            if self._rank == 0:
                for key in map(_key, self._read):
                    store.compare_set(key, "", "")  # there to be read, and a word that came first stays
                store.set(_VERDICT, "")
            while not self._closed:
                self._round(store)
                self._wake.wait(self._period)
                self._wake.clear()

    def _round(self, store: dist.TCPStore) -> None:
        self._rounds += 1  # no word is like the one before, so a new one is a sign of life
        store.set(_key(self._rank), f"{self._rounds} {self._publish()}")
        if self._to_post:
            store.set(_VERDICT, self._to_post)
            self._posted.set()
        *words, verdict = store.multi_get([*map(_key, self._read), _VERDICT])
        for rank, word in zip(self._read, words, strict=True):
            if word != self._heard[rank][0]:
                self._heard[rank] = (word, self._now())
        self._verdict = verdict.decode()


def _read_word(word: bytes) -> Whereabouts | None:
    return Whereabouts.from_json(word.decode().partition(" ")[2]) if word else None


def _key(rank: int) -> str:
    return f"ds_remoe_watchdog/{rank}"
