"""Many seeds by hand.

python -m tests.simulation --seeds 0:100000 --jobs 16
python -m tests.simulation --replay 1234          the history of one run
python -m tests.simulation --shrink 1234          the smallest run that fails as it does, as a test to paste
"""

from __future__ import annotations

import argparse
import sys

import torch

from tests.simulation.run import run
from tests.simulation.scenario import draw
from tests.simulation.seeds import report
from tests.simulation.shrink import Case, as_test, shrink


def replay(seed: int, last: int | None) -> int:
    scenario = draw(seed)
    outcome = run(scenario, seed)
    print(scenario)
    print(outcome.world.story(last))
    print(f"seed {seed}: {outcome.world.steps} steps, {outcome.world.decisions.count} decisions, digest {outcome.digest}")
    print("held" if outcome.failure is None else f"FAILED: {outcome.failure}")
    return int(outcome.failure is not None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", metavar="A:B", default="0:1000", help="from A to before B")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("--replay", type=int, metavar="SEED")
    parser.add_argument("--last", type=int, metavar="N", help="with --replay: only the last lines of the history")
    parser.add_argument("--shrink", type=int, metavar="SEED")
    parser.add_argument("--seconds", type=float, default=120, help="with --shrink: how long to try")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        return replay(options.replay, options.last)
    if options.shrink is not None:
        torch.set_num_threads(1)
        case, message = shrink(Case(draw(options.shrink), options.shrink), seconds=options.seconds)
        print(as_test(case, message))
        print(message)
        return 1
    return report(options.seeds, options.jobs, stop=options.stop)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
