"""Single-threaded workers: torch.linalg differs in its last bits between thread counts, so parallelism is across items."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_birth = threading.Lock()


def map_single_threaded(function: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """``[function(item) for item in items]`` by ``threads`` workers, in each of which torch uses one thread.

    The results are the same bits for any ``threads``, 1 included: that too is a worker, never the caller's thread.
    Workers record no gradients, keep subnormal numbers and, on CUDA, work in the caller's current stream. The caller's
    ``torch.get_num_threads()`` stays as it is, and so does that of threads born later.

    Raises:
        Exception: that of the first item (in the given order) for which ``function`` raised one.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def work(item: T) -> R:
        with torch.no_grad(), torch.cuda.stream(stream):  # both are per thread; stream None changes nothing
            return function(item)

    return list(_workers(threads, os.getpid()).map(work, items))


@functools.cache
def _workers(threads: int, pid: int) -> ThreadPoolExecutor:
    """Kept between calls: the first use of LAPACK costs a thread 3 ms. A forked child has none of them: hence ``pid``."""
    return ThreadPoolExecutor(threads, thread_name_prefix="para_ext", initializer=_be_single_threaded)


def _be_single_threaded() -> None:
    """Set this new thread's own state; torch.set_num_threads also sets what threads born later start with.

    A thread that lives for this call only puts that default back: the caller's own setting may differ from it.
    """
    with _birth:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()
    torch.set_flush_denormal(False)  # otherwise inherited from the thread that called
