"""What one fine-tuning is asked to be: from the command line, and from a TOML file. Imports neither torch nor transformers."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tierstore.errors import OptionError

DEFAULT_RANK = 16


class FinetuneError(Exception):
    """The fine-tuning cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the bits of a run, all but the data and the model: a run goes on with the one it began with.

    Attributes:
        lora_rank: None: all weights are trained.
        lora_targets: Names of modules with commas between, or "all-linear".
        seq_len: Most tokens of a sample.
        batch: Samples a step.
        micro_batch: Samples that a layer computes at once; None: all.
        steps: Of the whole run; None: as many as `epochs` takes.
        clip: Largest global gradient norm; 0: none.
        threads: Compute threads on a CPU: another number adds up in another order.
    """

    lora_rank: int | None = DEFAULT_RANK
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"
    dtype: str | None = None
    seq_len: int = 512
    batch: int = 8
    micro_batch: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    clip: float = 1.0
    seed: int = 0
    threads: int = 1
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Options that another run, as `to_json` has it, was given otherwise."""
        own = self.to_json()
        return [name for name in own if name in other and own[name] != other[name]]


@dataclass(frozen=True, slots=True)
class Options:
    """One call of the command.

    Attributes:
        model: The folder of the model.
        data, eval_data: Files or directories of text or JSON lines.
        nvme: The store's directory, which is the checkpoint.
        output: Where the result goes.
        eval_every, commit_every: Steps; 0: at the end only.
        plot: Whether to draw the losses.
    """

    model: Path
    data: Path
    nvme: Path
    output: Path
    recipe: Recipe
    gpu: str = "auto"
    ram: str = "auto"
    nvme_limit: str | None = None
    device: str | None = None
    eval_data: Path | None = None
    eval_every: int = 0
    commit_every: int = 50
    activations: Literal["device", "ram", "nvme"] = "device"
    plot: bool = True


def read_toml(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Options from a file: the command's long names, with - or _ in them.

    Raises:
        OptionError: It is not TOML, or has a key that is no option.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}", remedy="give a TOML file") from error
    options = {key.replace("-", "_"): value for key, value in found.items()}
    unknown = sorted(key for key in options if key not in known)
    if unknown:
        have = ", ".join(sorted(each.replace("_", "-") for each in known))
        raise OptionError(
            f"{path} has an unknown option {unknown[0].replace('_', '-')!r}", need=f"one of: {have}", remedy="correct its name"
        )
    nested = next((key for key, value in options.items() if isinstance(value, dict | list)), None)
    if nested is not None:
        raise OptionError(f"{path}: option {nested!r} is not one value", remedy="write it as text or a number, without a table")
    return options
