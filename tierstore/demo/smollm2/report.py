"""The end of a fine-tuning run in words: tables made from its record alone."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tierstore.demo.report import link_table, tier_table
from tierstore.demo.smollm2.model import EXPECTED
from tierstore.demo.smollm2.record import Record
from tierstore.units import format_bytes

LEAST_FALL = 0.1
"""Nats per token by which the held-out loss must fall in a whole run; plain torch takes it down by 0.44."""


def tables(record: Record) -> RenderableType:
    """The run in three small tables."""
    return Group(Text(), _learning_table(record), Text(), tier_table(record), Text(), link_table(record))


def failures(record: Record) -> list[str]:
    """What a whole run should have come to and has not, a clause each."""
    (_, first), (_, last) = record.held_out[0], record.held_out[-1]
    found = []
    if last > first - LEAST_FALL:
        found.append(f"the held-out loss went from {first:.3f} to {last:.3f}, and should have fallen by {LEAST_FALL}")
    if EXPECTED not in (record.last_answer or ""):
        found.append(f"the model has forgotten {EXPECTED}: {record.last_answer!r}")
    return found


def _learning_table(record: Record) -> Table:
    recipe = record.recipe
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    rate = record.step * recipe.tokens_per_step / record.seconds if record.seconds else 0.0
    table.add_row("training", f"{record.step} steps of {recipe.tokens_per_step} tokens in {record.seconds:.0f} s ({rate:,.0f} a second)")
    table.add_row("training state", f"{format_bytes(record.state_bytes)}: fp32 weights, gradients and two moments")
    if record.losses:
        table.add_row("training loss", f"{record.losses[-1]:.3f} nats per token in the last step")
    (_, first), (_, last) = record.held_out[0], record.held_out[-1]
    table.add_row("held-out loss", Text(f"{first:.3f} before, {last:.3f} after", style="bold green" if last < first else "bold red"))
    table.add_row("answer before", Text(_one_line(record.first_answer)))
    table.add_row("and after", Text(_one_line(record.last_answer or "")))
    return table


def _one_line(text: str) -> str:
    return " ".join(text.split())
