"""Manifests: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.catalog import ITEM_BYTES, PAIRED, lay_out
from tierstore.errors import DirectoryError, OptionError, ShardError
from tierstore.nvme import names
from tierstore.nvme.adopted import Adopted, ModelFile
from tierstore.nvme.checksums import CHUNK_BYTES, checksum, num_chunks, split_chunks
from tierstore.nvme.manifest import (
    Hint,
    Manifest,
    Record,
    ShardRecord,
    decode_hint,
    decode_manifest,
    encode_hint,
    encode_manifest,
    encode_metadata,
    encode_record,
)

texts = st.text(min_size=1, max_size=12).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
plain = texts.filter(lambda text: not text.startswith("_"))
sums = st.integers(0, 2**64 - 1)
identities = sums.map("{:016x}".format)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    records = []
    for number, name in enumerate(draw(st.lists(texts, max_size=4, unique=True)), 1):
        shapes = st.lists(st.integers(0, 3000), max_size=2).map(tuple)
        tensors = [
            (tensor, draw(st.sampled_from(sorted(ITEM_BYTES))), draw(shapes)) for tensor in draw(st.lists(plain, max_size=3, unique=True))
        ]
        tensors = [(tensor, dtype, shape or ((1,) if dtype in PAIRED else ())) for tensor, dtype, shape in tensors]
        block = lay_out(name, tensors, single=draw(st.booleans()), frozen=draw(st.booleans()))
        chunks = tuple(draw(sums) for _ in range(num_chunks(block.nbytes))) if draw(st.booleans()) else None
        if draw(st.booleans()):
            places = [(draw(st.integers(0, 1)), draw(st.integers(9, 1 << 40))) for _ in block.tensors]
            ends = [begin + spec.nbytes for (_, begin), spec in zip(places, block.tensors, strict=True)]
            files = tuple(
                ModelFile(
                    draw(texts.filter(lambda text: "\0" not in text)), max([9, *ends]), draw(st.integers(-(2**40), 2**62)), draw(sums), 9
                )
                for _ in range(2)
            )
            records.append(Record(block, ShardRecord("", 0, 0, 0, chunks, 0), Adopted(files, tuple(places))))
            continue
        records.append(Record(block, ShardRecord(names.shard_name(name, number), number, 4096 + block.nbytes, 4096, chunks, draw(sums))))
    return Manifest(draw(identities), draw(st.integers(0, 10**6)), len(records) + 1, draw(values), tuple(records))


def encode(manifest: Manifest) -> bytes:
    records = [encode_record(record) for record in manifest.records]
    return encode_manifest(manifest.store, manifest.generation, manifest.next_shard, encode_metadata(manifest.metadata), records)


@given(manifest=manifests())
def test_round_trip(manifest: Manifest) -> None:
    data = encode(manifest)
    assert json.loads(data)["generation"] == manifest.generation
    assert decode_manifest(data) == manifest


@given(manifest=manifests(), data=st.data())
def test_any_changed_or_missing_byte_is_seen(manifest: Manifest, data: st.DataObject) -> None:
    good = encode(manifest)
    where = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[where] ^= 1 << data.draw(st.integers(0, 7))
    for mutant in (bytes(bad), good[:where], good + b"\n", good[:where] + good[where + 1 :]):
        if mutant != good:
            with pytest.raises(ShardError):
                decode_manifest(mutant)


def forged(change: Any) -> bytes:
    """A manifest with a valid checksum whose fields `change` has altered."""
    block = lay_out("w", [("a", "F32", (10,)), ("b", "F32", (10,))])
    manifest = Manifest(
        "0123456789abcdef", 1, 2, None, (Record(block, ShardRecord("block-w-00000001.safetensors", 1, 8192, 4096, (5,), 6)),)
    )
    fields = json.loads(encode(manifest))
    del fields["checksum"]
    change(fields)
    body = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    return body + f',"checksum":"{checksum(body):016x}"}}\n'.encode()


def set_block(key: str, value: object) -> Any:
    return lambda fields: fields["blocks"][0].__setitem__(key, value)


def set_tensor(index: int, value: object) -> Any:
    return lambda fields: fields["blocks"][0]["tensors"][1].__setitem__(index, value)


LIES = {
    "path": set_block("file", "../block-w-00000001.safetensors"),
    "absolute": set_block("file", "/block-w-00000001.safetensors"),
    "other name": set_block("file", "passwd"),
    "device": set_block("file", "nul"),
    "file not text": set_block("file", 7),
    "file bytes": set_block("file_bytes", 8193),
    "payload not pages": set_block("payload_bytes", 4097),
    "payload negative": set_block("payload_bytes", -4096),
    "payload bool": set_block("payload_bytes", True),
    "payload too small": lambda fields: fields["blocks"][0].update(payload_bytes=0, file_bytes=4096),
    "data start": lambda fields: fields["blocks"][0].update(data_start=100, file_bytes=4196),
    "chunks": set_block("chunks", []),
    "chunk": set_block("chunks", ["xyz"]),
    "digest": set_block("digest", "-000000000000001"),
    "frozen": set_block("frozen", 1),
    "adopted": set_block("adopted", {"path": "/etc/passwd"}),
    "extra": set_block("extra", 1),
    "name": set_block("name", ""),
    "surrogate": set_block("name", "\ud800"),
    "tensor overlap": set_tensor(3, 0),
    "tensor beyond": set_tensor(3, 4096),
    "tensor unaligned": set_tensor(3, 264),
    "tensor dtype": set_tensor(1, "Q8"),
    "tensor shape": set_tensor(2, [-1]),
    "tensor huge": set_tensor(2, [2**61, 2**61]),
    "tensor twice": set_tensor(0, "a"),
    "tensor filler": set_tensor(0, "__tierstore_filler__0"),
    "tensor number": set_tensor(0, 3),
    "store": lambda fields: fields.update(store="0123456789ABCDEF"),
    "store short": lambda fields: fields.update(store="0123456789abcde"),
    "store not text": lambda fields: fields.update(store=123),
    "store of other digits": lambda fields: fields.update(store="\u0661" * 16),
    "no store": lambda fields: fields.pop("store"),
    "next shard": lambda fields: fields.update(next_shard=1),
    "generation": lambda fields: fields.update(generation=-1),
    "format": lambda fields: fields.update(format=0),
    # Python's True equals 1, JSON's true does not.
    "format bool": lambda fields: fields.update(format=True),
    "blocks": lambda fields: fields.update(blocks={}),
    "block": lambda fields: fields.update(blocks=[3]),
    "block twice": lambda fields: fields["blocks"].append(fields["blocks"][0]),
    "unknown member": lambda fields: fields.update(other=1),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_with_a_valid_checksum(lie: str) -> None:
    decode_manifest(forged(lambda fields: None))
    with pytest.raises(ShardError):
        decode_manifest(forged(LIES[lie]))


@given(store=identities, generation=st.integers(1, names.MAX_NUMBER // 2))
def test_current(store: str, generation: int) -> None:
    data = encode_hint(Hint(store, generation))
    assert json.loads(data).items() >= {"generation": generation, "store": store}.items()
    assert decode_hint(data) == Hint(store, generation)
    assert len(data) <= 256, "no more is read"
    for where in range(len(data)):
        flipped = bytearray(data)
        flipped[where] ^= 1
        assert decode_hint(bytes(flipped)) is None, "damage must not look like another store's"
        assert decode_hint(data[:where]) is None


def test_a_manifest_is_no_current() -> None:
    assert decode_hint(encode(Manifest("0" * 16, 1, 1, None, ()))) is None


def test_a_newer_format_is_refused_by_name() -> None:
    with pytest.raises(DirectoryError, match="format 7, written by a newer tierstore") as caught:
        decode_manifest(forged(lambda fields: fields.update(format=7, whatever=1)))
    assert caught.value.remedy == "update tierstore"


@pytest.mark.parametrize("metadata", [{1: 2}, {"a": {2: 3}}, object(), float("nan"), [float("inf")], b"x", {"a": {1, 2}}])
def test_metadata_must_be_json(metadata: object) -> None:
    with pytest.raises(OptionError):
        encode_metadata(metadata)


def test_metadata_that_contains_itself() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(OptionError):
        encode_metadata(loop)


@given(name=st.text(), number=st.integers(1, 10**12))
def test_file_names_stay_inside(name: str, number: int) -> None:
    file = names.shard_name(name, number)
    assert names.shard_number(file) == number
    assert names.is_ours(file)
    assert file.isascii()
    assert len(file) < 100
    assert file.startswith("block-")
    assert not set(file) & set('/\\:*?"<>| ')
    assert ".." not in file


@given(offset=st.integers(0, 3 * CHUNK_BYTES), nbytes=st.integers(0, 3 * CHUNK_BYTES))
def test_pieces_cover_the_range_within_chunks(offset: int, nbytes: int) -> None:
    end = offset
    for start, stop in split_chunks(offset, nbytes):
        assert start == end < stop
        assert start // CHUNK_BYTES == (stop - 1) // CHUNK_BYTES
        end = stop
    assert end == offset + nbytes
