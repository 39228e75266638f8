"""One thread pool over tiles: results in order, memory in flight bounded, errors prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from compress.interrupts import deferred
from compress.tiles import Tile

R = TypeVar("R")


def map_tiles(
    work: Callable[[Tile], R], tiles: Iterable[Tile], *, workers: int, memory: int
) -> Iterator[tuple[Tile, R]]:
    """(tile, work(tile)) in the order of `tiles`; one worker is a plain loop.

    At most `workers + 2` tiles are in flight, and only one where their costs pass `memory` bytes.
    """
    if workers == 1:
        for tile in tiles:
            yield tile, work(tile)
        return
    pending: deque[tuple[Tile, Future[R]]] = deque()
    in_flight = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="tile") as pool:
        try:
            for tile in tiles:
                while pending and (len(pending) >= workers + 2 or in_flight + tile.cost > memory):
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
                    in_flight -= oldest.cost
                with deferred():  # a signal while a thread starts would leave it half begun
                    pending.append((tile, pool.submit(work, tile)))
                in_flight += tile.cost
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        finally:
            with deferred():  # a signal would make Python take threads for ended that run on
                pool.shutdown(wait=True, cancel_futures=True)
