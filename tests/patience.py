"""Waiting for what other threads do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

PATIENCE_S = 20.0
"""What takes longer hangs."""


def wait_until(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never comes to that"
        time.sleep(0.001)


def in_thread(call: Callable[[], object]) -> Future[object]:
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
