"""Model files and folders that are damaged, hostile or merely odd: what is refused, in which words, and what other readers say."""

from __future__ import annotations

import asyncio
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tierstore.catalog import ITEM_BYTES
from tierstore.errors import ModelFileError, OptionError, TierstoreError
from tierstore.nvme.adopted import ModelFile
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.model_files import INDEX, WHOLE, Model, look_again, survey
from tierstore.nvme.safetensors import NOT_IN_TORCH
from tierstore.tiers.device import DTYPES

posix = pytest.mark.skipif(os.name == "nt", reason="links and devices of POSIX")


def look_at(path: str | os.PathLike[str]) -> Model:
    files = LocalFiles()
    try:
        return asyncio.run(survey(files, path))
    finally:
        files.close()


def refused(where: Path, **expected: object) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        look_at(where)
    for name, value in expected.items():
        assert getattr(caught.value, name) == value, (name, caught.value)
        assert str(value) in str(caught.value), (name, caught.value)
    assert caught.value.remedy
    return caught.value


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **other}


GOOD = {"a.weight": entry(0, 4), "b.weight": entry(4, 10)}
DATA = bytes(range(10))


def folder(path: Path, files: dict[str, bytes], weight_map: object = None) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    if weight_map is not None:
        (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}))
    return path


# -- what is taken ----------------------------------------------------------------------------------------------------------


def test_one_file(tmp_path: Path) -> None:
    path = tmp_path / "any name.bin"
    path.write_bytes(raw(GOOD, DATA))
    found = look_at(path)
    start = 8 + len(json.dumps(GOOD))
    assert [(tensor.name, tensor.begin - start) for tensor in found.tensors] == [("a.weight", 0), ("b.weight", 4)]
    (file,) = found.files
    assert (file.path, file.nbytes, file.modified_ns) == (os.path.realpath(path), start + 10, path.stat().st_mtime_ns)
    assert file.header_bytes == start


def test_which_files_of_a_folder_are_the_model(tmp_path: Path) -> None:
    one, other = raw({"a": entry(0, 4)}, DATA[:4]), raw({"b": entry(0, 6)}, DATA[4:])
    by_index = folder(
        tmp_path / "index", {"1.safetensors": one, "2.safetensors": other, "0.safetensors": b"rubbish"}, {"a": "1.safetensors"}
    )
    assert [tensor.name for tensor in look_at(by_index).tensors] == ["a"]
    whole = folder(tmp_path / "whole", {WHOLE: one, "2.safetensors": b"rubbish"}, {"b": "2.safetensors"})
    assert [tensor.name for tensor in look_at(whole).tensors] == ["a"]
    every = folder(tmp_path / "all", {"m-10.safetensors": one, "m-9.safetensors": other, "config.json": b"{}"})
    assert [os.path.basename(file.path) for file in look_at(every).files] == ["m-9.safetensors", "m-10.safetensors"]


def test_an_index_says_which_of_two_files_is_meant(tmp_path: Path) -> None:
    both = raw({"a": entry(0, 4), "b": entry(4, 10)}, DATA)
    found = look_at(folder(tmp_path / "m", {"1": both, "2": both}, {"a": "2", "b": "1"}))
    assert [(tensor.name, found.files[tensor.file].path[-1]) for tensor in found.tensors] == [("b", "1"), ("a", "2")]


@posix
def test_a_snapshot_of_the_hugging_face_cache(tmp_path: Path) -> None:
    """Its files are links to blobs beside it; the caller may also come to it through links of his own."""
    home = tmp_path / "hub" / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    (home / "blobs" / "0123abcd").write_bytes(raw(GOOD, DATA))
    snapshot = folder(home / "snapshots" / "rev", {}, {"a.weight": "x.safetensors"})
    (snapshot / "x.safetensors").symlink_to("../../blobs/0123abcd")
    index = home / "blobs" / "index"
    (snapshot / INDEX).rename(index)
    (snapshot / INDEX).symlink_to("../../blobs/index")
    (tmp_path / "mine").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "mine", snapshot / "x.safetensors"):
        (file,) = look_at(path).files
        assert file.path == str(home / "blobs" / "0123abcd")


