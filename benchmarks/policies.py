"""How well policies choose: the store's real scheduler on a simulated clock, over recorded and synthetic traces, at many budgets.

    python -m benchmarks.policies                                  # everything, into benchmarks/results
    python -m benchmarks.policies --policy mymodule:MyPolicy       # beside ours
    python -m benchmarks.policies --trace mine.csv                 # on a trace of your own (columns: benchmarks/sources.py)

A budget of 30 % means: RAM holds 30 % of the bytes of all blocks, and the device a quarter of that, but at least three times the largest
lease. The links are those of a laptop (`tierstore.units.LinkRates`).
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import sources
from benchmarks.bounds import Bound, least
from benchmarks.workloads import SYNTHETIC, Workload
from tierstore.catalog import PAGE
from tierstore.errors import OptionError
from tierstore.planner.simulate import LinkModel, Period, simulate
from tierstore.policies import Policy, resolve
from tierstore.residency import Tier
from tierstore.trace import Link
from tierstore.units import LinkRates

RESULTS = Path(__file__).parent / "results"
PARTIAL = "policies-results"
DEFAULT_OUT = f"benchmarks/results, or ./{PARTIAL} for less than everything"
README = Path(__file__).parents[1] / "README.md"
POLICIES = ("lookahead", "static", "lru", "fifo", "clock", "sieve", "s3fifo", "arc")
BUDGETS = (5, 10, 20, 30, 50, 70, 85, 95)
QUICK_BUDGETS = (30, 70)
TABLE_BUDGETS = (10, 30, 50, 70)


def links() -> dict[Link, LinkModel]:
    """A laptop's, with 10 µs for a copy and 100 µs for the drive."""
    rates = LinkRates()
    return {
        Link.H2D: LinkModel(rates.h2d_bytes_per_s, 10_000),
        Link.D2H: LinkModel(rates.d2h_bytes_per_s, 10_000),
        Link.NVME_READ: LinkModel(rates.nvme_read_bytes_per_s, 100_000),
        Link.NVME_WRITE: LinkModel(rates.nvme_write_bytes_per_s, 100_000),
    }


@dataclass(frozen=True)
class Result:
    """One policy on one workload at one budget: means per counted period.

    Attributes:
        ns, bound_ns: Simulated time, and what no policy can go below.
        misses_gpu, misses_ram: Blocks of leases that were not on the device (nor on their way), and of these not in RAM either.
        h2d .. nvme_write: Bytes by link; bound_h2d .. bound_nvme_write: what no policy can go below.
        wall_s: How long the simulation took.
    """

    workload: str
    policy: str
    budget: int
    gpu_bytes: int
    ram_bytes: int
    accesses: float
    ns: float
    bound_ns: float
    misses_gpu: float
    misses_ram: float
    h2d: float
    d2h: float
    nvme_read: float
    nvme_write: float
    bound_h2d: float
    bound_d2h: float
    bound_nvme_read: float
    bound_nvme_write: float
    wall_s: float

    @property
    def over(self) -> float:
        """Simulated time over the bound."""
        return self.ns / self.bound_ns

    @property
    def nvme(self) -> float:
        return self.nvme_read + self.nvme_write

    @property
    def bound_nvme(self) -> float:
        return self.bound_nvme_read + self.bound_nvme_write


