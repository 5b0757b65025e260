"""Training on a GPU, streamed and resident, bit for bit: a sample of the matrix, many compactions, and all of it under load.

Copies, moves and kernels of a GPU run in the order that events give them, and a missing event shows only where they are late: so some
cases run while another thread keeps the GPU busy with matrix products, and other processes the CPU.

TIERSTORE_CASES says how many cases of the matrix run, and TIERSTORE_REPEATS how often each of those under load.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.deterministic import deterministic
from tests.training.harness import Case, Outcome, assert_same, assert_streamed, run_resident, run_streamed
from tests.training.test_exact import BASE, OPTIONS, cases

pytestmark = [
    pytest.mark.cuda,
    # In 16 bits torch itself does not lay the weights of recurrent modules together, and says so: resident ones likewise.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
    # Of whichever thread of autograd comes by cuBLAS first.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

CASES = int(os.environ.get("TIERSTORE_CASES") or 24)
REPEATS = int(os.environ.get("TIERSTORE_REPEATS") or 3)


@pytest.fixture(autouse=True)
def same_bits() -> Iterator[None]:
    with deterministic():
        yield


@contextlib.contextmanager
def load() -> Iterator[None]:
    """Keep the GPU and every core busy."""
    stop = threading.Event()

    def multiply() -> None:
        a = torch.randn(2048, 2048, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            while not stop.is_set():
                for _ in range(8):
                    torch.mm(a, a)
                stream.synchronize()

    thread = threading.Thread(target=multiply, name="load")
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for process in spinning:
            process.kill()
            process.wait()


def compare(case: Case, directory: Path, resident: Outcome | None = None) -> Outcome:
    streamed = run_streamed(case, directory)
    assert_same(streamed, run_resident(case) if resident is None else resident)
    assert_streamed(streamed)
    return streamed


def on_cuda(case: Case) -> Case:
    """The case there, where torch has no fused Adagrad."""
    options = {**case.options, "fused": False} if case.optimizer == "Adagrad" and "fused" in case.options else case.options
    return replace(case, device="cuda", options=options)


SAMPLE = [pytest.param(on_cuda(case), id=name) for name, case in cases(BASE, CASES)]

# Blocks of uneven sizes in little room: many are moved to make one free piece out of several.
UNEVEN = [
    Case(
        "uneven", optimizer, OPTIONS[optimizer][variant], share=share, precision=precision, when=when, policy=policy, steps=6, device="cuda"
    )
    for optimizer, variant, share, precision, when, policy in [
        ("AdamW", 0, 0.0, "fp32", "deferred", "lookahead"),
        ("AdamW", 0, 0.25, "master", "step", "lru"),
        ("Adam", 0, 0.3, "fp32", "backward", "lru"),
        ("RMSprop", 0, 0.0, "bf16", "deferred", "sieve"),
        ("SGD", 2, 0.2, "fp32", "deferred", "static"),
        ("Adadelta", 0, 0.35, "master", "deferred", "lookahead"),
    ]
]


def name_of(case: Case) -> str:
    return f"{case.model}-{case.optimizer}-{case.share}-{case.precision}-{case.when}-{case.policy}"


@pytest.mark.parametrize("case", SAMPLE)
def test_a_sample_of_the_matrix(case: Case, tmp_path: Path) -> None:
    compare(case, tmp_path)


@pytest.mark.parametrize("case", UNEVEN, ids=name_of)
def test_many_compactions(case: Case, tmp_path: Path) -> None:
    stats = compare(case, tmp_path).stats
    assert stats is not None
    assert stats.compactions > 10


@pytest.mark.parametrize("case", [*UNEVEN, *(param.values[0] for param in SAMPLE[:6])], ids=name_of)
def test_under_load(case: Case, tmp_path: Path) -> None:
    """Found a block moved by a compaction whose old place a fresh lease filled before the move had read it."""
    resident = run_resident(case)
    with load():
        for number in range(REPEATS):
            compare(case, tmp_path / str(number), resident)
