"""What the benchmark of policies rests on: its bounds against other code, its traces, its command."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.catalog import PAGE
from tierstore.planner.simulate import LinkModel, Step, simulate
from tierstore.policies import available
from tierstore.residency import Tier
from tierstore.trace import Link, Trace

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks import policies, sources  # noqa: E402 - the path is set only now
from benchmarks.bounds import dropped, least  # noqa: E402
from benchmarks.workloads import SYNTHETIC, Workload  # noqa: E402

LINKS = dict.fromkeys(Link, LinkModel(1e9))
TRACES = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=14)


def fewest(trace: list[int], room: int) -> int:
    """Loads of the best replacement, by trying everything: any set of what was there with what is used now may be kept."""
    kept = {frozenset(first): 0 for first in itertools.combinations(sorted(set(trace)), min(room, len(set(trace))))}
    for block in trace:
        after: dict[frozenset[int], int] = {}
        for inside, loads in kept.items():
            have = inside | {block}
            paid = loads + (block not in inside)
            for keep in [have] if len(have) <= room else [have - {gone} for gone in have if gone != block]:
                after[keep] = min(paid, after.get(keep, paid))
        kept = after
    return min(kept.values())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 5))
def test_for_equal_blocks_the_bound_on_loads_is_reached(trace: list[int], room: int) -> None:
    steps = [Step((str(block),)) for block in trace]
    assert dropped(steps, {str(block): 3 for block in range(6)}, 3 * room, writes=False) == 3 * fewest(trace, room)


@settings(max_examples=25)
@given(TRACES, st.lists(st.integers(1, 4), min_size=6, max_size=6), st.integers(4, 9), st.integers(4, 14), st.data())
def test_no_policy_goes_below_the_bound(trace: list[tuple[int, bool]], sizes: list[int], gpu: int, ram: int, data: st.DataObject) -> None:
    """Whatever is counted from the first step on, with mixed sizes and writes."""
    blocks = {str(number): size * PAGE for number, size in enumerate(sizes)}
    steps = [Step((str(number),), frozenset([str(number)] if write else []), 1000) for number, write in trace] * 3
    policy = data.draw(st.sampled_from(available()))
    memory = {"gpu_bytes": gpu * PAGE, "ram_bytes": ram * PAGE}
    bound = least([steps], blocks, **memory, links=LINKS, repeats=False)
    total = simulate(steps, blocks, **memory, policy=policy, links=LINKS).total
    for link in Link:
        assert total.on(link).bytes >= bound.bytes[link], link
    assert total.ns >= bound.ns


@pytest.mark.parametrize("name", sorted(SYNTHETIC))
def test_workloads_are_what_they_say(name: str) -> None:
    workload = SYNTHETIC[name](True)
    steps = [step for period in workload.periods for step in period]
    assert {block for step in steps for block in step.blocks} == set(workload.blocks)
    assert not any(step.writes & set(workload.frozen) for step in steps)
    assert 0 < workload.warm < len(workload.periods)
    assert workload.repeats == (len(set(workload.periods)) == 1)


def test_a_workload_survives_its_file(tmp_path: Path) -> None:
    workload = SYNTHETIC["lora"](True)
    sources.save(tmp_path / "lora.csv", workload)
    read = sources.load(tmp_path / "lora.csv")
    assert (read.blocks, read.periods, read.repeats) == (workload.blocks, workload.periods, True)


def test_a_trace_that_a_store_saved_is_read(tmp_path: Path) -> None:
    trace = Trace()
    for block, write in (("a", False), ("b", True), ("a", False)):
        trace.append(block, write, Tier.RAM)
    trace.save(tmp_path / "run.jsonl")
    read = sources.load(tmp_path / "run.jsonl")
    assert read.periods == ((Step(("a",)), Step(("b",), frozenset("b")), Step(("a",))),)
    assert set(read.blocks.values()) == {sources.DEFAULT_BYTES}
    (tmp_path / "run.csv").write_text("block,nbytes\na,4096\nb,8192\n")
    assert sources.load(tmp_path / "run.jsonl").blocks == {"a": 4096, "b": 8192}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "", "block"),
        ("a.csv", "block,nbytes\n", "no accesses"),
        ("a.csv", "block\nx\n", "how large block 'x' is"),
        ("a.csv", "block,nbytes\nx,many\n", "'many'"),
        ("a.jsonl", "not json\n", "neither CSV"),
    ],
)
def test_what_is_no_trace_is_refused_in_words(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(sources.TraceError, match=says):
        sources.load(tmp_path / name)


def test_the_recorded_demo_is_there_and_repeats() -> None:
    demo: Workload = sources.load(sources.DEMO)
    assert demo.repeats
    assert len(demo.periods) >= 4
    assert {name.rpartition("/")[0] for name in demo.blocks} == {"", "gradients", "optimizer"}


MINE = """
from tierstore.policies import Lru

class Mine(Lru):
    pass
"""


def test_the_command_compares_policies_and_one_s_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    sources.save(tmp_path / "short.csv", SYNTHETIC["inference"](True))
    arguments = ["--quick", "--no-real", "--jobs", "1", "--only", "lookahead,lru", "--policy", "mine:Mine", "--trace", "short.csv"]
    command = [sys.executable, "-m", "benchmarks.policies", *arguments, "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "Mine" in done.stdout
    with open(tmp_path / "out" / "policies.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["policy"] for row in rows} == {"lookahead", "lru", "Mine"}
    by_policy = {name: [row | {"policy": ""} for row in rows if row["policy"] == name] for name in ("lru", "Mine")}
    assert by_policy["lru"] == by_policy["Mine"], "the same policy by another name"
    assert all(float(row["over_bound"]) >= 0.98 for row in rows)
    facts = json.loads((tmp_path / "out" / "policies.json").read_text())
    assert facts["machine"]["python"]
    assert len(facts["results"]) == len(rows)
    assert (tmp_path / "out" / "policies-bytes.png").stat().st_size > 10_000


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_policy_that_is_not_there_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.policies", "--policy", "nowhere:Nobody"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_budgets_are_shares() -> None:
    workload = SYNTHETIC["full"](False)
    gpu_bytes, ram_bytes = policies.tiers(workload, 80)
    assert ram_bytes == pytest.approx(0.8 * workload.nbytes, rel=0.01)
    assert gpu_bytes == pytest.approx(0.2 * workload.nbytes, rel=0.01)


def test_the_readme_shows_what_was_measured() -> None:
    with open(policies.RESULTS / "policies.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shown = (ROOT / "README.md").read_text(encoding="utf-8").partition(policies.BEGIN)[2].partition(policies.END)[0].strip()
    titles = {name: SYNTHETIC[name](True).title for name in SYNTHETIC} | {"demo": "demo, recorded"}
    assert shown == policies.markdown(rows, titles)
    assert shown.count("\n") == len(titles) + 1


def test_the_readme_s_table_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{policies.BEGIN}\nold\n{policies.END}\nafter\n", encoding="utf-8")
    policies.write_readme(path, "new")
    assert path.read_text(encoding="utf-8") == f"before\n{policies.BEGIN}\nnew\n{policies.END}\nafter\n"