def tiers(workload: Workload, budget: int) -> tuple[int, int]:
    """(bytes of the device, bytes of RAM) for a budget in percent."""
    ram = max(workload.nbytes * budget // 100, 3 * workload.largest_lease)
    gpu = max(workload.nbytes * budget // 400, 3 * workload.largest_lease)
    return -(-gpu // PAGE) * PAGE, -(-ram // PAGE) * PAGE


def raised(workload: Workload, budgets: Sequence[int]) -> str:
    """What to say of budgets at which RAM would not hold three of the largest leases; "" where it does."""
    low = [budget for budget in budgets if workload.nbytes * budget // 100 < 3 * workload.largest_lease]
    if not low:
        return ""
    share = 300 * workload.largest_lease / workload.nbytes
    which = ", ".join(f"{budget} %" for budget in low)
    return f"{workload.name}: RAM for three of the largest leases is {share:.0f} % of all blocks, and taken instead of {which}"


def make_policy(name: str) -> Policy:
    """A policy by name, or by `module:name` of a class or of a function that makes one."""
    module, colon, attribute = name.partition(":")
    if not colon:
        return resolve(name)
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    finally:
        sys.path.pop(0)
    return resolve(found if isinstance(found, type) else found())


def label(name: str) -> str:
    return name.rpartition(":")[2]


def measure(workload: Workload, policy: str, budget: int) -> Result:
    """Simulate all periods, and average those that count."""
    gpu_bytes, ram_bytes = tiers(workload, budget)
    steps, marks = [], []
    for period in workload.periods:
        steps += period
        marks.append(len(steps))
    start_s = time.perf_counter()
    outcome = simulate(
        steps,
        workload.blocks,
        gpu_bytes=gpu_bytes,
        ram_bytes=ram_bytes,
        policy=make_policy(policy),
        links=links(),
        frozen=workload.frozen,
        marks=marks[:-1],
    )
    wall_s = time.perf_counter() - start_s
    bound = bound_of(workload, gpu_bytes, ram_bytes)
    return _result(workload, policy, budget, (gpu_bytes, ram_bytes), outcome.periods[workload.warm :], bound, wall_s)


def bound_of(workload: Workload, gpu_bytes: int, ram_bytes: int) -> Bound:
    sizes = {"gpu_bytes": gpu_bytes, "ram_bytes": ram_bytes}
    return least(workload.counted, workload.blocks, **sizes, links=links(), repeats=workload.repeats)


def _result(
    workload: Workload, policy: str, budget: int, memory: tuple[int, int], periods: Sequence[Period], bound: Bound, wall_s: float
) -> Result:
    def mean(value: Callable[[Period], float]) -> float:
        return sum(value(period) for period in periods) / len(periods)

    crossed = {link.value: mean(lambda period, link=link: period.on(link).bytes) for link in Link}
    return Result(
        workload=workload.name,
        policy=label(policy),
        budget=budget,
        gpu_bytes=memory[0],
        ram_bytes=memory[1],
        accesses=mean(lambda period: period.accesses),
        ns=mean(lambda period: period.ns),
        bound_ns=bound.ns,
        misses_gpu=mean(lambda period: period.misses[Tier.GPU]),
        misses_ram=mean(lambda period: period.misses[Tier.RAM]),
        **crossed,
        **{f"bound_{link.value}": bound.bytes[link] for link in Link},
        wall_s=wall_s,
    )


# -- all of them ----------------------------------------------------------------------------------------------------------


_WORKLOADS: dict[str, Workload] = {}


def _start(workloads: dict[str, Workload]) -> None:
    _WORKLOADS.update(workloads)


def _measure(task: tuple[str, str, int]) -> Result:
    workload, policy, budget = task
    return measure(_WORKLOADS[workload], policy, budget)


def measure_all(workloads: Sequence[Workload], policies: Sequence[str], budgets: Sequence[int], jobs: int) -> Iterator[Result]:
    """Every policy on every workload at every budget, in that order of workloads."""
    known = {workload.name: workload for workload in workloads}
    tasks = [(workload, policy, budget) for workload in known for budget in budgets for policy in policies]
    if jobs == 1:
        _start(known)
        yield from map(_measure, tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start, initargs=(known,)) as pool:
        yield from pool.map(_measure, tasks)


# -- what comes out -------------------------------------------------------------------------------------------------------


def write_csv(results: Sequence[Result], path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = [field.name for field in dataclasses.fields(Result) if field.name != "wall_s"]
        writer.writerow([*fields, "over_bound"])
        for result in results:
            values = [getattr(result, name) for name in fields]
            writer.writerow([*(round(value) if isinstance(value, float) else value for value in values), f"{result.over:.3f}"])


def write_json(results: Sequence[Result], real: Sequence[dict[str, Any]], path: Path, *, arguments: dict[str, Any]) -> None:
    from tierstore.hardware import machine_facts  # noqa: PLC0415  # it imports torch, which simulating does not need

    rates = {link.value: {"bytes_per_s": model.bytes_per_s, "latency_ns": model.latency_ns} for link, model in links().items()}
    content = {
        "machine": machine_facts(),
        "arguments": arguments,
        "links": rates,
        "results": [dataclasses.asdict(result) for result in results],
        "real": list(real),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(results: Sequence[Result], workloads: Sequence[Workload], policies: Sequence[str], budgets: Sequence[int]) -> Table:
    """Time over the bound: one row per workload and budget, one column per policy; the best of a row is bold."""
    found = Table(title="Simulated time of a period, as a multiple of what no policy can go below", title_justify="left")
    found.add_column("workload")
    found.add_column("budget", justify="right")
    found.add_column("bound", justify="right")
    for policy in policies:
        found.add_column(label(policy), justify="right")
    by_key = {(result.workload, result.policy, result.budget): result for result in results}
    for workload in workloads:
        for place, budget in enumerate(budgets):
            row = [by_key[workload.name, label(policy), budget] for policy in policies]
            best = min(result.ns for result in row)
            cells = [f"[bold]{result.over:.2f}[/]" if result.ns <= 1.005 * best else f"{result.over:.2f}" for result in row]
            title = workload.title if place == 0 else ""
            found.add_row(title, f"{budget} %", _seconds(row[0].bound_ns), *cells, end_section=place == len(budgets) - 1)
    return found


def traffic_table(results: Sequence[Result], workloads: Sequence[Workload], policies: Sequence[str], budget: int) -> Table:
    """Misses, and bytes by link, at one budget."""
    found = Table(title=f"Misses and bytes a period at a budget of {budget} %", title_justify="left")
    for name in ("workload", "policy"):
        found.add_column(name)
    for name in ("device misses", "RAM misses", "h2d", "d2h", "NVMe read", "NVMe write", "time"):
        found.add_column(name, justify="right")
    for workload in workloads:
        rows = [result for result in results if result.workload == workload.name and result.budget == budget]
        first = rows[0]
        bounds = (first.bound_h2d, first.bound_d2h, first.bound_nvme_read, first.bound_nvme_write)
        found.add_row(workload.title, "[italic]least", "", "", *(f"[italic]{_giga(value)}" for value in bounds), _seconds(first.bound_ns))
        for place, result in enumerate(rows):
            crossed = (result.h2d, result.d2h, result.nvme_read, result.nvme_write)
            misses = (f"{result.misses_gpu:.0f}", f"{result.misses_ram:.0f}")
            last = place == len(rows) - 1
            found.add_row("", result.policy, *misses, *(_giga(value) for value in crossed), _seconds(result.ns), end_section=last)
    return found


README_BUDGET = 30
BEGIN, END = "<!-- benchmarks/policies.py writes from here -->", "<!-- to here -->"


def markdown(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """The README's table, from the rows of the CSV: GB over the drive's link, and time as a multiple of the bound."""
    at = {(row["workload"], row["policy"]): row for row in rows if int(row["budget"]) == README_BUDGET}
    names = list(dict.fromkeys(policy for _, policy in at))
    lines = [f"| | least | {' | '.join(names)} |", f"| --- |{' ---: |' * (len(names) + 1)}"]
    for workload, title in titles.items():
        first = at[workload, names[0]]
        cells = [
            _drive(first, "bound_"),
            *(f"{_drive(at[workload, name])}, {float(at[workload, name]['over_bound']):.2f}" for name in names),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _drive(row: Mapping[str, Any], prefix: str = "") -> str:
    nbytes = float(row[f"{prefix}nvme_read"]) + float(row[f"{prefix}nvme_write"])
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


def write_readme(path: Path, text: str) -> None:
    """Put the table where the README keeps it."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def _seconds(ns: float) -> str:
    return f"{ns / 1e9:.2f} s" if ns >= 1e9 else f"{ns / 1e6:.1f} ms"


def _giga(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.2f} MB"


# -- the command ----------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--policy", "extra", multiple=True, metavar="MODULE:NAME", help="A policy of your own, beside ours. Repeatable.")
@click.option("--only", metavar="NAMES", help="Ours to compare, separated by commas.  [default: all]")
@click.option("--workload", "wanted", metavar="NAMES", help="Workloads, separated by commas.  [default: all, or none with --trace]")
@click.option(
    "--trace",
    "traces",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A trace, CSV or saved by a store.",
)
@click.option("--budgets", metavar="PERCENTS", help=f"Budgets in percent.  [default: {','.join(map(str, BUDGETS))}]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help=f"Where results are written.  [default: {DEFAULT_OUT}]")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Processes.")
@click.option("--quick", is_flag=True, help="Small workloads, two budgets: to see that it works.")
@click.option("--real/--no-real", default=True, help="Confirm three points by runs of a real store.")
@click.option("--record-demo", is_flag=True, help="First record the demo's trace anew.")
def main(
    extra: tuple[str, ...],
    only: str | None,
    wanted: str | None,
    traces: tuple[Path, ...],
    budgets: str | None,
    out: Path | None,
    jobs: int,
    quick: bool,
    real: bool,
    record_demo: bool,
) -> None:
    """Compare policies on traces of training and inference."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    policies = (*(only.split(",") if only else POLICIES), *extra)
    if record_demo:
        with tempfile.TemporaryDirectory() as directory:
            sources.save(sources.DEMO, sources.record_demo(Path(directory), say=console.print))
    try:
        workloads = [*_named(wanted, quick, bool(traces)), *(sources.load(path) for path in traces)]
        for name in policies:
            make_policy(name)
    except (sources.TraceError, OptionError, ImportError, AttributeError) as error:
        raise click.ClickException(str(error)) from error
    percents = tuple(int(text) for text in budgets.split(",")) if budgets else QUICK_BUDGETS if quick else BUDGETS
    whole = not (extra or only or wanted or traces or quick or budgets)
    if out is None:
        out = RESULTS if whole else Path(PARTIAL)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    with console.status("simulating"):
        for result in measure_all(workloads, policies, percents, jobs):
            results.append(result)
            if len(results) % (len(policies) * len(percents)) == 0:
                console.print(f"{result.workload}: {len(policies)} policies at {len(percents)} budgets")
    for workload in workloads:
        if floor := raised(workload, percents):
            console.print(floor, soft_wrap=True)
    shown = [budget for budget in TABLE_BUDGETS if budget in percents] or list(percents)
    console.print(table(results, workloads, policies, shown))
    console.print(traffic_table(results, workloads, policies, shown[len(shown) // 2] if len(shown) != 4 else shown[1]))
    confirmed = _confirm(console, quick) if real else []
    write_csv(results, out / "policies.csv")
    write_json(results, confirmed, out / "policies.json", arguments={"policies": policies, "budgets": percents, "quick": quick})
    _draw(console, results, workloads, policies, percents, out)
    if out == RESULTS and whole:
        update_readme(workloads)


def update_readme(workloads: Sequence[Workload]) -> None:
    """From the CSV in `RESULTS`."""
    with open(RESULTS / "policies.csv", encoding="utf-8", newline="") as file:
        write_readme(README, markdown(list(csv.DictReader(file)), {workload.name: workload.title for workload in workloads}))


def _named(wanted: str | None, quick: bool, have_traces: bool) -> list[Workload]:
    if wanted is None and have_traces:
        return []
    names = wanted.split(",") if wanted else [*SYNTHETIC, "demo"]
    unknown = sorted(set(names) - {*SYNTHETIC, "demo"})
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join((*SYNTHETIC, 'demo'))}", param_hint="--workload")
    return [
        dataclasses.replace(sources.load(sources.DEMO), title="demo, recorded") if name == "demo" else SYNTHETIC[name](quick)
        for name in names
    ]


def _confirm(console: Console, quick: bool) -> list[dict[str, Any]]:
    from benchmarks import real  # noqa: PLC0415  # it imports torch

    found = real.confirm(quick)
    console.print(real.table(found))
    return [dataclasses.asdict(point) for point in found]


def _draw(
    console: Console, results: Sequence[Result], workloads: Sequence[Workload], policies: Sequence[str], percents: Sequence[int], out: Path
) -> None:
    try:
        from benchmarks import plots  # noqa: PLC0415  # matplotlib is an extra
    except ImportError:
        console.print('No plots: they need matplotlib (pip install ".[demo]").')
        return
    names = [label(policy) for policy in policies]
    written = plots.draw(results, workloads, names, percents, out)
    console.print(f"Written: policies.csv, policies.json, {', '.join(path.name for path in written)} in {out}", soft_wrap=True)


if __name__ == "__main__":
    main()
