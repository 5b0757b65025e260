"""The commands that work on models of transformers. Heavy imports stand inside the commands, as in `cli`."""

from __future__ import annotations

import sys
from pathlib import Path

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
        prompt = click.get_text_stream("stdin").read()
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
