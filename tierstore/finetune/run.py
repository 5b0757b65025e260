"""One run from its options to the files that it leaves: begins or goes on, trains, commits, evaluates, exports."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from typing import Any

import torch
from rich.console import Console

from tierstore.finetune import data as datas
from tierstore.finetune.options import FinetuneError, Options, Recipe
from tierstore.finetune.picture import draw, require_matplotlib
from tierstore.finetune.plan import check, describe, make_plan, plural
from tierstore.finetune.record import Record, StepLog, check_same
from tierstore.finetune.tuning import Tuning
from tierstore.hardware import resolve_device
from tierstore.huggingface.checkpoint import GENERATION, TOKENIZER_FILES
from tierstore.huggingface.generating import load_tokenizer, silence
from tierstore.huggingface.models import require
from tierstore.huggingface.saving import refuse_adapters, save_pretrained
from tierstore.sync import TierStore
from tierstore.training.progress import Progress, progress
from tierstore.units import format_duration

PICTURE = "loss.png"
FINISHED, INTERRUPTED = 0, 130


def run(options: Options, console: Console) -> int:
    """Fine-tune, or go on where the last commit is.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        FinetuneError: The data, or an option that contradicts the run that the directory holds.
        TierstoreError: From the store, or a folder that is no model.
    """
    require("transformers", "tokenizers", *(["peft"] if options.recipe.lora_rank is not None else []))
    if options.plot:
        require_matplotlib()
    _check_places(options)
    silence()
    torch.set_num_threads(options.recipe.threads)
    tokenizer = load_tokenizer(options.model)
    recipe = dataclasses.replace(options.recipe, device=resolve_device(options.device).type)
    samples = datas.load(options.data, tokenizer, recipe.seq_len)
    held_out = datas.load(options.eval_data, tokenizer, recipe.seq_len) if options.eval_data is not None else None
    steps = recipe.steps or max(1, math.ceil(recipe.epochs * len(samples.samples) / recipe.batch))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    this: Run | None = None
    try:
        limit: Any = options.nvme_limit
        with TierStore(options.gpu, options.ram, options.nvme, nvme_limit=limit, device=recipe.device) as store:
            if store.committed is not None:
                check_same(
                    Record.from_json(store.committed.metadata), recipe, steps, data=samples.digest, model=str(options.model.resolve())
                )
            if recipe.lora_rank is None:
                refuse_adapters(options.output)
            this = Run(store, options, recipe, samples, held_out, steps, padding, console)
            this.carry_out()
            return FINISHED
    except KeyboardInterrupt:
        step = this.committed_step if this is not None else None
        where = f"The last commit is that of step {step}" if step is not None else "Nothing was committed yet"
        console.print(f"\nStopped. {where}; the same command goes on from there.", highlight=False)
        return INTERRUPTED


def _check_places(options: Options) -> None:
    model = options.model.resolve()
    for name, place in (("--output", options.output), ("--nvme", options.nvme)):
        if place.resolve() == model:
            raise FinetuneError(f"{name} is the folder of the model, whose files are never written: give another directory")
    if options.output.resolve() == options.nvme.resolve():
        raise FinetuneError("--output and --nvme are one directory: give two")
    if options.output.exists() and not options.output.is_dir():
        raise FinetuneError(f"--output {options.output} is not a directory")


class Run:
    """One process's work on a run.

    Attributes:
        committed_step: Steps that the last commit holds; None until there is one.
    """

    def __init__(
        self,
        store: TierStore,
        options: Options,
        recipe: Recipe,
        samples: datas.Data,
        held_out: datas.Data | None,
        steps: int,
        padding: int,
        console: Console,
    ) -> None:
        self.committed_step: int | None = None
        self._store = store
        self._options = options
        self._recipe = recipe
        self._samples = samples
        self._held_out = held_out
        self._steps = steps
        self._padding = padding
        self._console = console
        longest = max(len(sample.tokens) for each in (samples, held_out) if each is not None for sample in each.samples)
        self._tuning = Tuning(store, options.model, recipe, steps, options.activations, longest=longest)
        if self._tuning.resumed is None:
            self._record = Record(recipe.to_json(), steps, samples.digest, str(options.model.resolve()), self._tuning.by_pieces)
        else:
            self._record = Record.from_json(self._tuning.resumed)
            self._tuning.by_pieces = self._record.by_pieces
            self.committed_step = self._record.step

    def carry_out(self) -> None:
        """Train what is left, and write the result."""
        record, options = self._record, self._options
        result = options.output / ("config.json" if self._recipe.lora_rank is None else "adapter_config.json")
        if record.written_to == str(options.output.resolve()) and result.is_file():
            self._say(f"This run is finished: {record.step} of {self._steps} steps, the result is in {options.output}.")
            return
        self._announce()
        log = StepLog(options.output, record.step)
        try:
            self._train(log)
        finally:
            log.close()
        self._export(log)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _announce(self) -> None:
        recipe, samples, record = self._recipe, self._samples, self._record
        size = f"{len(samples.samples):,} samples, {samples.num_tokens:,} tokens, at most {recipe.seq_len} each"
        self._say(f"Data      {size}, from {self._options.data}")
        tokens = recipe.batch * min(recipe.seq_len, max(len(sample.tokens) for sample in samples.samples))
        batch = datas.collate(samples.samples[: recipe.batch], self._padding)
        plan = make_plan(self._tuning, batch, tokens, self._options.activations)
        export = plan.settings.weights + (plan.settings.frozen if recipe.lora_rank is None else 0)
        check(plan, self._store, self._options.nvme, self._options.output, export)
        left = self._steps - record.step
        for line in describe(plan, self._store, recipe, left, self._num_commits(left)):
            self._say(line)
        if record.step:
            self._say(f"Going on from the commit of step {record.step}")

    def _num_commits(self, steps: int) -> int:
        every = self._options.commit_every
        return 1 + (steps // every if every else 0)

    # -- training ----------------------------------------------------------------------------------------------------------

    def _train(self, log: StepLog) -> None:
        record, recipe, options = self._record, self._recipe, self._options
        left = self._steps - record.step
        if not left:
            return
        if not record.step and self._held_out is not None:
            self._evaluate(log)
        batches = datas.training_batches(
            self._samples, batch=recipe.batch, seed=recipe.seed, first=record.step, steps=self._steps, padding=self._padding
        )
        bar: Progress[datas.Batch] = progress(
            self._store, batches, tokens=lambda batch: float(batch.mask.sum()), total=left, first=record.step, console=self._console
        )
        for batch in bar:
            started_s = time.monotonic()
            rate = self._tuning.schedule.get_last_lr()[0]
            loss_of, norm_of = self._tuning.step(batch)
            loss, norm = loss_of.item(), norm_of.item() if norm_of is not None else None
            if not math.isfinite(loss):
                raise FinetuneError(
                    f"the loss of step {record.step + 1} is {loss}: the last commit is that of step {self.committed_step or 0}; "
                    "begin anew with a smaller --lr, more --warmup, or --dtype bfloat16 instead of float16"
                )
            record.step += 1
            record.first = loss if record.first is None else record.first
            record.last = loss
            log.write(step=record.step, loss=loss, norm=norm, lr=rate, tokens=int(batch.mask.sum()), seconds=time.monotonic() - started_s)
            bar.update(loss=loss, lr=rate)
            if self._held_out is not None and options.eval_every and record.step % options.eval_every == 0 and record.step < self._steps:
                self._evaluate(log)
            if options.commit_every and record.step % options.commit_every == 0 and record.step < self._steps:
                self._commit()
        if self._held_out is not None:
            self._evaluate(log)
        self._commit()

    def _evaluate(self, log: StepLog) -> None:
        assert self._held_out is not None
        loss = self._tuning.evaluate(datas.all_batches(self._held_out, self._recipe.batch, self._padding))
        log.write(step=self._record.step, held_out=loss)
        self._say(f"step {self._record.step}: held-out loss {loss:.4f}")

    def _commit(self) -> None:
        self._store.commit(self._record.to_json())
        self.committed_step = self._record.step

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _export(self, log: StepLog) -> None:
        output, started_s = self._options.output, time.monotonic()
        save_pretrained(self._tuning.tiered, output)
        for name in TOKENIZER_FILES:
            source = self._options.model / name
            if source.is_file() and not (name == GENERATION and self._recipe.lora_rank is not None):
                shutil.copyfile(source, output / name)
        entries = log.entries()
        if self._options.plot:
            losses = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
            draw(output / PICTURE, losses, [(entry["step"], entry["held_out"]) for entry in entries if "held_out" in entry])
        self._record.written_to = str(output.resolve())
        self._commit()
        record = self._record
        what = "the adapters" if self._recipe.lora_rank is not None else "the model"
        self._say(f"Done: {plural(record.step, 'step')}, loss {record.first:.4f} at first, {record.last:.4f} at last")
        self._say(f"Wrote {what} to {output} in {format_duration(time.monotonic() - started_s)}")
