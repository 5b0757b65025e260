"""The error tree, grouped by what a caller can do next.

Every error says what was needed, what there was and how to mend it, and carries the same three as attributes
(`need`, `have`, `remedy`) beside whatever names the thing concerned (`block`, `tensor`, `tier`, `path`).
"""

from __future__ import annotations

from typing import Any


class TierstoreError(Exception):
    """Base of all errors raised on purpose by tierstore.

    Args:
        problem: What went wrong, one clause.
        need: What the call required.
        have: What there was instead.
        remedy: What the caller can do about it.
        details: Further attributes to carry, e.g. `block="w0"`, `tier="gpu"`.
    """

    def __init__(self, problem: str, *, need: object = None, have: object = None, remedy: str | None = None, **details: Any) -> None:
        self.problem = problem
        self.need = need
        self.have = have
        self.remedy = remedy
        self.details = details
        text = problem
        if need is not None:
            text += f"; needed {need}"
        if have is not None:
            text += f"; have {have}" if need is not None else f"; found {have}"
        if remedy is not None:
            text += f". To mend it: {remedy}"
        super().__init__(text)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["details"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


# -- mend the call ------------------------------------------------------------------------------------------------------


class SizeError(TierstoreError, ValueError):
    """A size that does not parse, or a budget this machine cannot give."""


class OptionError(TierstoreError, ValueError):
    """An option of the store that is unknown or contradicts another."""


class BlockNotFoundError(TierstoreError, KeyError):
    """No block of that name is in the store."""


class BlockExistsError(TierstoreError, ValueError):
    """A block of that name is already in the store."""


class TensorError(TierstoreError, ValueError):
    """A tensor that cannot be stored, or that does not match the block it should replace."""


class FrozenError(TierstoreError):
    """A frozen block was to be written."""


class LeaseError(TierstoreError, RuntimeError):
    """A lease was asked for or used in a way that can never work."""


class PlaceholderError(LeaseError):
    """A parameter of an attached model was used outside a lease, where it has no values."""


class TrainingError(TierstoreError, RuntimeError):
    """A model, a loop or an optimizer that cannot be trained as asked, or calls in an order that has no meaning."""


class DeadlockError(LeaseError):
    """Several holders of leases wait for one another; this request was chosen to fail so that the rest go on."""


class NoDirectoryError(TierstoreError, RuntimeError):
    """The call needs an NVMe tier and the store has none."""


# -- make room ----------------------------------------------------------------------------------------------------------


class CapacityError(TierstoreError):
    """A request that can never fit its tier as things stand."""


class TierFullError(CapacityError):
    """The drive is full, or `nvme_limit` is reached."""


# -- wait and try again -------------------------------------------------------------------------------------------------


class LeaseTimeoutError(TierstoreError, TimeoutError):
    """`timeout=` ended a wait; nothing was leased."""


class TransferError(TierstoreError, OSError):
    """A transfer failed. The newest copy is where it was; the call may be repeated."""


class BusyError(TierstoreError):
    """Another store has the directory open."""


# -- restore from elsewhere ---------------------------------------------------------------------------------------------


class ShardError(TierstoreError):
    """A shard or manifest is damaged: it does not hold what was written."""


class ModelFileError(ShardError):
    """A model file is damaged, gone, or not what it was when it was adopted; or a model folder is not what its index says."""


class DirectoryError(TierstoreError):
    """The directory cannot serve as a store: foreign files, not a directory, not writable, an unknown format."""


# -- open another store -------------------------------------------------------------------------------------------------


class ClosedError(TierstoreError, RuntimeError):
    """The store was closed, or its engine died."""


class ForkedError(ClosedError):
    """The store belongs to the parent of this forked process."""
