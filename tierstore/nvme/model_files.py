"""Model files and folders, looked at without trusting them: headers are read, payloads are not.

[Note: What a folder may name]
The names in an index are somebody else's input, and a folder may come out of somebody's archive. So an index may name files below the
folder only, and a link may lead out of it to one place: the blobs of the Hugging Face cache that the folder is a snapshot of
(`.../snapshots/REVISION/model.safetensors -> ../../blobs/HASH`). A path that the caller gives himself may lead anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tierstore.catalog import FILLER_PREFIX
from tierstore.errors import ModelFileError, OptionError, ShardError
from tierstore.nvme import windows
from tierstore.nvme.adopted import ModelFile
from tierstore.nvme.checksums import checksum
from tierstore.nvme.files import Files, FileStat
from tierstore.nvme.safetensors import LENGTH_BYTES, Header, header_length, parse_header, read_object
from tierstore.nvme.shards import io_error

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
SUFFIX = ".safetensors"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""What PEFT leaves: libraries load the model that these name, and not one that lies beside them."""
MAX_INDEX_BYTES = 1 << 27

_NUMBERS = re.compile(r"([0-9]{1,18})")
UNCHANGED = "download or copy it again, and adopt that"


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """A tensor of a model.

    Attributes:
        file: An index of `Model.files`.
        begin: Its first byte, from the file's start.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    begin: int


@dataclass(frozen=True, slots=True)
class Model:
    """What lies in a model file or folder; tensors by file and place."""

    path: str
    files: tuple[ModelFile, ...]
    tensors: tuple[FoundTensor, ...]


async def survey(files: Files, path: str | os.PathLike[str]) -> Model:
    """Read the headers of a safetensors file, or of a folder's files.

    A folder's `model.safetensors` is the model, if there is one; else what its index names; else all its safetensors files.

    Raises:
        ModelFileError: It is not there, damaged, or not what the index says; names file and tensor.
        OptionError: It is no path.
        TransferError: The drive does not answer.
    """
    where = real_path(path)
    status = await look(files, where)
    if status is None:
        raise ModelFileError(f"there is no model at {where}", remedy="give a safetensors file, or the folder of a model", path=where)
    placed: Mapping[str, str] | None = None
    if status.directory:
        listed, placed = await _files_of(files, where)
    else:
        listed = [where]
    found: list[ModelFile] = []
    tensors: list[FoundTensor] = []
    home: dict[str, str] = {}
    for name in listed:
        real = where if name == where else inside(where, name)
        wanted = next((tensor for tensor, home_name in placed.items() if home_name == name), None) if placed else None
        file, header = await read_file(files, real, name=name, tensor=wanted)
        for tensor in header.tensors:
            if tensor.name.startswith(FILLER_PREFIX):
                raise ModelFileError(
                    f"tensor {_short(tensor.name)} of {real} has a name that is reserved for gaps in a store's own shards",
                    remedy="adopt a model, or what `tierstore export` wrote; a store's directory is opened with nvme=",
                    path=real,
                    tensor=tensor.name,
                )
            if placed is not None and placed.get(tensor.name, name) != name:
                continue  # the index takes it from another file
            if tensor.name in home:
                raise ModelFileError(
                    f"tensor {_short(tensor.name)} is in two files, {home[tensor.name]} and {real}",
                    remedy="give the one file that is meant, or a folder with an index",
                    path=real,
                    tensor=tensor.name,
                )
            home[tensor.name] = real
            begin = header.data_start + tensor.begin
            tensors.append(FoundTensor(tensor.name, tensor.dtype, tensor.shape, len(found), begin))
        found.append(file)
    for tensor_name, name in (placed or {}).items():
        if tensor_name not in home:
            raise ModelFileError(
                f"tensor {_short(tensor_name)} is not in {os.path.join(where, name)}, where {INDEX} says it is",
                remedy=UNCHANGED,
                path=os.path.join(where, name),
                tensor=tensor_name,
            )
    return Model(where, tuple(found), tuple(tensors))


def real_path(path: str | os.PathLike[str]) -> str:
    """Where a path leads.

    Raises:
        OptionError: It is no path, or one that no manifest could hold.
    """
    try:
        where = os.path.realpath(os.path.expanduser(os.fspath(path)))
        where.encode("utf-8")
        if "\0" in where:
            raise ValueError("a zero character")
    except (TypeError, ValueError, AttributeError) as error:
        raise OptionError("the path of a model is not understood", need="a path", have=repr(path)[:200], remedy=str(error)) from None
    return windows.plain(where)


async def look(files: Files, path: str) -> FileStat | None:
    """What is there; None if nothing is.

    Raises:
        TransferError: It cannot be told.
    """
    try:
        return await files.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise io_error(error, "looking at the model file", path=path) from error


async def _files_of(files: Files, folder: str) -> tuple[list[str], Mapping[str, str] | None]:
    """Names of the files that make up a model, and in which of them the index places each tensor."""
    try:
        present = await files.listdir(folder)
    except OSError as error:
        raise io_error(error, "looking at the model folder", path=folder) from error
    if WHOLE in present:
        return [WHOLE], None
    if INDEX in present:
        placed = await _read_index(files, folder)
        return sorted(set(placed.values()), key=natural), placed
    listed = sorted((name for name in present if name.endswith(SUFFIX)), key=natural)
    if not listed:
        raise ModelFileError(
            f"{folder} holds no safetensors files",
            need=f"{WHOLE}, {INDEX} or other files that end in {SUFFIX}",
            have=", ".join(sorted(present)[:5]) or "nothing",
            remedy="give the folder of a model that was saved as safetensors",
            path=folder,
        )
    return listed, None


async def _read_index(files: Files, folder: str) -> Mapping[str, str]:
    path = inside(folder, INDEX)
    status = await look(files, path)
    if status is None or not status.regular or status.nbytes > MAX_INDEX_BYTES:
        have = "nothing" if status is None else f"{status.nbytes} bytes" if status.regular else "something else"
        raise ModelFileError(
            f"{path} is no index", need=f"a file of at most {MAX_INDEX_BYTES} bytes", have=have, remedy=UNCHANGED, path=path
        )
    try:
        fields = await files.work(_parse_index, await files.load(path, status.nbytes))
    except OSError as error:
        raise io_error(error, "reading the index", path=path) from error
    except ShardError as error:
        raise _damaged(path, error) from error
    return places(fields, path)


def places(index: Mapping[str, object], path: str) -> Mapping[str, str]:
    """Which file of a folder has each tensor, as its index says. See [Note: What a folder may name].

    Raises:
        ModelFileError: It does not say, or names what is not in the folder.
    """
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ModelFileError(f"{path} has no weight_map of names to files", remedy=UNCHANGED, path=path)
    for tensor, name in placed.items():
        parts = name.replace("\\", "/").split("/")
        if not name or os.path.isabs(name) or ".." in parts or "" in parts or ":" in name or not name.isprintable():
            raise ModelFileError(
                f"{path} places tensor {_short(tensor)} outside of its folder",
                need="names of files in the folder",
                have=_short(name),
                remedy="do not use this model: its index is wrong, or hostile",
                path=path,
                tensor=tensor,
            )
    return placed


def _parse_index(data: bytes) -> dict[str, object]:
    return read_object(data, what="index")


def inside(folder: str, name: str) -> str:
    """The real path of a folder's file. See [Note: What a folder may name].

    Args:
        folder: Where its own links lead.
        name: Below it.

    Raises:
        ModelFileError: A link leads out of the folder.
    """
    real = windows.plain(os.path.realpath(os.path.join(folder, name)))
    parent = os.path.dirname(folder)
    allowed = [folder]
    if os.path.basename(parent) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(parent), "blobs"))
    if not any(real.startswith(place + os.sep) for place in allowed):
        raise ModelFileError(
            f"{os.path.join(folder, name)} is a link that leads out of its folder",
            need="a file of the folder, or of the Hugging Face cache that the folder belongs to",
            have=real,
            remedy="if you trust where it leads, put a copy into the folder, or adopt that file itself",
            path=real,
        )
    return real


async def read_file(files: Files, path: str, *, name: str, tensor: str | None) -> tuple[ModelFile, Header]:
    """Read and check a model file's header.

    Args:
        files: The file system.
        path: Where its links lead.
        name: What it is called in the folder.
        tensor: One that an index places in it.

    Raises:
        ModelFileError: It is not there, or no valid safetensors file.
        TransferError: The read failed.
    """
    status = await look(files, path)
    if status is None:
        said = f" ({name})" if not path.endswith(name) else ""
        holds = f", where {INDEX} places tensor {_short(tensor)}" if tensor is not None else ""
        raise ModelFileError(f"model file {path}{said} is not there{holds}", remedy=UNCHANGED, path=path, tensor=tensor)
    if not status.regular:
        raise ModelFileError(f"{path} is no plain file", need="a safetensors file", remedy="give a model file, or a folder", path=path)
    try:
        length = header_length(await files.load(path, LENGTH_BYTES), status.nbytes)
        data = await files.load(path, LENGTH_BYTES + length)
        header, header_sum = await files.work(_parse, data, status.nbytes)
    except ShardError as error:
        raise _damaged(path, error) from error
    except OSError as error:
        raise io_error(error, "reading the header of a model file", path=path) from error
    if await look(files, path) != status:
        raise ModelFileError(f"{path} changed while it was read", remedy="wait until it is complete", path=path)
    return ModelFile(path, status.nbytes, status.modified_ns, header_sum, len(data)), header


def _parse(data: bytes, file_bytes: int) -> tuple[Header, int]:
    return parse_header(data, file_bytes), checksum(data)


def _damaged(path: str, error: ShardError) -> ModelFileError:
    details = {**error.details, "path": path}
    return ModelFileError(f"{path}: {error.problem}", need=error.need, have=error.have, remedy=UNCHANGED, **details)


async def look_again(files: Files, file: ModelFile) -> ModelFile | str:
    """A model file as it is now; or one clause that says what is different, if its tensors need not be what they were.

    A time alone means nothing: a copy of a folder, or a restored backup, has another. Then the header is read and compared, and
    whoever reads payloads compares these with their checksums. A file that cannot be looked at counts as different.
    """
    try:
        status = await look(files, file.path)
        what = difference(file, status, time=False)
        if what is not None or status is None:
            return what or "is gone"
        data = await files.load(file.path, file.header_bytes)
        if await look(files, file.path) != status:
            return "is being written to"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if await files.work(checksum, data) != file.header_sum:
        return "has another header than it had when it was adopted"
    return replace(file, modified_ns=status.modified_ns)


def difference(file: ModelFile, status: FileStat | None, *, time: bool = True) -> str | None:
    """What a look at the name alone tells: one clause, or None. Whether `time` counts depends on who asks: see `look_again`."""
    if status is None:
        return "is gone"
    if not status.regular:
        return "is no plain file any more"
    if status.nbytes != file.nbytes:
        return f"has {status.nbytes} bytes instead of {file.nbytes}"
    if time and status.modified_ns != file.modified_ns:
        return "was written to since it was adopted"
    return None


def changed(path: str, what: str, *, block: str | None, remedy: str | None = None, **details: object) -> ModelFileError:
    """The error for a model file that is not what it was."""
    whose = f"block {block!r} lies in" if block is not None else "adopted:"
    return ModelFileError(
        f"{whose} {path}, which {what}",
        need="the file as it was adopted",
        remedy=remedy
        or "put it back as it was, or open the store anew if its content is the same; or delete() the block, and adopt() the file",
        path=path,
        block=block,
        **details,
    )


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts numbers within names as numbers."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in _NUMBERS.split(text) if part]


def _short(value: str) -> str:
    return repr(value[:200])
