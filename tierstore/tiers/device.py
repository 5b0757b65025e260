"""The device tier: one allocation, and the tensors that blocks have in it."""

from __future__ import annotations

import functools

import torch

from tierstore.catalog import Block, BlockId, TensorSpec
from tierstore.errors import CapacityError, ClosedError
from tierstore.tiers.ram import map_memory

DTYPES: dict[str, torch.dtype] = {
    "F4": torch.float4_e2m1fn_x2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@functools.lru_cache(4096)
def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    result: list[int] = []
    step = 1
    for size in reversed(shape):
        result.append(step)
        step *= max(1, size)
    return tuple(reversed(result))


def view_of(storage: torch.UntypedStorage, device: torch.device, start: int, spec: TensorSpec) -> torch.Tensor:
    """The tensor `spec` of the block whose payload begins at byte `start` of `storage`.

    [Note: Tensors of one arena]
    Each is set on the storage by itself rather than sliced from one tensor: views of one base share a version counter, and a
    write to one block would then invalidate what autograd saved of another. In inference mode too they are ordinary tensors: they are kept
    for later leases, and inference tensors count no writes.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return view_of(storage, device, start, spec)
    dtype = DTYPES[spec.dtype]
    tensor = torch.empty(0, dtype=dtype, device=device)
    begin = (start + spec.offset) // dtype.itemsize
    return tensor.set_(storage, begin, spec.shape, strides(spec.shape))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements in row-major order, as uint8 in one dimension."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class DeviceArena:
    """`nbytes` on the compute device; ordinary memory when that is the CPU.

    Attributes:
        tensor: All of it, uint8.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.device = device
        self._views: dict[int, tuple[int, tuple[torch.Tensor, ...]]] = {}
        self._bases: dict[str, torch.Tensor] = {}  # all of it, by dtype
        try:
            if device.type == "cpu":
                memory = map_memory(nbytes)  # page-aligned, which torch's own allocator is not
                self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
                self.tensor.zero_()
            else:
                self.tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
                torch.cuda.synchronize(device)
        except (torch.OutOfMemoryError, OSError, OverflowError, RuntimeError) as error:
            raise CapacityError(
                "the device tier could not be reserved",
                need=f"{nbytes} bytes",
                have=str(error).split("\n")[0],
                remedy="lower gpu=",
                tier="gpu",
            ) from error
        if self.tensor.data_ptr() % 256:
            raise AssertionError("the device arena is not aligned to 256 bytes")
        self._storage: torch.UntypedStorage | None = self.tensor.untyped_storage()

    def tensors(self, number: int, block: Block, offset: int) -> tuple[torch.Tensor, ...]:
        """The block's tensors at `offset`, fresh objects on every call: no `.grad` outlives a lease.

        Raises:
            ClosedError: The memory is gone: the store was closed after it gave the lease.
        """
        cached = self._views.get(number)
        if cached is None or cached[0] != offset:
            storage = self._storage
            if storage is None:
                raise ClosedError("the store was closed", remedy="open a new TierStore")
            views = tuple(view_of(storage, self.device, offset, spec) for spec in block.tensors)
            cached = self._views[number] = (offset, views)
        return tuple([view.detach() for view in cached[1]])

    def plain_tensors(self, block: Block, offset: int) -> tuple[torch.Tensor, ...]:
        """The same for who lets autograd save nothing of them: views of one tensor, made in a third of the time.

        Raises:
            ClosedError: As `tensors`.
        """
        if self._storage is None:
            raise ClosedError("the store was closed", remedy="open a new TierStore")
        with torch.no_grad():  # so that writing into one while autograd records raises, instead of giving all of them a history
            return tuple([self._typed(spec, offset) for spec in block.tensors])

    def _typed(self, spec: TensorSpec, offset: int) -> torch.Tensor:
        base = self._bases.get(spec.dtype)
        if base is None:
            base = self._bases[spec.dtype] = self.tensor.view(DTYPES[spec.dtype])
        return base.as_strided(spec.shape, strides(spec.shape), (offset + spec.offset) // base.itemsize)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in this memory."""
        return self._storage is not None and tensor.untyped_storage().data_ptr() == self._storage.data_ptr()

    def invalidate(self, numbers: list[BlockId]) -> None:
        """These blocks' extents are about to hold something else: what autograd saved of them must not be used. Empties the list.

        The views' version counters move, so that a backward pass through them raises instead of giving wrong gradients.
        """
        for number in numbers:
            cached = self._views.pop(number, None)
            if cached is not None:
                torch.autograd.graph.increment_version(cached[1])
        numbers.clear()

    def close(self) -> None:
        """Let the memory go, as soon as the caller holds no tensor in it."""
        self._views.clear()
        self._bases.clear()
        del self.tensor
        self._storage = None
