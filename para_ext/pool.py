"""Single-threaded workers: torch.linalg's last bits depend on its thread count, so parallelism is across items."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .errors import ParaError

T = TypeVar("T")
R = TypeVar("R")

_birth = threading.Lock()


def map_single_threaded(
    function: Callable[[T], R], items: Iterable[T], threads: int, each: Callable[[T], None] | None = None
) -> list[R]:
    """``[function(item) for item in items]`` by ``threads`` workers, in each of which torch uses one thread.

    The results are the same bits for any ``threads``, 1 included: that too is a worker, never the caller's thread.
    Workers record no gradients, keep subnormal numbers and, on CUDA, work in the caller's current stream. The caller's
    ``torch.get_num_threads()`` stays as it is, and so does that of threads born later. The caller's thread calls
    ``each`` with every item that is done, in order.

    Raises:
        ParaError: so many threads could not be started.
        Exception: that of the first item (in the given order) for which ``function`` raised one.
    """
    items = list(items)
    if not items:
        return []
    import torch

    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def work(item: T) -> R:
        with torch.no_grad(), torch.cuda.stream(stream):  # both are per thread; stream None changes nothing
            return function(item)

    results = []
    workers = _workers(min(threads, os.cpu_count() or 1), os.getpid())
    for item, result in zip(items, workers.map(work, items), strict=True):
        results.append(result)
        if each is not None:
            each(item)
    return results


@functools.cache
def _workers(threads: int, pid: int) -> ThreadPoolExecutor:
    """Kept between calls: its first use of LAPACK costs a thread 3 ms. A forked child has none of them: hence ``pid``.

    All are born here, because torch.set_num_threads in any thread also sets what threads born later start with. Only
    another thread can put that back without touching the caller's own setting, which may differ from it.
    """
    import torch

    workers = ThreadPoolExecutor(threads, thread_name_prefix="para_ext")
    all_born = threading.Barrier(threads)
    with _birth, ThreadPoolExecutor(1) as aside:
        try:
            default = aside.submit(torch.get_num_threads).result()
            list(workers.map(_be_single_threaded, [all_born] * threads))
        except RuntimeError as error:  # the system allows no more; those that were born must not wait for ever
            all_born.abort()
            workers.shutdown()
            raise ParaError(f"{threads} threads could not be started ({error}): ask for fewer") from error
        aside.submit(torch.set_num_threads, default).result()
    return workers


def _be_single_threaded(all_born: threading.Barrier) -> None:
    import torch

    torch.get_num_threads()  # a thread's first call of it would undo an earlier setting
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # otherwise inherited from the thread that called
    all_born.wait()  # so that each worker gets one of these calls
