"""A model folder as the Hugging Face Hub has them: which tensors it holds, and in which files. Reads headers, and runs nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tierstore.errors import ModelFileError, OptionError, TensorError
from tierstore.nvme.model_files import inside, places, real_path
from tierstore.tiers.device import DTYPES

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json", GENERATION),
)
"""What a model folder has of its tokenizer, and the settings of generation."""

TEMPLATES = "additional_chat_templates"
"""A folder of chat templates in it."""

BACKEND: Any = {"backend": "pread"}
"""Read and not mapped: mapped pages count as memory, and on Windows a whole file's."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a model folder.

    Attributes:
        file: Where it is.
        shape: In elements.
        dtype: None: one that torch does not have.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


class Checkpoint:
    """A model folder.

    Attributes:
        path: The folder.
        config: What its config.json says.
        tensors: All that its safetensors files hold, by the names that these have there.
        source: What `TierStore.adopt` takes: the one file, or the folder with its index.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read names, shapes and dtypes.

        Raises:
            OptionError: `path` is not a folder with a model that can be read.
            ModelFileError: A file is damaged, or is not there.
        """
        self.path = Path(path)
        check_folder(self.path)
        check_links(self.path, (CONFIG, GENERATION))
        self.config = self._read_json(CONFIG)
        _refuse_quantised(self.config, self.path)
        self.source, files = self._find()
        self.tensors: dict[str, Entry] = {}
        for file, wanted in files.items():
            self._read_header(file, wanted)

    def _file(self, name: str) -> Path:
        """One of the folder's, which no link may have elsewhere: see [Note: What a folder may name] in `nvme.model_files`.

        Raises:
            ModelFileError: A link leads out of the folder.
        """
        inside(real_path(self.path), name)
        return self.path / name

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self._file(name)
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"{file} is not JSON: {error}", remedy="download it again", path=file) from error
        if not isinstance(read, dict):
            raise ModelFileError(f"{file} is not a JSON object", remedy="download it again", path=file)
        return read

    def _find(self) -> tuple[Path, dict[Path, set[str] | None]]:
        """The files, and the tensors that the index says are in each (None: whatever is)."""
        if (single := self._file(SINGLE)).is_file():
            return single, {single: None}
        if (listed := self._file(INDEX)).is_file():
            files: dict[Path, set[str] | None] = {}
            for tensor, name in places(self._read_json(INDEX), os.fspath(listed)).items():
                if (file := self.path / name) not in files and not self._file(name).is_file():
                    problem = f"{INDEX} names a file that is not there: {name!r}, for tensor {tensor!r}"
                    raise ModelFileError(problem, remedy="download it again", path=file, tensor=tensor)
                wanted = files.setdefault(file, set())
                assert wanted is not None
                wanted.add(tensor)
            return self.path, files
        others = [self._file(file.name) for file in sorted(self.path.glob("*.safetensors"))]
        if len(others) == 1:
            return others[0], {others[0]: None}
        found = sorted(file.name for file in self.path.iterdir() if file.suffix in (".bin", ".gguf", ".pt", ".pth", ".safetensors"))
        kinds = {Path(name).suffix for name in found}
        if ".gguf" in kinds:
            remedy = "4-bit and other GGUF files hold no weights that can be trained or streamed as they are: get the model's safetensors"
        elif kinds & {".bin", ".pt", ".pth"}:
            remedy = "files of pickles are never opened: get the model's safetensors, or convert it with transformers' save_pretrained()"
        else:
            remedy = f"give a folder with {SINGLE} or {INDEX}"
        raise OptionError(f"{self.path} has no safetensors model", have=", ".join(found[:5]) or "no weights", remedy=remedy)

    def _read_header(self, file: Path, wanted: set[str] | None) -> None:
        try:
            with safe_open(file, framework="pt", **BACKEND) as opened:
                present = set(opened.keys())
                for name in present if wanted is None else wanted:
                    if name not in present:
                        raise ModelFileError(
                            f"{INDEX} says that {file.name} has {name!r}, which it has not", remedy="download it again", path=file
                        )
                    part = opened.get_slice(name)
                    self.tensors[name] = Entry(file, tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{file} cannot be read: {error}", remedy="download it again", path=file) from error

    @contextmanager
    def reading(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """Yields the tensors by name, each read when it is asked for, into memory of its own."""
        with ExitStack() as stack:
            yield _Reader(self.tensors, stack)


def check_folder(path: Path) -> None:
    """Refuse what is no folder, or has no configuration of a model.

    Raises:
        OptionError: It is none, or has none.
    """
    if not path.is_dir():
        raise OptionError(
            f"no model folder {os.fspath(path)!r}",
            need="a folder with config.json and safetensors files",
            remedy=f"download the model first: hf download {path.as_posix()} --local-dir FOLDER",
        )
    if not (path / CONFIG).is_file():
        remedy = "give the folder of a model of transformers"
        raise OptionError(f"{path} has no {CONFIG}", need=f"{CONFIG} and safetensors files", remedy=remedy)


def check_links(path: Path, names: Iterable[str]) -> None:
    """Refuse links that lead out of a folder, under names that others are to read.

    Raises:
        ModelFileError: There is one.
    """
    folder = real_path(path)
    for name in names:
        inside(folder, name)


def check_all_links(path: Path) -> None:
    """As `check_links`, of whatever a tokenizer may read: transformers has a file name for each kind of them.

    Raises:
        ModelFileError: There is one.
    """
    entries = list(os.scandir(path))
    templates = path / TEMPLATES
    names = [entry.name for entry in entries if entry.is_symlink() and (entry.name == TEMPLATES or not entry.is_dir())]
    check_links(path, [*names, *(f"{TEMPLATES}/{entry.name}" for entry in (os.scandir(templates) if templates.is_dir() else ()))])


class _Reader(Mapping[str, torch.Tensor]):
    def __init__(self, tensors: Mapping[str, Entry], stack: ExitStack) -> None:
        self._tensors = tensors
        self._stack = stack
        self._opened: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._tensors[name]
        try:
            if entry.file not in self._opened:
                self._opened[entry.file] = self._stack.enter_context(safe_open(entry.file, framework="pt", **BACKEND))
            tensor: torch.Tensor = self._opened[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"tensor {name!r} of {entry.file} cannot be read: {error}", remedy="download it again", path=entry.file, tensor=name
            ) from error
        if tuple(tensor.shape) != entry.shape:
            raise TensorError(f"{entry.file} was changed while it was read", remedy="leave the model's files alone", tensor=name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _refuse_quantised(config: Mapping[str, Any], path: Path) -> None:
    """Refuse folders whose tensors are not the weights themselves.

    Raises:
        OptionError: It is one.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config")
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
            raise OptionError(
                f"{path} holds a quantised model ({method})",
                need="weights in 32, 16 or 8 bits, each by itself",
                remedy="get the model that it was made of: quantised weights can be neither adopted nor trained as they are",
            )
