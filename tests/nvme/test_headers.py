"""Headers of shards: real safetensors files, and nothing that is not one gets through."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tierstore.catalog import FILLER_PREFIX, ITEM_BYTES, PAGE, PAIRED, TENSOR_ALIGNMENT, Block, lay_out
from tierstore.errors import ShardError, SizeError, TensorError
from tierstore.nvme.safetensors import (
    BLOCK_KEY,
    build_header,
    check_can_be_read,
    header_bounds,
    header_length,
    num_values,
    parse_header,
)

texts = st.text(min_size=1, max_size=12).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
tensor_names = texts.filter(lambda text: not text.startswith(FILLER_PREFIX) and text != "__metadata__")


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    chosen = draw(st.lists(tensor_names, max_size=6, unique=True))
    shapes = st.lists(st.integers(0, 9), max_size=3)
    tensors = [(name, draw(st.sampled_from(sorted(ITEM_BYTES))), tuple(draw(shapes))) for name in chosen]
    return lay_out(draw(texts), [(name, dtype, shape or ((1,) if dtype in PAIRED else ())) for name, dtype, shape in tensors])


@given(block=blocks())
def test_round_trip(block: Block) -> None:
    header = build_header(block)
    assert len(header) % PAGE == 0
    parsed = parse_header(header, len(header) + block.nbytes)
    assert parsed.data_start == len(header)
    assert parsed.metadata == {"format": "pt", BLOCK_KEY: block.name}
    ours = {t.name: (t.dtype, t.shape, t.begin) for t in parsed.tensors if not t.name.startswith(FILLER_PREFIX)}
    assert ours == {spec.name: (spec.dtype, spec.shape, spec.offset) for spec in block.tensors}


@given(block=blocks())
def test_other_readers_accept_it(block: Block, tmp_path_factory: pytest.TempPathFactory) -> None:
    header = build_header(block)
    payload = bytearray(block.nbytes)
    for spec in block.tensors:
        payload[spec.offset : spec.offset + spec.nbytes] = bytes([1]) * spec.nbytes
    path = tmp_path_factory.mktemp("shard") / "shard.safetensors"
    path.write_bytes(header + payload)
    with safe_open(path, "pt") as shard:
        assert shard.metadata()[BLOCK_KEY] == block.name
        found = {name for name in shard.keys() if not name.startswith(FILLER_PREFIX)}  # noqa: SIM118 (it has no __iter__)
        assert found == {spec.name for spec in block.tensors}
    tensors = load_file(path)
    for spec in block.tensors:
        tensor = tensors[spec.name]
        assert tuple(tensor.shape) == spec.shape
        if tensor.numel():
            assert bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) == bytes([1]) * spec.nbytes
    path.unlink()


@given(block=blocks())
def test_tensors_are_aligned_in_the_file(block: Block) -> None:
    header = build_header(block)
    for tensor in parse_header(header, len(header) + block.nbytes).tensors:
        if not tensor.name.startswith(FILLER_PREFIX):
            assert (len(header) + tensor.begin) % TENSOR_ALIGNMENT == 0


@given(block=blocks(), data=st.data())
def test_mutations_are_refused_or_harmless(block: Block, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever happens to a header's bytes: it is refused, or it is one that the reference implementation takes as well."""
    header = bytearray(build_header(block))
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, min(len(header) - 1, 400)))] = data.draw(st.integers(0, 255))
    file_bytes = len(header) + block.nbytes
    try:
        parsed = parse_header(bytes(header[: 8 + header_length(bytes(header[:8]), file_bytes)]), file_bytes)
    except ShardError:
        return
    assert parsed.data_start + parsed.data_bytes == file_bytes
    assert sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in parsed.tensors) == parsed.data_bytes
    path = tmp_path_factory.mktemp("mutant") / "shard.safetensors"
    path.write_bytes(header + bytes(block.nbytes))
    with safe_open(path, "pt") as shard:
        assert len(shard.keys()) == len(parsed.tensors)
    path.unlink()


