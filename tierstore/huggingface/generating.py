"""`tierstore generate`: text from a model that is read layer by layer, printed as it comes."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tierstore.errors import OptionError
from tierstore.huggingface.checkpoint import check_all_links, check_folder
from tierstore.huggingface.models import from_pretrained, require
from tierstore.huggingface.positions import check_positions, num_positions
from tierstore.sync import TierStore
from tierstore.units import format_bytes


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be generated, and where.

    Attributes:
        model: The folder.
        chat: Whether the prompt is what a user says, put through the tokenizer's template.
        temperature: 0: the likeliest token each time.
        nvme: A directory for what has to be made of the model; None: it has to fit RAM. What can be read from the files is not copied.
        max_new_tokens, temperature, seed, dtype: As transformers understands them.
        gpu, ram, device: As `TierStore` understands them.
    """

    model: Path
    prompt: str
    max_new_tokens: int = 128
    chat: bool = False
    temperature: float = 0.0
    seed: int = 0
    dtype: str | None = None
    gpu: str = "auto"
    ram: str = "auto"
    nvme: Path | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """What came of it.

    Attributes:
        tokens: New ones.
        seconds: From the prompt to the last of them.
        read_bytes: From the drive.
        moved_bytes: From RAM to the device.
    """

    tokens: int
    seconds: float
    read_bytes: int
    moved_bytes: int

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        read, moved = format_bytes(self.read_bytes), format_bytes(self.moved_bytes)
        return f"{self.tokens} tokens in {self.seconds:.1f} s, {rate:.2f} tokens/s; {read} read from the drive, {moved} moved to the device"


def generate(options: Options, write: Callable[[str], object]) -> Generated:
    """Generate, and hand over the text piece by piece, the prompt not included.

    Raises:
        OptionError: The folder is none of a causal language model, or has no tokenizer; or the text would be longer than the model takes.
        TierstoreError: From the store.
    """
    require("transformers", "tokenizers")
    from transformers.generation.streamers import TextStreamer  # noqa: PLC0415  # of an extra

    class Streamer(TextStreamer):  # type: ignore[misc]  # of a package without types
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    silence()
    with scratch(options.nvme) as directory, TierStore(options.gpu, options.ram, directory, device=options.device) as store:
        tokenizer = load_tokenizer(options.model)
        given = encode(tokenizer, options.prompt, chat=options.chat)
        model, _ = from_pretrained(options.model, store, dtype=options.dtype)
        if not model.can_generate():
            raise OptionError(f"{type(model).__name__} does not generate text", remedy="give a causal language model")
        _check_length(model, given.shape[1], options.max_new_tokens)
        torch.manual_seed(options.seed)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if options.temperature:
            sampling = {"do_sample": True, "temperature": options.temperature}
        sampling |= {"num_beams": 1, "num_return_sequences": 1}  # whatever the folder has: one text is printed as it comes
        started_s = time.monotonic()
        output = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=options.max_new_tokens,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=_pad_token(model, tokenizer),
            **sampling,
        )
        seconds = time.monotonic() - started_s
        links = store.stats().links
        for name in list(store):
            store.delete(name)
    return Generated(output.shape[1] - given.shape[1], seconds, links["nvme_read"].bytes, links["h2d"].bytes)


@contextlib.contextmanager
def scratch(directory: Path | None) -> Iterator[Path | None]:
    """A directory within this one, for the time being: what another model left there would be taken for this one's."""
    if directory is None:
        yield None
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="generate-", dir=directory) as made:
        yield Path(made)


def silence() -> None:
    """No progress bars amid the command's own lines, and no advice that is not about it."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415  # of an extra

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.disable_progress_bar()
    if not logging.getLogger().isEnabledFor(logging.INFO):
        transformers_logging.set_verbosity(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what PEFT calls by an old name


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder.

    Raises:
        OptionError: No such folder, or it has no tokenizer, or one that only code in the folder could make.
        ModelFileError: A file of it is a link that leads out of the folder.
    """
    check_folder(folder)  # transformers would look for another model of that name in its cache
    check_all_links(folder)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415  # of an extra

    try:
        if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = " ".join(str(error).split()).rstrip(".")  # transformers tells in several lines what it has tried
        raise OptionError(f"{folder} has no tokenizer that can be used: {said}", remedy="put the model's tokenizer.json there") from error


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> torch.Tensor:
    """(1, tokens) of a prompt.

    Raises:
        OptionError: There is no template for a chat, or no token.
    """
    if chat and not tokenizer.chat_template:
        raise OptionError("the tokenizer has no chat template", remedy="leave out --chat")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not tokens.numel():
        raise OptionError("the prompt has no token", remedy="give some text to begin with")
    found: torch.Tensor = tokens.long()
    return found


def _check_length(model: Any, prompt: int, new: int) -> None:
    """The last new token is not given to the model any more.

    Raises:
        OptionError: The model's table of positions ends before.
    """
    most = num_positions(model)
    left = most + 1 - prompt if most is not None else new
    remedy = f"use --max-new-tokens {left}" if left > 0 else "give a shorter prompt: at most {most} tokens"
    check_positions(model, prompt + new - 1, what=f"{prompt} + {new} tokens, of the prompt and new ones, are too many", remedy=remedy)


def _pad_token(model: Any, tokenizer: Any) -> int:
    end = model.generation_config.eos_token_id
    candidates = (model.generation_config.pad_token_id, tokenizer.pad_token_id, end[0] if isinstance(end, list) else end, 0)
    return next(token for token in candidates if token is not None)
