"""Work of a few threads at once, for what leaves Python's lock: hashing and copying."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """Return the results of `work`, in the order of `items`.

    An item is drawn only when a thread is free for it: no more than two for each are there at once.

    Raises what `items` or `work` raises, once the threads have ended.
    """
    if threads < 2:
        return [work(item) for item in items]
    free = Semaphore(threads)

    def run(item: Item) -> Result:
        try:
            return work(item)
        finally:
            free.release()

    futures: list[Future[Result]] = []
    with ThreadPoolExecutor(threads) as pool:
        free.acquire()
        for item in items:
            futures.append(pool.submit(run, item))
            del item  # not kept while waiting for the next one
            free.acquire()
    return [future.result() for future in futures]
