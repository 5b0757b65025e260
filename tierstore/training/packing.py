"""Python values as JSON and tensors, and back, exactly. No pickle: what comes back is data, never code."""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from tierstore.errors import TensorError, TierstoreError, TrainingError

ARRAY_KINDS = "biuf"
"""Of NumPy's dtypes: booleans and numbers."""

_CONTAINERS: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    deque: "deque",
    torch.Size: "size",
}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter", defaultdict: "dict"}


def pack(value: Any, tensors: dict[str, Tensor], what: str = "state") -> Any:
    """A value as JSON. Tensors in it are put into `tensors` under names of their own.

    Args:
        value: Numbers, text, bytes, None, tensors, NumPy arrays, and containers of such.
        tensors: Is filled.
        what: Where the value comes from, for errors.

    Raises:
        TrainingError: Something else.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        number = pack(value.item(), tensors, what)
        return {"number": number, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "device": _place(value)}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        packed: dict[str, Any] = {"tensor": name, "device": _place(value)}
        if not value.is_contiguous() and is_dense(value.shape, value.stride()):  # in another layout kernels may compute other bits
            packed["stride"] = list(value.stride())
        return packed
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        if array.dtype.kind in ARRAY_KINDS and array.dtype.itemsize <= 8:
            name = str(len(tensors))
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
            return {"array": name, "dtype": array.dtype.str, "shape": list(array.shape), "scalar": not isinstance(value, np.ndarray)}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in _CONTAINERS:
        return {_CONTAINERS[type(value)]: [pack(item, tensors, what) for item in value]}
    if type(value) in _MAPPINGS:
        items = [[pack(key, tensors, what), pack(item, tensors, f"{what}[{key!r}]")] for key, item in value.items()]
        return {_MAPPINGS[type(value)]: items}
    raise TrainingError(
        f"{what} holds a {type(value).__name__}, which cannot be saved as data",
        need="numbers, text, tensors, and containers of such",
        remedy="leave it out of what state_dict() returns",
    )


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements lie in memory without gaps, each once."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _place(value: Tensor) -> str:
    return "cpu" if value.device.type == "cpu" else "device"


def unpack(packed: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """What `pack` was given. Tensors that were on the compute device come back on `device`.

    Raises:
        TensorError: `pack` does not write such.
    """
    with damaged_unless_sound():
        return _unpack(packed, tensors, device)


@contextmanager
def damaged_unless_sound() -> Iterator[None]:
    """What is read is anybody's: whatever does not fit is damage."""
    try:
        yield
    except TierstoreError:
        raise
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
        OverflowError,
        RecursionError,
        StopIteration,
        SafetensorError,
    ) as error:
        remedy = "restore the directory from a copy, or open an older generation="
        raise TensorError("block 'training/state' is damaged", have=f"{type(error).__name__}: {error}", remedy=remedy) from error


def _unpack(packed: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if packed is None or isinstance(packed, bool | int | float | str):
        return packed
    if not isinstance(packed, dict):
        raise TypeError(f"a bare {type(packed).__name__}")
    kind = next(iter(packed))
    content = packed[kind]
    if kind == "float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
    if kind == "number":
        number = torch.tensor(_unpack(content, tensors, device), dtype=_dtype(packed["dtype"])).reshape(packed["shape"])
        return number.to(_device(packed, device))
    if kind == "tensor":
        value, stride = tensors[content].clone(), packed.get("stride")
        if stride is not None:
            if not is_dense(value.shape, stride):
                raise ValueError(f"a stride of {stride}")
            value = torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(value)
        return value.to(_device(packed, device))
    if kind == "array":
        dtype = np.dtype(packed["dtype"])
        if dtype.kind not in ARRAY_KINDS:
            raise TypeError(f"an array of {dtype}")
        array = tensors[content].numpy().view(dtype).reshape(packed["shape"]).copy()
        return array[()] if packed["scalar"] else array
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "dtype":
        return _dtype(content)
    makers: dict[str, Any] = {name: maker for maker, name in _CONTAINERS.items()}
    if kind in makers:
        return makers[kind](_unpack(item, tensors, device) for item in content)
    pairs = {_unpack(key, tensors, device): _unpack(item, tensors, device) for key, item in content}
    return {"dict": dict, "ordered": OrderedDict, "counter": Counter}[kind](pairs)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"no dtype: {name!r}")
    return dtype


def _device(packed: Mapping[str, Any], device: torch.device) -> torch.device:
    return {"cpu": torch.device("cpu"), "device": device}[packed["device"]]
