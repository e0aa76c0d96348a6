"""What benches measure of a call and of a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes; its result is dropped."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a running process, 0 when it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
