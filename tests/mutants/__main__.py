"""All planted bugs by hand: `python -m tests.mutants [--jobs N] [--only WORDS]` prints the table for tests/README.md."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.mutants.plant import SEEDS, Verdict, hunt
from tests.mutants.planted import MUTANTS, Mutant


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", action="append", metavar="WORDS", help="mutants whose name has these words")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the simulation, at most")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if any(words in mutant.name for words in options.only or [""])]

    def one(mutant: Mutant) -> Verdict:
        try:
            verdict = hunt(mutant, seeds=options.seeds)
        except AssertionError as error:  # it could not be planted, or nothing ran
            verdict = Verdict("", 0, str(error), 0.0)
        print(f"{verdict.seconds:6.1f} s, {verdict.seeds} seeds: {mutant.name}: {verdict.how[:150]}", file=sys.stderr, flush=True)
        return verdict

    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = list(pool.map(one, chosen))
    print("| planted bug | in | caught by | seeds |\n| --- | --- | --- | --- |")
    for mutant, verdict in zip(chosen, verdicts, strict=True):
        print(f"| {mutant.name} | `{mutant.module}` | {verdict.caught or '**survived**'} | {verdict.seeds or ''} |")
    survivors = [mutant.name for mutant, verdict in zip(chosen, verdicts, strict=True) if not verdict.caught]
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} caught; survivors: {survivors}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
