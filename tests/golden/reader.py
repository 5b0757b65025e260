"""Reads a store's directory as tierstore/FORMAT.md describes it, with nothing of tierstore: what a stranger would write.

python reader.py DIR
"""

import json
import re
import sys
from math import prod
from pathlib import Path

import numpy as np
import xxhash

MANIFEST = re.compile(r"manifest-([0-9]{8,16})\.json")
TAIL = re.compile(rb',"checksum":"([0-9a-f]{16})"\}\n')
CHUNK = 16 << 20
KINDS = {"BOOL": "?", "I8": "i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8"}
KINDS |= {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}  # numpy has no bfloat16 and no 8-bit floats: their bits
KINDS |= dict.fromkeys(["U8", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F4"], "u1") | {"C64": "<c8"}


def xxh3(data):
    return xxhash.xxh3_64_intdigest(data)


def read_json(path):
    """A manifest or CURRENT; None if it is damaged or missing."""
    data = path.read_bytes() if path.exists() else b""
    tail = TAIL.fullmatch(data[-32:])
    return json.loads(data) if tail is not None and int(tail[1], 16) == xxh3(data[:-32]) else None


def read_manifest(path):
    manifest = read_json(path)
    if manifest is not None and manifest["format"] > 2:
        raise ValueError(f"format {manifest['format']}")
    return manifest


def read_adopted(block):
    """The tensors of one block that lies in model files, checked."""
    files = []
    for path, nbytes, modified, header, xxh in block["adopted"]["files"]:
        data = Path(path).read_bytes()
        assert (len(data), Path(path).stat().st_mtime_ns) == (nbytes, modified), "another file"
        assert xxh3(data[:header]) == int(xxh, 16), "another header"
        files.append(data)
    payload = bytearray(block["payload_bytes"])
    tensors = {}
    for (name, dtype, shape, offset), (file, begin) in zip(block["tensors"], block["adopted"]["places"], strict=True):
        tensors[name] = np.frombuffer(files[file], KINDS[dtype], prod(shape), begin).reshape(shape)
        payload[offset : offset + tensors[name].nbytes] = tensors[name].tobytes()
    sums = [xxh3(bytes(payload[start : start + CHUNK])) for start in range(0, len(payload), CHUNK)]
    assert block["chunks"] is None or sums == [int(chunk, 16) for chunk in block["chunks"]], "damaged payload"
    return tensors


def read_block(directory, block):
    """The tensors of one block, checked."""
    if block["adopted"] is not None:
        return read_adopted(block)
    data = (directory / block["file"]).read_bytes()
    assert len(data) == block["file_bytes"] == block["data_start"] + block["payload_bytes"]
    payload = data[block["data_start"] :]
    sums = [int(chunk, 16) for chunk in block["chunks"] or []]
    if block["chunks"] is not None:
        assert sums == [xxh3(payload[start : start + CHUNK]) for start in range(0, len(payload), CHUNK)], "damaged payload"
    digest = xxh3(b"".join(part.to_bytes(8, "little") for part in [xxh3(data[: block["data_start"]]), *sums]))
    assert digest == int(block["digest"], 16), "damaged header"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = {}
    for name, dtype, shape, offset in block["tensors"]:
        assert header[name]["data_offsets"][0] == offset
        tensors[name] = np.frombuffer(payload, KINDS[dtype], prod(shape), offset).reshape(shape)
    return tensors


def read(directory, generation=None):
    """(generation, metadata, {block: {tensor: array}}) of the newest generation, or of the one asked for."""
    numbers = {int(found[1]): path for path in Path(directory).iterdir() if (found := MANIFEST.fullmatch(path.name))}
    valid = {number: manifest for number, path in numbers.items() if (manifest := read_manifest(path)) is not None}
    current = read_json(Path(directory) / "CURRENT")
    stores = {manifest["store"] for manifest in valid.values()}
    store = current["store"] if current is not None else min(stores)
    assert stores == {store} if current is None else store in stores, "files of different stores"
    valid = {number: manifest for number, manifest in valid.items() if manifest["store"] == store}
    chosen = max(valid) if generation is None else generation
    blocks = {block["name"]: read_block(Path(directory), block) for block in valid[chosen]["blocks"]}
    return chosen, valid[chosen]["metadata"], blocks


if __name__ == "__main__":
    print(*read(sys.argv[1])[::2], sep="\n")
