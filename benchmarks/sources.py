"""Sequences of leases from files: CSV, or a store's saved trace; and the recording of the demo.

CSV, one row per block of a lease, in order, with a header line:

| column | meaning |
| --- | --- |
| `block` | the block's name |
| `nbytes` | its payload bytes; needed in one row of each block |
| `write` | 1 if the lease writes it (default 0) |
| `lease` | rows that follow one another with the same value are one lease (default: each row its own) |
| `compute_ns` | computing under the lease, in nanoseconds; the rows of a lease add up (default 0) |
| `period` | a new value begins a new period; the first half of the periods warms up and is not counted (default: one, all counted) |

A trace that `store.trace.save` wrote has neither sizes nor leases nor times: every access is a lease of its own and takes no time, and
sizes come from a CSV with the columns `block` and `nbytes` beside it, or are all 64 MiB. Its name must not end in `.csv`.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload, pages
from tierstore import TierStore
from tierstore.planner.simulate import Step
from tierstore.trace import Trace

DEFAULT_BYTES = 64 << 20
DEMO = Path(__file__).parent / "traces" / "demo.csv"


class TraceError(ValueError):
    """A file is no trace; the message says where and why."""


def load(path: Path) -> Workload:
    """Read a trace by its kind: CSV, or JSON lines.

    Raises:
        TraceError: It is neither, or something is missing.
    """
    rows = list(_csv_rows(path)) if path.suffix == ".csv" else list(_trace_rows(path))
    if not rows:
        raise TraceError(f"{path} holds no accesses")
    blocks: dict[str, int] = {}
    for row in rows:
        if row.get("nbytes"):
            blocks[row["block"]] = pages(_number(row, "nbytes", path))
    missing = next((row["block"] for row in rows if row["block"] not in blocks), None)
    if missing is not None:
        raise TraceError(f"{path} does not say how large block {missing!r} is: give nbytes in one of its rows")
    periods = _cut(rows, path)
    warm = len(periods) // 2
    return Workload(path.stem, path.stem, f"from {path.name}", blocks, periods, warm, repeats=_alike(periods[warm:]))


def _number(row: dict[str, str], column: str, path: Path) -> int:
    text = row.get(column) or "0"
    try:
        value = int(float(text))
    except ValueError:
        value = -1
    if value < 0:
        raise TraceError(f"{path}: {column} of block {row['block']!r} is {text!r}, which is no number")
    return value


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if "block" not in (reader.fieldnames or ()):
            raise TraceError(f"{path} has no column 'block': its first line must name the columns (a trace saved by a store is no CSV)")
        yield from reader


def _trace_rows(path: Path) -> Iterator[dict[str, str]]:
    beside = path.with_suffix(".csv")
    sizes = {row["block"]: row["nbytes"] for row in _csv_rows(beside)} if beside.exists() else {}
    try:
        accesses = list(Trace.load(path))
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path} is neither CSV (*.csv) nor a saved trace: {error!r}") from error
    for access in accesses:
        yield {"block": access.block, "write": str(int(access.write)), "nbytes": sizes.get(access.block, str(DEFAULT_BYTES))}


def _cut(rows: Sequence[dict[str, str]], path: Path) -> tuple[tuple[Step, ...], ...]:
    """Rows to leases, leases to periods."""
    periods: list[list[Step]] = []
    before: tuple[str | None, str | None] = (None, None)
    for row in rows:
        key = (row.get("period"), row.get("lease"))
        write = frozenset([row["block"]] if _number(row, "write", path) else [])
        compute_ns = _number(row, "compute_ns", path)
        if not periods or key[0] != before[0]:
            periods.append([])
        if periods[-1] and key == before and key[1]:
            last = periods[-1].pop()
            blocks = tuple(dict.fromkeys((*last.blocks, row["block"])))
            periods[-1].append(Step(blocks, last.writes | write, last.compute_ns + compute_ns))
        else:
            periods[-1].append(Step((row["block"],), write, compute_ns))
        before = key
    return tuple(tuple(period) for period in periods)


def _alike(periods: Sequence[Sequence[Step]]) -> bool:
    """Whether periods have the same leases; times may differ."""
    return len(periods) > 1 and all(
        [(step.blocks, step.writes) for step in period] == [(step.blocks, step.writes) for step in periods[0]] for period in periods
    )


def save(path: Path, workload: Workload) -> None:
    """Write a workload as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["period", "lease", "block", "nbytes", "write", "compute_ns"])
        number = 0
        for index, period in enumerate(workload.periods):
            for step in period:
                for place, name in enumerate(step.blocks):
                    compute_ns = step.compute_ns if place == 0 else 0
                    writer.writerow([index, number, name, workload.blocks[name], int(name in step.writes), compute_ns])
                number += 1


class Recorder:
    """Stands in for a store, and notes leases and how long the work under each takes."""

    def __init__(self, store: TierStore) -> None:
        self._store = store
        self.steps: list[Step] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    @contextmanager
    def use(self, *names: str, write: bool | Sequence[str] = False) -> Iterator[Any]:
        writes = frozenset(names if write is True else write or ())
        with self._store.use(*names, write=write) as tensors:
            start_ns = time.perf_counter_ns()
            yield tensors
            self.steps.append(Step(names, writes, time.perf_counter_ns() - start_ns))


def _steadied(periods: Sequence[Sequence[Step]]) -> Iterator[tuple[Step, ...]]:
    """The same leases, each with the least time that it took in any period: what disturbs a measurement only adds to it."""
    least_ns = [min(step.compute_ns for step in steps) for steps in zip(*periods, strict=True)]
    for period in periods:
        yield tuple(Step(step.blocks, step.writes, compute_ns) for step, compute_ns in zip(period, least_ns, strict=True))


def record_demo(directory: Path, *, steps: int = 15, evaluate_every: int = 3, say: Callable[[str], None] = print) -> Workload:
    """Train the demo's model for some steps with its own loop, an evaluation after every few, and note what it leases."""
    from tierstore.demo import corpus, model, run, train  # noqa: PLC0415  # torch's training side is needed only here
    from tierstore.demo.audit import Audit  # noqa: PLC0415

    config, text = run.DEFAULTS, corpus.load()
    periods = []
    with model.deterministic(config), TierStore(run.GPU, run.RAM, directory / "swap", device="cpu") as store:
        train.initialise(store, config)
        recorder = Recorder(store)
        trainer = train.Trainer(recorder, config, Audit())  # type: ignore[arg-type]
        order = corpus.training_order(text, config.context, config.seed)
        held_out = corpus.held_out_batches(text, 2 * config.batch, config.batch, config.context)
        for index in range(steps):
            batch = corpus.training_batch(text, order, index * config.batch, config.batch, config.context)
            loss = trainer.step(index, *batch)
            say(f"demo step {index}: loss {loss:.3f}, {len(recorder.steps)} leases")
            if index % evaluate_every == evaluate_every - 1:
                trainer.evaluate(held_out)
                periods.append(tuple(recorder.steps))
                recorder.steps = []
        blocks = {name: store.info(name).nbytes for name in store}
    sizes = {name: pages(nbytes) for name, nbytes in blocks.items()}
    periods = list(_steadied(periods))
    what = f"recorded from `tierstore demo`: {evaluate_every} steps and an evaluation a period"
    return Workload("demo", "demo, recorded", what, sizes, tuple(periods), len(periods) // 2, repeats=_alike(periods))
