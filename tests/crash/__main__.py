"""Many seeds by hand.

python -m tests.crash --seeds 0:1000 --jobs 16                  lives of a directory, which crash at every change
python -m tests.crash --level errors --seeds 0:1000 --jobs 16   lives in which every change fails
python -m tests.crash --level store --seeds 0:10000 --jobs 16   the whole store, in the simulated world
python -m tests.crash --level store --replay 1234               the history of one run
"""

from __future__ import annotations

import argparse
import sys

import torch

from tests.crash.cuts import run_cuts
from tests.crash.errors import run_errors
from tests.crash.seeds import ERRORS_EVERY, LEVELS, silence, work_of
from tests.crash.store import run_store, scenario_of
from tests.simulation.seeds import report


def replay(level: str, seed: int) -> int:
    torch.set_num_threads(1)
    with silence():
        if level == "cuts":
            cuts = run_cuts(seed)
            failure, story = cuts.failure, "\n".join(cuts.story)
        elif level == "errors":
            errors = run_errors(seed, every=ERRORS_EVERY)
            failure, story = errors.failure, "\n".join(errors.story)
        else:
            outcome, _ = run_store(seed)
            failure, story = outcome.failure, f"{scenario_of(seed)}\n{outcome.world.story()}"
    print(story)
    print("held" if failure is None else f"FAILED: {failure}")
    return int(failure is not None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--level", choices=LEVELS, default="cuts")
    parser.add_argument("--seeds", metavar="A:B", default="0:100", help="from A to before B")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("--replay", type=int, metavar="SEED")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        return replay(options.level, options.replay)
    return report(options.seeds, options.jobs, stop=options.stop, work=work_of(options.level))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