# -- what is not --------------------------------------------------------------------------------------------------------------


def test_no_such_path(tmp_path: Path) -> None:
    refused(tmp_path / "no", path=str(tmp_path / "no"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"1")
    assert "pytorch_model.bin" in str(refused(tmp_path / "empty"))
    for bad in (None, 3, b"\xff", "a\0b", "\udcff"):
        with pytest.raises((OptionError, ModelFileError)):
            look_at(bad)  # type: ignore[arg-type]


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    one = raw({"a": entry(0, 4)}, DATA[:4])
    missing = folder(tmp_path / "file", {"1": one}, {"a": "1", "lost": "2"})
    refused(missing, path=str(missing / "2"), tensor="lost")
    lacking = folder(tmp_path / "tensor", {"1": one}, {"a": "1", "lost": "1"})
    refused(lacking, path=str(lacking / "1"), tensor="lost")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "", "..", "a\\..\\..\\secret", "C:\\x", "a\0", "a/./", "\n"]
)
def test_an_index_that_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(raw(GOOD, DATA))
    path = folder(tmp_path / "m", {}, {"a.weight": name})
    refused(path, path=str(path / INDEX), tensor="a.weight")


@posix
@pytest.mark.parametrize("where", ["../secret", "absolute", "../../secret"])
def test_a_link_that_leads_out_of_its_folder(tmp_path: Path, where: str) -> None:
    """Also from a snapshot, if not to the blobs beside it."""
    (tmp_path / "secret").write_bytes(raw(GOOD, DATA))
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "secret").write_bytes(raw(GOOD, DATA))
    path = folder(tmp_path / "snapshots" / "m", {})
    (path / WHOLE).symlink_to(str(tmp_path / "secret") if where == "absolute" else where)
    error = refused(path)
    assert "secret" in str(error)
    assert "leads out" in str(error)
    assert look_at(os.path.realpath(path / WHOLE)).files  # who names the file itself may
    (path / "m.safetensors").write_bytes(raw(GOOD, DATA))
    (path / WHOLE).unlink()
    (path / WHOLE).symlink_to("m.safetensors")
    assert look_at(path).files, "within the folder links are fine"


@posix
def test_what_is_no_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {})
    os.mkfifo(path / WHOLE)
    refused(path, path=str(path / WHOLE))
    refused(path / WHOLE, path=str(path / WHOLE))
    (path / WHOLE).unlink()
    (path / WHOLE).mkdir()
    refused(path, path=str(path / WHOLE))


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b'{"weight_map": 3}', b'{"weight_map": {}}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": "1", "a": "1"}}'],
)
def test_an_index_that_is_none(tmp_path: Path, text: bytes) -> None:
    path = folder(tmp_path / "m", {"1": raw({"a": entry(0, 4)}, DATA[:4])})
    (path / INDEX).write_bytes(text)
    refused(path, path=str(path / INDEX))


def test_a_name_in_two_files(tmp_path: Path) -> None:
    one = raw({"a": entry(0, 4)}, DATA[:4])
    path = folder(tmp_path / "m", {"1.safetensors": one, "2.safetensors": one})
    error = refused(path, path=str(path / "2.safetensors"), tensor="a")
    assert str(path / "1.safetensors") in str(error)


def test_names_of_gaps_are_reserved(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw({"__tierstore_filler__0": entry(0, 10)}, DATA))
    refused(path, path=str(path), tensor="__tierstore_filler__0")


