"""What a computation depends on beside its arguments: the autocast state, attention's kernels, the random numbers. Captured and set again.

[Note: The same numbers twice]
A layer is computed in the forward pass and once more in the backward pass. Both run under the autocast state of the forward pass, with
its cache off: the cache keeps casts of weights for the whole region, which would outlive the lease and the weights' values. Attention may
take the kernels that it might take then: `sdpa_kernel()` is left before the backward pass begins. Both draw the same random numbers: the
generators are put back to where they were, and afterwards to where they had come.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierstore.training.probe import same


@dataclass(frozen=True, slots=True)
class Autocast:
    """The autocast state of one device type, as the forward pass found it."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def now(device_type: str) -> Autocast:
        return Autocast(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    @staticmethod
    def off(device_type: str) -> Autocast:
        return Autocast(device_type, False, torch.get_autocast_dtype(device_type))

    def again(self) -> contextlib.AbstractContextManager[object]:
        if not self.enabled and not torch.is_autocast_enabled(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


_CUDA = torch.backends.cuda  # by its name; what it says holds for the CPU's kernels too
_KERNELS: Sequence[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (_CUDA.flash_sdp_enabled, _CUDA.enable_flash_sdp),
    (_CUDA.mem_efficient_sdp_enabled, _CUDA.enable_mem_efficient_sdp),
    (_CUDA.math_sdp_enabled, _CUDA.enable_math_sdp),
    (_CUDA.cudnn_sdp_enabled, _CUDA.enable_cudnn_sdp),
]


@dataclass(frozen=True, slots=True)
class AttentionKernels:
    """Which kernels `scaled_dot_product_attention` may take, and in which order of preference: what `sdpa_kernel()` sets."""

    allowed: tuple[bool, ...]
    order: tuple[int, ...]

    @staticmethod
    def now() -> AttentionKernels:
        return AttentionKernels(tuple([allowed() for allowed, _ in _KERNELS]), tuple(torch._C._get_sdp_priority_order()))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        present = AttentionKernels.now()
        if present == self:
            yield
            return
        try:
            self._set()
            yield
        finally:
            present._set()

    def _set(self) -> None:
        for (_, allow), allowed in zip(_KERNELS, self.allowed, strict=True):
            allow(allowed)
        torch._C._set_sdp_priority_order(list(self.order))


@dataclass(frozen=True, slots=True)
class RandomState:
    """Where torch's generators are: the CPU's, and that of the store's device."""

    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        return RandomState(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def is_now(self, device: torch.device) -> bool:
        """Whether nothing was drawn since."""
        same = torch.equal(self.cpu, torch.get_rng_state())
        return same and (self.cuda is None or torch.equal(self.cuda, torch.cuda.get_rng_state(device)))

    def set(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


_NUMPY_BYTES = 625 * 4
"""Of the state of NumPy's global generator, unless the user has set another."""


@dataclass(frozen=True, slots=True, eq=False)
class NumpyState:
    """Where NumPy's global generator is.

    To ask it takes 35 µs, several times for each layer. So its memory is compared, which takes one: but where the second of two normal
    numbers waits, which is kept elsewhere.
    """

    state: Any
    memory: bytes | None

    @staticmethod
    def now() -> NumpyState:
        memory = _memory_of_numpy()
        known = None if memory is None else _LAST.get(memory)
        if known is None or known.state["has_gauss"]:
            known = NumpyState(np.random.get_state(legacy=False), memory)
            _LAST.clear()
            if memory is not None:
                _LAST[memory] = known
        return known

    def is_now(self) -> bool:
        if self.memory is not None and not self.state["has_gauss"]:
            return self.memory == _memory_of_numpy()
        return same(self.state, np.random.get_state(legacy=False))

    def set(self) -> None:
        np.random.set_state(self.state)


_LAST: dict[bytes, NumpyState] = {}
"""The one that was asked for last, by its memory."""


def _memory_of_numpy() -> bytes | None:
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    return ctypes.string_at(generator.ctypes.state_address, _NUMPY_BYTES) if type(generator) is np.random.MT19937 else None


@dataclass(frozen=True, slots=True)
class Generators:
    """Where random generators are: torch's, Python's and NumPy's."""

    of_torch: RandomState
    of_python: tuple[Any, ...]
    of_numpy: NumpyState

    @staticmethod
    def now(device: torch.device) -> Generators:
        return Generators(RandomState.now(device), random.getstate(), NumpyState.now())

    def are_now(self, device: torch.device) -> bool:
        """Whether nothing was drawn since."""
        return self.of_numpy.is_now() and self.of_python == random.getstate() and self.of_torch.is_now(device)

    def set(self, device: torch.device) -> None:
        self.of_torch.set(device)
        random.setstate(self.of_python)
        self.of_numpy.set()


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever is drawn within does not count."""
    before = RandomState.now(device)
    try:
        yield
    finally:
        before.set(device)


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Have nothing of a caller's inference mode, under which autograd notes nothing: a backward pass would find no gradients."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # it turns gradients on
        yield
