"""One run of the demo from its directory to its report: opens or resumes the store, trains, commits, compares."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from tierstore import TierStore
from tierstore.demo import corpus, model, report, train
from tierstore.demo.audit import Audit
from tierstore.demo.check import compare_with_plain
from tierstore.demo.directory import Budgets, DemoError, Options, default_device, open_store, read_record, remove_run
from tierstore.demo.record import Record, Score, Tally
from tierstore.demo.speed import Speed
from tierstore.monitor.tui import TierDisplay
from tierstore.units import format_bytes

DEFAULTS = model.Config()

GPU, RAM, NVME_LIMIT = "4.9MB", "9.8MB", "80MB"
LEAST_OVERFLOW = {"gpu": 4.0, "ram": 2.0}
"""The default budgets are far too small on purpose: the state of `DEFAULTS` must fill them at least so many times over."""

COMMIT_EVERY_STEPS = 5
EVALUATE_EVERY_STEPS = 20
PROGRESS_WINDOWS, SCORE_WINDOWS = 64, 256
"""Held-out windows looked at on the way, and for the final score."""

PICTURE = "demo.png"
"""What a run's directory holds beside the store."""


def run(options: Options, console: Console) -> int:
    """Train, or go on where the last commit is, and report.

    Returns:
        The exit code: 0, 1 where the result is not what it must be, 130 after Ctrl-C.

    Raises:
        DemoError: An option contradicts the run that the directory holds, or the run cannot be trusted.
        TierstoreError: From the store.
    """
    this: Run | None = None
    try:
        audit = Audit()
        if options.fresh:
            remove_run(options, _budgets(), _read_record, [PICTURE])
        text = corpus.load()
        with open_store(options, _budgets(), _began_on) as store:
            this = Run(store, options, text, console, audit)
            return this.carry_out()
    except KeyboardInterrupt:
        if this is None:
            console.print("\nStopped before training began. Give the same command again to go on.")
        else:
            console.print(f"\nStopped. The last commit is that of step {this.committed_step}; the same command goes on from there.")
        return 130


# -- the directory ------------------------------------------------------------------------------------------------------


def _budgets() -> Budgets:
    return Budgets(GPU, RAM, NVME_LIMIT)


def _read_record(store: TierStore) -> Record:
    return read_record(store, Record.from_json)


def _began_on(store: TierStore) -> str:
    return _read_record(store).config.device


# -- the run ------------------------------------------------------------------------------------------------------------


