"""Few cases that have every pair of settings: a covering set, built greedily."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Setting = tuple[str, int]
"""A name, and the position of its value."""
Pair = frozenset[Setting]


def pairs_of(chosen: Mapping[str, int]) -> list[Pair]:
    return [frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)]


def wanted_pairs(settings: Mapping[str, Sequence[Any]], legal: Callable[[Mapping[str, Any]], bool]) -> set[Pair]:
    """Every pair of values of two settings that may stand together."""
    found: set[Pair] = set()
    for one, other in itertools.combinations(settings, 2):
        for first, second in itertools.product(range(len(settings[one])), range(len(settings[other]))):
            if legal({one: settings[one][first], other: settings[other][second]}):
                found.add(frozenset({(one, first), (other, second)}))
    return found


def covering(
    settings: Mapping[str, Sequence[Any]], legal: Callable[[Mapping[str, Any]], bool], seed: int, tries: int = 12
) -> list[dict[str, Any]]:
    """Cases in which every legal pair of settings occurs, those with most new pairs first.

    Args:
        settings: The values of each.
        legal: Whether some settings, not all of them perhaps, may stand together. What is illegal must be so by two of them.
        seed: Decides all that is left open.
        tries: Of so many candidates the one with most new pairs is taken.
    """
    draw = random.Random(seed)
    missing = wanted_pairs(settings, legal)
    order = sorted(sorted(pair) for pair in missing)
    draw.shuffle(order)
    cases: list[dict[str, Any]] = []
    while missing:
        first = next(pair for pair in order if frozenset(pair) in missing)
        candidates = [_complete(dict(first), settings, legal, missing, draw) for _ in range(tries)]
        best = max(candidates, key=lambda chosen: sum(pair in missing for pair in pairs_of(chosen)))
        missing.difference_update(pairs_of(best))
        cases.append({name: settings[name][best[name]] for name in settings})
    return cases


def _complete(
    chosen: dict[str, int],
    settings: Mapping[str, Sequence[Any]],
    legal: Callable[[Mapping[str, Any]], bool],
    missing: set[Pair],
    draw: random.Random,
) -> dict[str, int]:
    """Give each other setting, in any order, the value that brings most of what is missing."""
    rest = [name for name in settings if name not in chosen]
    draw.shuffle(rest)
    for name in rest:
        values = list(range(len(settings[name])))
        draw.shuffle(values)
        known = {other: settings[other][value] for other, value in chosen.items()}
        allowed = [value for value in values if legal({**known, name: settings[name][value]})]
        chosen[name] = max(allowed, key=lambda value: sum(frozenset({(name, value), other}) in missing for other in chosen.items()))
    return chosen