def test_a_file_of_the_usual_writer_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(7), "b": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "x.safetensors", {"k": "v"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    parsed = parse_header(raw[: 8 + header_length(raw[:8], len(raw))], len(raw))
    assert parsed.metadata == {"k": "v"}
    assert {t.name: (t.dtype, t.shape) for t in parsed.tensors} == {"a": ("I64", (7,)), "b": ("BF16", (2, 3))}


def raw_header(fields: object) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(begin: Any, end: Any, *, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


BAD = {
    "hole": {"a": tensor(0, 4), "b": tensor(6, 10)},
    "overlap": {"a": tensor(0, 6), "b": tensor(4, 10)},
    "alias": {"a": tensor(0, 10), "b": tensor(0, 10)},
    "trailing": {"a": tensor(0, 9)},
    "beyond": {"a": tensor(0, 11)},
    "backwards": {"a": tensor(0, 10), "b": {"dtype": "U8", "shape": [1], "data_offsets": [10, 9]}},
    "negative": {"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]}},
    "bool for a number": {"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
    "float": {"a": {"dtype": "U8", "shape": [10.0], "data_offsets": [0, 10]}},
    "huge": {"a": {"dtype": "U8", "shape": [2**62, 2**62], "data_offsets": [0, 10]}},
    "unknown dtype": {"a": tensor(0, 10, dtype="Q3")},
    "wrong size": {"a": tensor(0, 10, shape=[3])},
    "extra member": {"a": tensor(0, 10) | {"x": 1}},
    "missing member": {"a": {"dtype": "U8", "shape": [10]}},
    "metadata not text": {"__metadata__": {"a": 1}, "a": tensor(0, 10)},
    "list": [1],
    "twice": b'{"a":{"dtype":"U8","shape":[10],"data_offsets":[0,10]},"a":{"dtype":"U8","shape":[10],"data_offsets":[0,10]}}',
    "nan": b'{"__metadata__":NaN}',
    "not utf-8": b'{"\xff":1}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "cut off": b'{"a"',
}


@pytest.mark.parametrize("kind", BAD)
def test_hostile_headers(kind: str) -> None:
    header = raw_header(BAD[kind])
    with pytest.raises(ShardError):
        parse_header(header, len(header) + 10)


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**63, 2**64 - 1])
def test_lengths_are_checked_before_reading(length: int) -> None:
    with pytest.raises(ShardError):
        header_length(struct.pack("<Q", length), 1 << 40)
    with pytest.raises(ShardError):
        header_length(struct.pack("<Q", 1000), 500)
    with pytest.raises(ShardError):
        header_length(b"\x01\x02", 2)


def test_the_reference_refuses_what_we_call_holes(tmp_path: Path) -> None:
    """If readers ever become laxer, fillers could go."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_header(BAD["hole"]) + bytes(10))
    with pytest.raises(SafetensorError):
        load_file(path)


@pytest.mark.parametrize(
    "tensors",
    [
        [("w", "F32", (2**62, 0))],
        [("w", "F32", (1,) * 65)],
        [("n" * 100_000_000, "F32", (1,))],
        [("," * 9_000_000, "F32", (1,))],
    ],
    ids=["size", "dimensions", "name", "values"],
)
def test_what_no_reader_would_take_back_is_refused(tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """It was written, committed, and the directory could not be opened again."""
    with pytest.raises(SizeError):
        check_can_be_read(lay_out("b", tensors))


@given(st.lists(st.tuples(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 9), max_size=64)), max_size=6, unique_by=lambda t: t[0]))
def test_the_estimate_of_a_header_is_no_less_than_the_header(tensors: list[tuple[str, list[int]]]) -> None:
    """Whatever is allowed can be written and parsed: with limits at what is estimated."""
    try:
        block = lay_out("b", [(name, "U8", tuple(shape) if math.prod(shape) < 1 << 20 else (1,)) for name, shape in tensors])
    except TensorError:
        return  # names that no shard can hold
    check_can_be_read(block)
    header = build_header(block)
    bound_bytes, bound_values = header_bounds(block)
    assert len(header) <= bound_bytes + PAGE
    assert num_values(header) <= bound_values
