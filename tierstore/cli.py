"""The command line. Heavy imports stand inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from tierstore.errors import TierstoreError

MODELS = ("bytes",)
"""What `demo --model` can train."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="tierstore")
@click.option("-v", "--verbose", is_flag=True, help="Show what the store logs, not only its warnings.")
def main(verbose: bool) -> None:
    """Train networks that fit neither on the GPU nor in RAM: state on three tiers, bit-identical to training in memory."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


@main.command()
@click.option("--model", type=click.Choice(MODELS), default="bytes", help="bytes: a transformer from scratch on Python's own sources.")
@click.option(
    "--dir", "directory", type=click.Path(file_okay=False, path_type=Path), default="tierstore-demo", help="Where the run is kept."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None, help="Where to compute.  [default: cuda if torch has it]")
@click.option("--policy", default="lookahead", help="What leaves a full tier: lookahead, lru, static, or an installed one.")
@click.option("--gpu", metavar="SIZE", default=None, help="Budget of the device tier.  [default: far too small on purpose]")
@click.option("--ram", metavar="SIZE", default=None, help="Budget of the RAM tier.  [default: far too small on purpose]")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Optimizer steps of a new run.  [default: 160]")
@click.option("--seed", type=click.IntRange(0, 2**31), default=None, help="Seed of a new run.  [default: 0]")
@click.option("--fresh", is_flag=True, help="Delete the run in --dir and start over.")
@click.option("--check", is_flag=True, help="Afterwards repeat the run in plain torch, without tierstore, and require identical bits.")
@click.pass_context
def demo(
    context: click.Context,
    model: str,
    directory: Path,
    device: str | None,
    policy: str,
    gpu: str | None,
    ram: str | None,
    steps: int | None,
    seed: int | None,
    fresh: bool,
    check: bool,
) -> None:
    """Train a small transformer whose state fits neither tier of memory.

    Weights, gradients and optimizer state live in a store with budgets far too small for them. The run commits every few steps; stop it
    with Ctrl-C, or kill it, and the same command goes on from the last commit to the same bits.
    """
    from rich.console import Console

    from tierstore.demo import run
    from tierstore.demo.corpus import CorpusError
    from tierstore.hardware import warn_if_torch_cannot_use_gpu

    warn_if_torch_cannot_use_gpu()
    options = run.Options(directory, device=device, policy=policy, gpu=gpu, ram=ram, steps=steps, seed=seed, fresh=fresh, check=check)
    try:
        code = run.run(options, Console())
    except (TierstoreError, run.DemoError, CorpusError) as error:
        raise click.ClickException(str(error)) from error
    context.exit(code)
