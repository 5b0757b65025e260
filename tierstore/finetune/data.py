"""Text and JSON lines as samples: tokens, and which of them count.

A directory stands for all files in it, in order of their names. Of `.jsonl` files each line is an object with "text", or "prompt" and
"completion", or "messages" (a conversation, through the tokenizer's template); any other file is one text. Texts are joined, an
end-of-text token behind each, and cut into windows. A prompt and its completion, or a conversation, is a sample by itself, whose loss is
that of the completion, or of what the assistant says.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tierstore.finetune.options import FinetuneError

log = logging.getLogger("tierstore")

IGNORED = -100
JSON_LINES = (".jsonl", ".ndjson")
MULTIPLE = 8
"""Batches are padded to a multiple of so many tokens."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a batch.

    Attributes:
        tokens: (length,) int64.
        targets: (length,) int64: the same, or `IGNORED` where a token is given and not to be learnt.
    """

    tokens: Tensor
    targets: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: the first of all is given."""
        return int((self.targets[1:] != IGNORED).sum())


@dataclass(slots=True)
class Data:
    """All samples of one file or directory.

    Attributes:
        digest: Changes whenever a token does.
        num_cut: Samples that were longer than a window.
        num_dropped: Samples of whose completion nothing was left.
    """

    samples: list[Sample] = field(default_factory=list)
    digest: str = ""
    num_cut: int = 0
    num_dropped: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)


def load(path: Path, tokenizer: Any, seq_len: int) -> Data:
    """Read and tokenize.

    Raises:
        FinetuneError: No such file, a line that is not understood, or nothing to learn from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise FinetuneError("the model's tokenizer does not tell where its tokens are in a text: it needs a tokenizer.json")
    data = Data()
    texts: list[list[int]] = []
    end = tokenizer.eos_token_id
    for file in _files(path):
        if file.suffix.lower() in JSON_LINES:
            _read_lines(file, tokenizer, seq_len, texts, data)
        else:
            texts.append(_tokens(tokenizer, _text_of(file, whole=file == path)))
    stream = [token for tokens in texts for token in (*tokens, *([end] if end is not None and tokens[-1:] != [end] else []))]
    packed = torch.tensor(stream, dtype=torch.int64)
    windows = [window for window in packed.split(seq_len) if len(window) > 1]
    data.samples = [Sample(window, window) for window in windows] + data.samples
    if not data.samples:
        raise FinetuneError(f"{path} holds nothing to learn from")
    if data.num_cut:
        log.warning("%s: %d samples were cut to %d tokens: raise --seq-len to keep all of them", path, data.num_cut, seq_len)
    if data.num_dropped:
        message = "%s: %d samples were left out: %d tokens leave nothing of their completion; raise --seq-len to keep them"
        log.warning(message, path, data.num_dropped, seq_len)
    digest = hashlib.sha256()
    for sample in data.samples:
        digest.update(len(sample.tokens).to_bytes(8, "little") + sample.tokens.numpy().tobytes() + sample.targets.numpy().tobytes())
    data.digest = digest.hexdigest()
    return data


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FinetuneError(f"there is no {path}")
    found = [file for file in sorted(path.rglob("*")) if file.is_file()]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        raise FinetuneError(f"{path} has no files")
    return found


def _text_of(file: Path, *, whole: bool) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if whole:
            raise FinetuneError(f"{file} is not text in UTF-8") from error
        log.warning("%s is not text in UTF-8: it is left out", file)
        return ""


def _tokens(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, verbose=False)["input_ids"] if text else []
    return found


def _read_lines(file: Path, tokenizer: Any, seq_len: int, texts: list[list[int]], data: Data) -> None:
    for number, line in enumerate(_text_of(file, whole=True).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FinetuneError(f"{where} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise FinetuneError(f"{where} is not an object")
        if isinstance(entry.get("messages"), list):
            text, spans = _conversation(entry["messages"], tokenizer, where)
        elif isinstance(entry.get("prompt"), str) and isinstance(entry.get("completion"), str):
            text = entry["prompt"] + entry["completion"]
            spans = [(len(entry["prompt"]), len(text))]
        elif isinstance(entry.get("text"), str):
            texts.append(_tokens(tokenizer, entry["text"]))
            continue
        else:
            raise FinetuneError(f'{where} has neither "text", nor "prompt" and "completion", nor "messages"')
        _add(_sample(text, spans, tokenizer, rendered="messages" in entry), seq_len, data)


def _conversation(messages: Sequence[Any], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as one text, and the places in it that the assistant says."""
    if not tokenizer.chat_template:
        raise FinetuneError(
            f"{where} is a conversation, and the tokenizer has no chat template: "
            'use a model that was tuned for chats, or give "prompt" and "completion"'
        )
    if not all(isinstance(each, dict) and isinstance(each.get("role"), str) and "content" in each for each in messages):
        raise FinetuneError(f'{where}: each of "messages" needs a "role" and a "content"')

    def render(count: int, *, begin: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=begin)
        except Exception as error:  # a template is a program of the tokenizer's
            raise FinetuneError(f"{where}: the chat template refuses it: {error}") from error
        return text

    whole = render(len(messages), begin=False)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(index, begin=True) if index else ""
        after = render(index + 1, begin=False)
        if not whole.startswith(before) or not whole.startswith(after):
            raise FinetuneError(f"{where}: the chat template changes what was said before, so that it is not known where the answers are")
        spans.append((len(before), len(after)))
    if not spans:
        raise FinetuneError(f"{where}: the assistant says nothing in it")
    return whole, spans