class Run:
    """One process's work on a run.

    Attributes:
        committed_step: Steps that the last commit holds; None until this process has made or found one.
    """

    def __init__(self, store: TierStore, options: Options, text: corpus.Corpus, console: Console, audit: Audit) -> None:
        self.committed_step: int | None = None
        self._store = store
        self._options = options
        self._text = text
        self._console = console
        self._record = self._resume() if store.committed is not None else self._begin()
        self._config = self._record.config
        self._tally = Tally(self._record)
        if self.committed_step is None:
            self._commit(self._record)
        elif not self._record.finished:
            self._tally.take(store.stats())
        self._begin_audit(audit)
        self._trainer = train.Trainer(store, self._config, audit)

    def carry_out(self) -> int:
        """Train what is left, report, and compare if asked to.

        Returns:
            The exit code.
        """
        record = self._record
        with model.deterministic(self._config):
            if record.finished:
                self._say(f"This run is finished: {record.step} of {self._config.steps} steps. To train anew, add --fresh.")
            else:
                self._train()
                self._finish()
            self._console.print(report.tables(record))
            self._draw()
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
        config = dataclasses.replace(DEFAULTS, device=device, **asked)
        train.initialise(self._store, config)
        record = Record(config, self._text.digest, state_bytes=sum(self._store.info(name).nbytes for name in self._store))
        record.entropies = self._entropies(self._held_out(SCORE_WINDOWS, config))
        num_files, num_held_out = self._text.num_files
        self._say(
            f"Training on {len(self._text.train):,} bytes of the standard library's sources ({num_files} files; {num_held_out} held out) "
            f"on {device}, seed {config.seed}, in {options.directory}"
        )
        self._say_overflow(record)
        return record

    def _resume(self) -> Record:
        record, options = _read_record(self._store), self._options
        for name in ("steps", "seed", "device"):
            wanted, began_with = getattr(options, name), getattr(record.config, name)
            if wanted is not None and wanted != began_with:
                raise DemoError(f"this run began with --{name} {began_with}: leave out --{name} {wanted} to go on with it, or add --fresh")
        if record.corpus != self._text.digest and (options.check or not record.finished):
            raise DemoError("this run began on other sources (another Python?): go on with that Python, or add --fresh to start over")
        self.committed_step = record.step
        record.starts += 1
        if not record.finished:
            assert self._store.committed is not None
            generation = self._store.committed.generation
            self._say(f"Going on from the commit of step {record.step} (generation {generation}) in {options.directory}")
            self._say_overflow(record)
        return record

    def _say_overflow(self, record: Record) -> None:
        tiers, default_budgets = self._store.stats().tiers, self._options.gpu is None and self._options.ram is None
        factors = {tier: record.state_bytes / tiers[tier].capacity_bytes for tier in LEAST_OVERFLOW}
        gpu, ram = (f"{factors[tier]:.1f} times the {tier} tier ({format_bytes(tiers[tier].capacity_bytes)})" for tier in LEAST_OVERFLOW)
        self._say(f"Training state: {format_bytes(record.state_bytes)} in {len(self._store)} blocks, {gpu} and {ram}")
        if default_budgets and any(factors[tier] < least for tier, least in LEAST_OVERFLOW.items()):
            raise DemoError(f"the default budgets are meant to be too small by {LEAST_OVERFLOW}, and are so only by {factors}")

    def _begin_audit(self, audit: Audit) -> None:
        names = list(self._store)
        shapes = [tensor.shape for name in names for tensor in self._store.info(name).tensors.values()]
        first, end = self._record.step, self._config.steps
        with self._store.use(names[0]) as tensors:
            audit.begin(shapes, {first, first + 1, (first + end) // 2, end - 1}, tensors.values())

    # -- training -------------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        config, record = self._config, self._record
        order = corpus.training_order(self._text, config.context, config.seed)
        held_out = self._held_out(PROGRESS_WINDOWS, config)
        already_s, already_looks, started_s = record.seconds, record.looks, time.monotonic()
        speed = Speed(config.tokens_per_step)
        with TierDisplay(self._store, console=self._console, transient=True) as display:
            if not record.held_out:
                record.held_out.append((0, self._trainer.evaluate(held_out)))
            while record.step < config.steps:
                batch = corpus.training_batch(self._text, order, record.position, config.batch, config.context)
                with speed:
                    record.losses.append(self._trainer.step(record.step, *batch))
                record.step += 1
                record.position += config.batch
                if record.step % EVALUATE_EVERY_STEPS == 0 and record.step < config.steps:
                    record.held_out.append((record.step, self._trainer.evaluate(held_out)))
                record.seconds = already_s + time.monotonic() - started_s
                record.looks = already_looks + self._trainer.audit.looks
                if record.step % COMMIT_EVERY_STEPS == 0:
                    self._commit(record)
                display.update(_headline(record, speed), plain=_plain_headline(record, speed), force=record.step in (1, config.steps))

    def _finish(self) -> None:
        record = self._record
        batches = self._held_out(SCORE_WINDOWS, self._config)
        unigram, bigram = self._entropies(batches)
        held_out = self._trainer.evaluate(batches)
        record.held_out.append((record.step, held_out))
        record.score = Score(held_out, unigram, bigram, num_bytes=sum(targets.numel() for _, targets in batches))
        self._commit(record)

    def _commit(self, record: Record) -> None:
        self._tally.take(self._store.stats())
        self._store.commit(record.to_json())
        self.committed_step = record.step

    def _held_out(self, count: int, config: model.Config) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return corpus.held_out_batches(self._text, count, config.batch, config.context)

    def _entropies(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
        previous = np.concatenate([inputs.flatten().numpy() for inputs, _ in batches])
        following = np.concatenate([targets.flatten().numpy() for _, targets in batches])
        return corpus.entropies(self._text.train, previous, following)

    # -- the end --------------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        try:
            from tierstore.demo import picture  # noqa: PLC0415  # matplotlib is an extra
        except ImportError:
            self._say("\nNo picture: that needs matplotlib (pip install matplotlib).")
            return
        path = self._options.directory / PICTURE
        picture.draw(self._record, path)
        self._say(f"\nPicture: {path}")

    def _judge(self) -> bool:
        """Whether the model learnt what it must. A run cut short with --steps is not asked to."""
        score = self._record.score
        assert score is not None
        if report.beats_bigram(score) or self._config.steps < DEFAULTS.steps:
            return True
        self._say(f"FAILED: the held-out loss {score.held_out:.3f} is not below the bigram entropy {score.bigram:.3f}")
        return False

    def _check(self) -> bool:
        self._say("Repeating the run in plain torch, all resident, in a process without tierstore ...")
        try:
            result = compare_with_plain(self._store, self._record, self._options.directory)
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
    bar = ProgressBar(total=record.config.steps, completed=record.step, width=24)
    table.add_row(bar, _step(record), f"{speed.left_s(record.config.steps - record.step):.0f} s left")
    return Group(table, _losses(record, speed))


def _step(record: Record) -> str:
    return f"step {record.step:>3}/{record.config.steps}"


def _losses(record: Record, speed: Speed) -> str:
    _, bigram = record.entropies
    _, held_out = record.held_out[-1]
    return f"loss {record.losses[-1]:.3f}  held-out {held_out:.3f} (bigram {bigram:.2f})  {speed.tokens_per_s:,.0f} tokens/s"
