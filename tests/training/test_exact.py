"""Streamed equals resident, bit for bit: every pair of settings, and an error for every pair that cannot be.

TIERSTORE_CASES=600 runs so many, with the seeds that follow; see tests/README.md for how the seeds rotate.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.covering import covering, pairs_of, wanted_pairs
from tests.training.harness import Case, Options, compare, run_streamed
from tests.training.models import MODELS
from tierstore.errors import OptionError, TierstoreError, TrainingError
from tierstore.training.rules import KNOWN

BASE = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0)
CASES = int(os.environ.get("TIERSTORE_CASES") or 60)

REFUSED = ("LBFGS", "SparseAdam")

OPTIONS: Mapping[str, tuple[Options, ...]] = {
    "ASGD": ({"lr": 0.05, "lambd": 0.1, "t0": 2.0}, {"lr": 0.02, "weight_decay": 0.1, "foreach": True}, {"lr": 0.01, "maximize": True}),
    "Adadelta": ({"lr": 0.5}, {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1, "foreach": True}, {"lr": 0.1, "maximize": True}),
    "Adafactor": ({"lr": 0.02}, {"lr": 0.02, "weight_decay": 0.1, "foreach": True}, {"lr": 0.01, "maximize": True, "d": 2.0}),
    "Adagrad": (
        {"lr": 0.05, "initial_accumulator_value": 0.3, "lr_decay": 0.1},
        {"lr": 0.05, "foreach": True, "weight_decay": 0.1},
        {"lr": 0.05, "fused": True},
    ),
    "Adam": (
        {"lr": 0.01, "amsgrad": True},
        {"lr": 0.01, "foreach": True, "weight_decay": 0.1},
        {"lr": 0.01, "fused": True},
        {"lr": torch.tensor(0.01)},
    ),
    "AdamW": ({"lr": 0.01}, {"lr": 0.01, "fused": True, "amsgrad": True}, {"lr": 0.01, "foreach": True, "maximize": True}),
    "Adamax": ({"lr": 0.02}, {"lr": 0.02, "weight_decay": 0.1, "foreach": True}, {"lr": 0.01, "maximize": True}),
    "Muon": ({"lr": 0.02}, {"lr": 0.02, "nesterov": False, "weight_decay": 0.3, "ns_steps": 2}, {"lr": 0.02, "momentum": 0.5}),
    "NAdam": (
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "foreach": True},
        {"lr": 0.01, "maximize": True},
    ),
    # RAdam rectifies once 2 / (1 - beta2) - 1 > 5, which takes a small one to happen within few steps.
    "RAdam": ({"lr": 0.01, "betas": (0.5, 0.3)}, {"lr": 0.01, "weight_decay": 0.1, "foreach": True}, {"lr": 0.01, "maximize": True}),
    "RMSprop": (
        {"lr": 0.005, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
        {"lr": 0.005, "foreach": True},
        {"lr": 0.005, "momentum": 0.5, "maximize": True},
    ),
    "Rprop": ({"lr": 0.01}, {"lr": 0.01, "etas": (0.3, 1.7), "step_sizes": (1e-3, 0.1), "foreach": True}, {"lr": 0.01, "maximize": True}),
    "SGD": (
        {"lr": 0.1},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "fused": True},
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "foreach": True},
        {"lr": 0.02, "momentum": 0.9, "maximize": True},
    ),
}

SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "optimizer": tuple(OPTIONS),
    "variant": (0, 1, 2, 3),
    "groups": ("one", "two", "optimizers"),
    "schedule": (None, "lambda", "cycle"),
    "when": ("step", "deferred", "backward"),
    "accumulation": (1, 3, 4),
    "clip": (None, "global", "layer"),
    "micro_batch": (None, 1, 3),
    "policy": ("lru", "lookahead", "static", "sieve", "arc"),
    "share": (0.5, 0.35, 0.0),
    "ram": (0.2, 0.35),
    "precision": ("fp32", "bf16", "master", "autocast"),
    "activations": ("device", "ram", "nvme"),
    "model": tuple(MODELS),
}

ILLEGAL: Mapping[str, tuple[Mapping[str, Any], type[TierstoreError], str]] = {
    "backward-global": ({"when": "backward", "clip": "global"}, OptionError, "before any norm"),
    "backward-layer": ({"when": "backward", "clip": "layer"}, OptionError, "before any norm"),
    "backward-3": ({"when": "backward", "accumulation": 3}, TrainingError, "second backward pass before step"),
    "backward-4": ({"when": "backward", "accumulation": 4}, TrainingError, "second backward pass before step"),
    "vision-1": ({"model": "vision", "micro_batch": 1}, TrainingError, "statistics over the batch"),
    "vision-3": ({"model": "vision", "micro_batch": 3}, TrainingError, "statistics over the batch"),
    "recurrent-1": ({"model": "recurrent", "micro_batch": 1}, TrainingError, "rows are not those of its micro-batch"),
    "recurrent-3": ({"model": "recurrent", "micro_batch": 3}, TrainingError, "rows are not those of its micro-batch"),
}
"""Settings that cannot stand together: the error, and a part of what it says."""


def legal(chosen: Mapping[str, Any]) -> bool:
    if any(all(chosen.get(name, ...) == value for name, value in settings.items()) for settings, _, _ in ILLEGAL.values()):
        return False
    if chosen.get("optimizer") == "Muon" and chosen.get("groups") not in (None, "one"):
        return False  # two optimizers as it is
    return "optimizer" not in chosen or "variant" not in chosen or chosen["variant"] < len(OPTIONS[chosen["optimizer"]])


def make_case(chosen: Mapping[str, Any]) -> Case:
    rest = {name: value for name, value in chosen.items() if name != "variant"}
    # It takes two steps to come by a block that was updated and has state.
    return Case(**rest, options=OPTIONS[chosen["optimizer"]][chosen["variant"]], steps=2 if CASES <= 60 else 4)


def cases(base: int, count: int) -> list[tuple[str, Case]]:
    """So many cases. Where they are not enough for every pair, two runs of the tests that follow one another have them all."""
    found: list[tuple[str, Case]] = []
    seed = base // 2
    while len(found) < count:
        several = [(f"{seed}-{number}", make_case(chosen)) for number, chosen in enumerate(covering(SETTINGS, legal, seed))]
        found += several[-count:] if base % 2 and not found else several
        seed += 1
    return found[:count]


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases(BASE, CASES)])
def test_streamed_equals_resident(case: Case, tmp_path: Path) -> None:
    compare(case, tmp_path)


def test_the_cases_have_every_pair() -> None:
    everything = wanted_pairs(SETTINGS, legal)
    assert len(everything) > 1500
    for seed in (0, 1):
        several = covering(SETTINGS, legal, seed)
        assert len(several) <= 120, "60 from the front and 60 from the back are not all"
        chosen = [{name: SETTINGS[name].index(value) for name, value in case.items()} for case in several]
        assert all(legal(case) for case in several)
        assert everything <= {pair for case in chosen for pair in pairs_of(case)}
        assert several == covering(SETTINGS, legal, seed), "the seed does not decide all"


def test_every_optimizer_of_torch_is_there() -> None:
    exported = {name for name, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)}
    assert exported - {"Optimizer"} == {*OPTIONS, *REFUSED} == set(KNOWN)


@pytest.mark.parametrize("pair", ILLEGAL)
def test_what_cannot_stand_together_is_refused(pair: str, tmp_path: Path) -> None:
    settings, error, text = ILLEGAL[pair]
    with pytest.raises(error, match=text) as raised:
        run_streamed(replace(Case(model="stack"), **settings), tmp_path)
    assert raised.value.remedy