def _sample(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, *, rendered: bool) -> Sample:
    """Tokens of a text; those count of which a character is within `spans`. What a template made begins and ends as it is."""
    encoded = tokenizer(text, add_special_tokens=not rendered, return_offsets_mapping=True, verbose=False)
    tokens: list[int] = list(encoded["input_ids"])
    targets = [
        token if any(begin < last and first < end for first, last in spans) else IGNORED
        for token, (begin, end) in zip(tokens, encoded["offset_mapping"], strict=True)
    ]
    end = tokenizer.eos_token_id
    if not rendered and end is not None:
        if tokens[-1:] == [end]:
            tokens.pop()
            targets.pop()
        tokens.append(end)
        targets.append(end)
    return Sample(torch.tensor(tokens, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64))


def _add(sample: Sample, seq_len: int, data: Data) -> None:
    if len(sample.tokens) > seq_len:
        data.num_cut += 1
        sample = Sample(sample.tokens[:seq_len], sample.targets[:seq_len])
    if sample.num_targets:
        data.samples.append(sample)
    else:
        data.num_dropped += 1


# -- batches --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples side by side, padded on the right.

    Attributes:
        tokens, targets, mask: (rows, length) int64.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor

    @property
    def num_targets(self) -> int:
        return int((self.targets[:, 1:] != IGNORED).sum())


def collate(samples: Sequence[Sample], padding: int) -> Batch:
    longest = max(len(sample.tokens) for sample in samples)
    length = -(-longest // MULTIPLE) * MULTIPLE if any(len(sample.tokens) < longest for sample in samples) else longest
    tokens = torch.full((len(samples), length), padding, dtype=torch.int64)
    targets = torch.full((len(samples), length), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(samples), length), dtype=torch.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
        targets[row, : len(sample.tokens)] = sample.targets
        mask[row, : len(sample.tokens)] = 1
    return Batch(tokens, targets, mask)


def training_batches(data: Data, *, batch: int, seed: int, first: int, steps: int, padding: int) -> Iterator[Batch]:
    """The batches of steps `first` to `steps`: every sample once before any comes again, in an order drawn anew for each epoch.

    The number of steps taken is all that a run must remember to go on.
    """
    count = len(data.samples)
    orders: dict[int, list[int]] = {}
    for step in range(first, steps):
        chosen = []
        for place in range(step * batch, (step + 1) * batch):
            epoch = place // count
            if epoch not in orders:
                orders = {key: order for key, order in orders.items() if key == epoch - 1}
                orders[epoch] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
            chosen.append(data.samples[orders[epoch][place % count]])
        yield collate(chosen, padding)


def all_batches(data: Data, batch: int, padding: int) -> Iterator[Batch]:
    """Every sample once, in order."""
    for start in range(0, len(data.samples), batch):
        yield collate(data.samples[start : start + batch], padding)
