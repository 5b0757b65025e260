"""Norms of gradients, by which they are clipped: the bits of `torch.nn.utils.clip_grad_norm_` over tensors that are all resident.

[Note: Norms of a list]
On a GPU torch takes the norms of a list in one call, and the sum of each tensor does not depend on the others. Its kernel widens what it
reads to fp32 before anything is summed, and with `dtype=` leaves the result so: for 16 bits that is the norm of the widened gradient,
without a copy. It sums in another order where a tensor cannot be read by fours (`_reads_alike`). On the CPU torch takes each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LISTED = (1.0, 2.0, math.inf)
"""The norms that the kernel for lists knows; others are taken of each tensor by itself."""

NARROW = (torch.bfloat16, torch.float16)
ALIGNMENT = 64
"""Bytes to a multiple of which every tensor in the store, or with memory of its own, is aligned at least."""


def norms_of(gradients: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None) -> list[Tensor]:
    """Norms of row-major gradients, each as if it were widened and lay by itself. On their device, without waiting for it.

    Args:
        gradients: Of any shapes and dtypes.
        norm_type: Of the p-norm.
        dtype: To which they are widened; None: each is taken as it is.
    """
    found: dict[int, Tensor] = {}
    lists: dict[torch.dtype, list[int]] = {}
    for number, gradient in enumerate(gradients):
        if _may_be_listed(gradient, norm_type, dtype):
            lists.setdefault(gradient.dtype, []).append(number)
        else:  # one at a time: what is widened takes room
            found[number] = _norm(gradient, norm_type, dtype)
    for numbers in lists.values():  # a list of several dtypes is not taken in one
        norms = torch._foreach_norm([gradients[number] for number in numbers], norm_type, dtype=dtype)
        found.update(zip(numbers, norms, strict=True))
    return [found[number] for number in range(len(gradients))]


def _may_be_listed(gradient: Tensor, norm_type: float, dtype: torch.dtype | None) -> bool:
    """Whether the kernel for lists gives the bits that it would give of the widened gradient alone."""
    if not gradient.is_cuda or norm_type not in LISTED:
        return False
    same = dtype is None or dtype is gradient.dtype
    if same and gradient.dtype not in (torch.float32, *NARROW):
        return False
    if not same and not (dtype is torch.float32 and gradient.dtype in NARROW):
        return False
    return _reads_alike(gradient)


def _reads_alike(gradient: Tensor) -> bool:
    """Whether it is read by fours, or not, as a tensor with memory of its own would be."""
    return gradient.numel() % 4 != 0 or gradient.data_ptr() % (4 * gradient.itemsize) == 0


def _norm(gradient: Tensor, norm_type: float, dtype: torch.dtype | None) -> Tensor:
    if not gradient.is_cuda:
        norm: Tensor = torch.linalg.vector_norm(gradient if dtype is None else gradient.to(dtype), norm_type)
        return norm
    own = gradient.to(gradient.dtype if dtype is None else dtype, copy=gradient.data_ptr() % ALIGNMENT != 0)
    return torch._foreach_norm([own], norm_type)[0]


def total_norm(norms: list[Tensor], norm_type: float) -> Tensor:
    """The norm of norms. As torch, which takes those of one dtype after the other where gradients have several."""
    if not norms:
        return torch.tensor(0.0)
    if len({norm.dtype for norm in norms}) > 1:
        lists: list[list[Tensor | None]] = [list(norms)]
        of_dtypes = torch.utils._foreach_utils._group_tensors_by_device_and_dtype(lists)
        norms = [norm for (grouped, _) in of_dtypes.values() for norm in grouped[0] if norm is not None]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return total


def clip_coefficient(total: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients by, as `torch.nn.utils.clip_grads_with_norm_` has it: without looking at it, which would wait."""
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)
