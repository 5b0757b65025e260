"""Proof that the loop holds no state of its own between leases: a look at every tensor that Python can see."""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SMALL_BYTES = 4096
"""Tensors up to this size (norms, token windows, gains of a norm) are not state worth streaming."""

PATIENCE_S = 2.0
"""Autograd's device threads let go of a gradient a moment after `backward()` has returned; what is kept is still there then."""


class AuditError(AssertionError):
    """The training loop held a tensor between leases that should have been in the store alone."""


class Audit:
    """Looks for tensors outside the store at chosen steps.

    A tensor is a violation if it is larger than `SMALL_BYTES` and either shaped like a weight, gradient or moment, or of floating
    point and not among those the loop declares (the inputs of layers). Tensors that were there when the audit was made, before the
    run, are somebody else's.
    """

    def __init__(self) -> None:
        # Weakly: an id is used again once its owner is gone.
        self._others = {id(tensor): weakref.ref(tensor) for tensor in _living_tensors()}
        self._shapes: frozenset[tuple[int, ...]] = frozenset()
        self._steps: frozenset[int] = frozenset()
        self._arenas: frozenset[int] = frozenset()
        self.looks = 0

    def begin(self, shapes: Iterable[Sequence[int]], steps: Iterable[int], leased: Iterable[Tensor]) -> None:
        """Say what to look for.

        Args:
            shapes: Of all tensors in the store.
            steps: Steps at which to look; a look costs some 50 ms.
            leased: Tensors under lease: the memory that they lie in is the store's own.
        """
        self._shapes = frozenset(tuple(shape) for shape in shapes)
        self._steps = frozenset(steps)
        self._arenas = frozenset(tensor.untyped_storage().data_ptr() for tensor in leased)

    def between_leases(self, step: int, moment: str, declared: Sequence[Tensor]) -> None:
        """Look, if this is one of the chosen steps.

        Raises:
            AuditError: Something was kept.
        """
        if step not in self._steps:
            return
        self.looks += 1
        kept = self.find(declared)
        patience_until = time.monotonic() + PATIENCE_S
        while kept and time.monotonic() < patience_until:
            kept.clear()
            time.sleep(0.01)
            kept = self.find(declared)
        if kept:
            listed = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in kept[:5])
            raise AuditError(f"{moment} of step {step} the loop still held {len(kept)} tensors outside the store: {listed}")

    def find(self, declared: Sequence[Tensor]) -> list[Tensor]:
        """Violations alive now."""
        expected = {id(tensor) for tensor in declared}
        return [tensor for tensor in _living_tensors() if id(tensor) not in expected and self._is_violation(tensor)]

    def _is_violation(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or tensor.device.type == "meta" or math.prod(tensor.shape) * tensor.element_size() <= SMALL_BYTES:
            return False
        if tensor.untyped_storage().data_ptr() in self._arenas:
            return False
        known = self._others.get(id(tensor))
        if known is not None and known() is tensor:
            return False
        return tuple(tensor.shape) in self._shapes or tensor.is_floating_point()


def _living_tensors() -> list[Tensor]:
    things = gc.get_objects()
    # By type and not isinstance, which would wake up proxies and lazy modules; types first, since there are few of them.
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, Tensor)}
    return [thing for thing in things if type(thing) in kinds]