BAD: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", None),
    "too short": (b"\0\0\0", None),
    "no header": (struct.pack("<Q", 0), None),
    "cut off in the header": (raw(GOOD, DATA)[:30], None),
    "cut off in the data": (raw(GOOD, DATA)[:-1], None),
    "trailing bytes": (raw(GOOD, DATA + b"x"), None),
    "header longer than the file": (raw(GOOD, DATA, length=1 << 20), None),
    "header longer than allowed": (raw(GOOD, DATA, length=(1 << 63) + 5), None),
    "no JSON": (raw(b"{,}", DATA), None),
    "no object": (raw(b"[]"), None),
    "no text": (raw(b'{"\xff\xfe": 1}'), None),
    "a key twice": (raw(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}', b"x"), None),
    "deep": (raw(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), None),
    "overlapping": (raw({"a": entry(0, 6), "b": entry(4, 10)}, DATA), "b"),
    "aliased": (raw({"a": entry(0, 10), "b": entry(0, 10)}, DATA), "b"),
    "a hole": (raw({"a": entry(0, 4), "b": entry(5, 10)}, DATA), "b"),
    "a hole in front": (raw({"a": entry(1, 10)}, DATA), "a"),
    "unknown dtype": (raw({"a": entry(0, 10, dtype="U7")}, DATA), "a"),
    "no dtype": (raw({"a": entry(0, 10, dtype=3)}, DATA), "a"),
    "negative offset": (raw({"a": entry(-4, 6)}, DATA), "a"),
    "backwards": (raw({"a": {"dtype": "U8", "shape": [2], "data_offsets": [10, 8]}}, DATA), "a"),
    "huge offset": (raw({"a": {"dtype": "U8", "shape": [10], "data_offsets": [2**64, 2**64 + 10]}}, DATA), "a"),
    "negative size": (raw({"a": entry(0, 10, shape=[-10])}, DATA), "a"),
    "two negative sizes": (raw({"a": entry(0, 10, shape=[-5, -2])}, DATA), "a"),
    "sizes that overflow": (raw({"a": entry(0, 10, shape=[2**32, 2**32, 2**32])}, DATA), "a"),
    "sizes that wrap round to what is there": (raw({"a": entry(0, 10, shape=[2**63, 2, 5])}, DATA), "a"),
    "fractional size": (raw({"a": entry(0, 10, shape=[10.0])}, DATA), "a"),
    "a bool for a size": (raw({"a": entry(0, 1, shape=[True])}, DATA[:1]), "a"),
    "shape that does not fit": (raw({"a": entry(0, 10, shape=[9])}, DATA), "a"),
    "three offsets": (raw({"a": entry(0, 10, data_offsets=[0, 5, 10])}, DATA), "a"),
    "another member": (raw({"a": entry(0, 10, more=1)}, DATA), "a"),
    "an entry that is none": (raw({"a": 5}, DATA), "a"),
    "metadata that is none": (raw({"__metadata__": {"a": 5}, **GOOD}, DATA), None),
    "half a pair": (raw({"a": entry(0, 10, dtype="F4", shape=[4, 5])}, DATA), "a"),
    "F6": (raw({"a": entry(0, 6, dtype="F6_E2M3", shape=[8])}, DATA[:6]), "a"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files(tmp_path: Path, case: str) -> None:
    data, tensor = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    error = refused(path, path=str(path), **({"tensor": tensor} if tensor is not None else {}))
    if case == "F6":
        assert "torch has no dtype" in str(error)
    inside = folder(tmp_path / "folder", {"good.safetensors": raw({"g": entry(0, 1)}, b"x"), "bad.safetensors": data})
    refused(inside, path=str(inside / "bad.safetensors"))


# -- against the library ------------------------------------------------------------------------------------------------------

sizes = st.integers(0, 12) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64])
names = st.sampled_from(["a", "b", "c", "__metadata__", ""])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*sorted(ITEM_BYTES), *NOT_IN_TORCH, "X"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(sizes, min_size=1, max_size=3) | st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted),
    }
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file most of the time, then changed in a few places."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        stored = [*shape[:-1], 2 * shape[-1]] if dtype == "F4" and shape else shape
        nbytes = ITEM_BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": stored, "data_offsets": [end, end + nbytes]}
        end += nbytes
    for _ in range(draw(st.integers(0, 2))):
        what = draw(st.integers(0, 5))
        if what == 0:
            header[draw(names)] = draw(entries)
        elif header and what == 1:
            header.pop(draw(st.sampled_from(sorted(header))))
        elif header and what < 5:
            one = header[draw(st.sampled_from(sorted(header)))]
            if isinstance(one, dict) and "shape" in one:
                field = ("dtype", "shape", "data_offsets")[what - 2]
                one[field] = draw(entries)[field]
    data = bytearray(raw(header, b"\1" * max(0, end + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@given(data=files())
def test_what_we_take_the_library_takes_too(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """And reads the same; what it takes and we refuse has a reason that stands here."""
    path = tmp_path_factory.mktemp("m") / "m.safetensors"
    path.write_bytes(data)
    found = _try(path)
    if isinstance(found, TierstoreError):
        assert isinstance(found, ModelFileError)
        assert str(path) in str(found)
        assert _is_refused(path) or _is_stricter(str(found)), found
        return
    with safe_open(path, framework="pt") as opened:
        assert sorted(opened.keys()) == sorted(tensor.name for tensor in found.tensors)
        for tensor in found.tensors:
            value = opened.get_tensor(tensor.name)
            assert tuple(value.shape) == tensor.shape
            flat = value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
            assert bytes(flat.tolist()) == data[tensor.begin : tensor.begin + flat.numel()]


def _try(path: Path) -> Model | TierstoreError:
    try:
        return look_at(path)
    except TierstoreError as error:
        return error


def _is_refused(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                opened.get_tensor(name)
    except (SafetensorError, ValueError, RuntimeError, OverflowError, TypeError):
        return True
    return False


def _is_stricter(text: str) -> bool:
    """The library lets keys occur twice, members be more, numbers be written oddly; a pair of values may be cut by the end of a row."""
    return any(part in text for part in ("twice", "described by dtype", "values in a row", "not valid JSON", "not text to text"))


@given(dtypes=st.lists(st.sampled_from(sorted(ITEM_BYTES)), min_size=1, max_size=6), seed=st.integers(0, 1 << 20))
def test_what_the_library_saves_is_taken(dtypes: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("m") / "m.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, dtype in enumerate(dtypes):
        if dtype in ("F8_E8M0", "F4"):
            continue  # the library's writer does not know them
        raw_bytes = torch.randint(0, 2, (6 * ITEM_BYTES[dtype],), dtype=torch.uint8, generator=generator)
        tensors[f"t{index}"] = raw_bytes.view(DTYPES[dtype]).reshape(2, 3)
    save_file(tensors, path)
    found = look_at(path)
    assert {tensor.name: (tensor.shape, DTYPES[tensor.dtype]) for tensor in found.tensors} == {
        name: (tuple(value.shape), value.dtype) for name, value in tensors.items()
    }


# -- afterwards ---------------------------------------------------------------------------------------------------------------


def test_what_has_changed_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw(GOOD, DATA))
    (file,) = look_at(path).files

    def told() -> str | ModelFile:
        files = LocalFiles()
        try:
            return asyncio.run(look_again(files, file))
        finally:
            files.close()

    assert told() == file
    os.utime(path, ns=(1, 1))
    assert told() == replace(file, modified_ns=1), "a time alone means nothing"
    path.write_bytes(raw({**GOOD, "a.weight": entry(0, 4, dtype="I8")}, DATA))
    os.utime(path, ns=(file.modified_ns, file.modified_ns))
    assert "header" in str(told())
    path.write_bytes(raw(GOOD, DATA) + b"x")
    assert "bytes instead of" in str(told())
    path.unlink()
    assert told() == "is gone"
