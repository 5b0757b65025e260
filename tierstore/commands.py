"""The commands that work on models of transformers. Heavy imports stand inside the commands, as in `cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tierstore.errors import TierstoreError

model_argument = click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default=None, help="Where to compute.  [default: cuda if torch has it]"
)
gpu_option = click.option("--gpu", metavar="SIZE", default="auto", help="Budget of the device tier, such as 6GB.")
ram_option = click.option("--ram", metavar="SIZE", default="auto", help="Budget of the RAM tier.")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default=None,
    help="Of the weights.  [default: what the model's configuration says]",
)


@click.command()
@model_argument
@click.argument("prompt", metavar="PROMPT")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, metavar="N", help="Stop after so many.")
@click.option("--chat", is_flag=True, help="Put PROMPT through the tokenizer's chat template, as what a user says.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0: the likeliest token each time. Else draw.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Of what is drawn.")
@dtype_option
@gpu_option
@ram_option
@click.option(
    "--nvme",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="A directory for what has to be converted and does not fit RAM. It is left empty.",
)
@device_option
def generate(
    model: Path,
    prompt: str,
    max_new_tokens: int,
    chat: bool,
    temperature: float,
    seed: int,
    dtype: str | None,
    gpu: str,
    ram: str,
    nvme: Path | None,
    device: str | None,
) -> None:
    """Generate text with a model that may be larger than memory.

    MODEL is a folder with config.json, safetensors files and a tokenizer, as on the Hugging Face Hub; PROMPT is text, or - for standard
    input. Each layer is read from MODEL's own files when it is needed, as much as fits stays in RAM and on the device. The text comes on
    standard output, how fast it came on standard error.
    """
    from tierstore.hardware import warn_if_torch_cannot_use_gpu
    from tierstore.huggingface import generating

    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")  # of the line that was typed; a model would go on on the next one
    options = generating.Options(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        chat=chat,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        gpu=gpu,
        ram=ram,
        nvme=nvme,
        device=device,
    )

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        warn_if_torch_cannot_use_gpu()
        done = generating.generate(options, write)
    except TierstoreError as error:
        raise click.ClickException(str(error)) from error
    write("\n")
    click.echo(str(done), err=True)


def _from_toml(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Options from a file become the defaults: what the command line gives wins."""
    if path is not None:
        from tierstore.finetune.options import read_toml

        known = [each.name for each in context.command.params if each.name not in (None, "config", "help")]
        try:
            found = read_toml(path, [name for name in known if name is not None])
        except TierstoreError as error:
            raise click.UsageError(str(error)) from error
        context.default_map = {**(context.default_map or {}), **found}
    return path


@click.command()
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_from_toml,
    help="A TOML file with options, by their long names; MODEL may be there too. The command line wins.",
)
@model_argument
@click.option("--data", type=click.Path(path_type=Path), required=True, metavar="FILE|DIR", help="Text files, or JSON lines.")
@click.option("--nvme", type=click.Path(path_type=Path), required=True, metavar="DIR", help="The store, which is the checkpoint.")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Where the result goes.")
@click.option("--full", is_flag=True, help="Train all weights instead of adapters.")
@click.option("--lora-rank", type=click.IntRange(min=1), default=16, metavar="N", help="Of the adapters.")
@click.option("--lora-alpha", type=click.FloatRange(min=0, min_open=True), default=None, help="Their scale.  [default: twice the rank]")
@click.option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Of their inputs.")
@click.option("--lora-targets", default="all-linear", metavar="NAMES", help="Modules that get one, with commas between.")
@dtype_option
@gpu_option
@ram_option
@click.option("--nvme-limit", metavar="SIZE", default=None, help="Most bytes in the store's directory.  [default: the free space less 5 %]")
@device_option
@click.option("--seq-len", type=click.IntRange(min=2), default=512, metavar="N", help="Most tokens of a sample.")
@click.option("--batch", type=click.IntRange(min=1), default=8, metavar="N", help="Samples a step.")
@click.option(
    "--micro-batch", type=click.IntRange(min=1), default=None, metavar="N", help="Samples that a layer computes at once.  [default: all]"
)
@click.option("--activations", type=click.Choice(["device", "ram", "nvme"]), default="device", help="Where inputs of layers wait.")
@click.option("--steps", type=click.IntRange(min=1), default=None, metavar="N", help="Of the whole run.  [default: what --epochs takes]")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, help="How often all samples are used.")
@click.option("--lr", type=click.FloatRange(min=0), default=1e-4, help="Learning rate of AdamW.")
@click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, help="Of matrices.")
@click.option("--warmup", type=click.IntRange(min=0), default=0, metavar="N", help="Steps over which the rate rises.")
@click.option("--schedule", type=click.Choice(["constant", "linear", "cosine"]), default="cosine", help="How the rate falls after that.")
@click.option("--clip", type=click.FloatRange(min=0), default=1.0, help="Largest norm of all gradients together; 0: any.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Of the order of samples, adapters and dropout.")
@click.option("--threads", type=click.IntRange(min=1), default=None, metavar="N", help="Compute threads on a CPU.  [default: torch's]")
@click.option("--eval-data", type=click.Path(path_type=Path), default=None, metavar="FILE|DIR", help="What is held out, to be evaluated.")
@click.option("--eval-every", type=click.IntRange(min=0), default=0, metavar="N", help="Steps; 0: before and after only.")
@click.option("--commit-every", type=click.IntRange(min=0), default=50, metavar="N", help="Steps; 0: at the end only.")
@click.option("--plot/--no-plot", default=True, help="Draw the losses to OUTPUT/loss.png.")
@click.pass_context
def finetune(context: click.Context, /, model: Path, full: bool, **given: Any) -> None:
    """Fine-tune a model that may be larger than memory, on text or conversations.

    MODEL is a folder as for `generate`. It is read where it lies and never written. DATA is a text file, a file of JSON lines ("text"; or
    "prompt" and "completion"; or "messages"), or a directory of such.

    The run commits to --nvme. Stop it, or kill it, and the same command goes on to the same bits. The result in --output is what
    transformers loads (or PEFT, of adapters), with its tokenizer and the losses.
    """
    from rich.console import Console

    from tierstore.finetune.options import FinetuneError, Options, Recipe
    from tierstore.hardware import warn_if_torch_cannot_use_gpu

    explicit = click.core.ParameterSource.COMMANDLINE
    if full and context.get_parameter_source("lora_rank") is explicit:
        raise click.UsageError("--full and --lora-rank: give one of them")
    names = set(Recipe.__slots__) & given.keys()
    decided = {name: given.pop(name) for name in names if name != "device"}
    if full:
        decided |= {"lora_rank": None, "lora_alpha": None, "lora_dropout": 0.0, "lora_targets": "all-linear"}
    try:
        warn_if_torch_cannot_use_gpu()
        import torch

        if decided["threads"] is None:
            decided["threads"] = torch.get_num_threads()
        from tierstore.finetune.run import run

        code = run(Options(model, recipe=Recipe(**decided), **given), Console())
    except (TierstoreError, FinetuneError) as error:
        raise click.ClickException(str(error)) from error
    context.exit(code)
