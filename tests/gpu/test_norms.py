"""Norms of lists on a GPU: the bits of widened tensors that have memory of their own."""

from __future__ import annotations

import math

import pytest
import torch

from tierstore.training.norms import norms_of

pytestmark = pytest.mark.cuda

SIZES = [1, 3, 4, 5, 64, 2047, 2048, 65535, 65536, 65537, 65540, 3 * 65536 + 4, 600 * 65536, 600 * 65536 + 2]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf, 3.0, 0.0])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, None),
        (torch.float32, None),
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, None),
    ],
    ids=str,
)
def test_the_same_bits_as_of_each_widened(dtype: torch.dtype, wide: torch.dtype | None, norm_type: float) -> None:
    torch.manual_seed(0)
    memory = torch.randn(sum(SIZES) + 64 * len(SIZES), device="cuda").to(dtype)
    for shift in range(9):
        gradients, start = [], shift
        for size in SIZES:
            gradients.append(memory[start : start + size])
            start += size + (-size) % 64
        norms = norms_of(gradients, norm_type, wide)
        for gradient, norm in zip(gradients, norms, strict=True):
            own = gradient.to(wide or dtype, copy=True)
            assert own.data_ptr() % 256 == 0
            (expected,) = torch._foreach_norm([own], norm_type)
            assert norm.dtype == expected.dtype
            assert torch.equal(norm, expected), (gradient.numel(), gradient.data_ptr() % 16)


def test_several_dtypes_at_once() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(70000, device="cuda").to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64)] * 2
    for wide in (None, torch.float64):
        norms = norms_of(gradients, 2.0, wide)
        for gradient, norm in zip(gradients, norms, strict=True):
            assert torch.equal(norm, torch._foreach_norm([gradient.to(wide or gradient.dtype)], 2.0)[0])
