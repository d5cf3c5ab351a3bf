"""Who holds up a run: judged from what all ranks last said of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ds_remoe.training.watchdog.whereabouts import Whereabouts, list_ranks

Key = TypeVar("Key")
_HOSTS_NAMED = 4


@dataclass(frozen=True)
class Sighting:
    """What is known of a rank.

    Attributes:
        said: its newest whereabouts; None where it never said any.
        age: seconds since then.
    """

    said: Whereabouts | None
    age: float


@dataclass(frozen=True)
class Verdict:
    """Who did not come, and who waits for whom.

    Attributes:
        silent: ranks that say nothing any more, so they are stopped, dead or cut off.
        absent: ranks that are alive and wait for nobody, but have not started a collective that others wait in.
        waiting: of each rank that waits, those of its last collective's group that have not started it.
    """

    silent: tuple[int, ...]
    absent: tuple[int, ...]
    waiting: dict[int, tuple[int, ...]]


def judge(sightings: Mapping[int, Sighting], silent_after: float) -> Verdict:
    """Find the ranks at the end of every chain of waiting.

    Collectives of a group are started in the same order by all its ranks, so one that has started fewer than another
    has not arrived where the other waits.

    Args:
        sightings: of the ranks that the judge knows of, by rank.
        silent_after: seconds without a word after which a rank counts as silent.
    """
    silent = {rank for rank, sighting in sightings.items() if sighting.said is None or sighting.age > silent_after}
    waiting: dict[int, tuple[int, ...]] = {}
    for rank, sighting in sightings.items():
        last = sighting.said.last if sighting.said is not None else None
        if rank in silent or last is None:
            continue
        missing = [
            other for other in last.ranks if other in sightings and _started(sightings[other], last.group) < last.number
        ]
        if missing:
            waiting[rank] = tuple(missing)
    awaited = {other for missing in waiting.values() for other in missing}
    return Verdict(tuple(sorted(silent)), tuple(sorted(awaited - silent - waiting.keys())), waiting)


def tell(sightings: Mapping[int, Sighting], silent_after: float) -> str:
    """The verdict in words, one line for each group of ranks that are alike."""
    verdict = judge(sightings, silent_after)
    lines: list[str] = []
    for ranks, text in _alike((rank, _place(sightings[rank])) for rank in verdict.silent):
        age = max(sightings[rank].age for rank in ranks)
        lines.append(f"{_name(ranks, sightings)}: not heard for {age:.0f} s, so stopped, dead or cut off; {text} then")
    for ranks, text in _alike((rank, _place(sightings[rank])) for rank in verdict.absent):
        lines.append(f"{_name(ranks, sightings)}: alive, but did not arrive; {text}")
    for ranks, (missing, text) in _alike(
        (rank, (verdict.waiting[rank], _place(sightings[rank]))) for rank in verdict.waiting
    ):
        lines.append(f"{_name(ranks, sightings)}: waiting for {list_ranks(missing)}; {text}")
    if not lines:
        lines.append("no rank is behind in its collectives: a device, or the network between ranks, hangs, or these:")
    told = {*verdict.silent, *verdict.absent, *verdict.waiting}
    rest = _alike((rank, _place(sightings[rank])) for rank in sightings if rank not in told)
    return "\n".join([*lines, *(f"{_name(ranks, sightings)}: {text}" for ranks, text in rest)])


def _started(sighting: Sighting, group: str) -> int:
    return sighting.said.started.get(group, 0) if sighting.said is not None else 0


def _place(sighting: Sighting) -> str:
    said = sighting.said
    if said is None:
        return "never heard"
    newest = f", last collective {said.last}" if said.last is not None else ""
    return said.place + newest + (f", Python at {' < '.join(said.stack)}" if said.stack else "")


def _name(ranks: list[int], sightings: Mapping[int, Sighting]) -> str:
    hosts = list(dict.fromkeys(said.host for rank in ranks if (said := sightings[rank].said) is not None))
    more = f" and {len(hosts) - _HOSTS_NAMED} more" if len(hosts) > _HOSTS_NAMED else ""
    named = f"{'host' if len(hosts) == 1 else 'hosts'} {', '.join(hosts[:_HOSTS_NAMED])}{more}"
    where = f" ({named})" if hosts else ""
    return f"{list_ranks(ranks)}{where}"


def _alike(items: Iterable[tuple[int, Key]]) -> list[tuple[list[int], Key]]:
    """Ranks with the same key together."""
    groups: dict[Key, list[int]] = {}
    for rank, key in items:
        groups.setdefault(key, []).append(rank)
    return [(ranks, key) for key, ranks in groups.items()]
