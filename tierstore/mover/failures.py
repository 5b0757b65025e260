"""What callers are told of a failure: which block, which tier, which file, and that the newest copy is where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tierstore.errors import ClosedError, TierstoreError, TransferError
from tierstore.requests import Action, Order, Record
from tierstore.residency import Tier

_TIER = {Action.H2D: Tier.GPU, Action.D2H: Tier.RAM, Action.READ: Tier.NVME, Action.WRITE: Tier.NVME}
_DOING = {
    Action.H2D: "copying block {!r} from tier 'ram' to tier 'gpu'",
    Action.D2H: "copying block {!r} from tier 'gpu' to tier 'ram'",
    Action.READ: "reading block {!r} from tier 'nvme'",
    Action.WRITE: "writing block {!r} to tier 'nvme'",
}


def explained(order: Order, error: BaseException, path: str | None) -> BaseException:
    """The tree's error for what a transfer failed with.

    Args:
        order, error: What failed, and how; an error of the tree, or of a compaction, is returned as it is.
        path: The file concerned.
    """
    if isinstance(error, TierstoreError) or order.record is None:
        return error
    name = order.record.block.name
    return _transfer_error(error, _DOING[order.action].format(name), name, _TIER[order.action], path)


@contextmanager
def explaining(record: Record, tier: Tier, doing: str, path: str | None = None) -> Iterator[None]:
    """Turn whatever a caller's copy raises into the tree's error.

    Args:
        record, tier, path: Concerned.
        doing: As in "put() of block 'x'".

    Raises:
        TransferError: In place of any other `Exception` that is not of the tree.
    """
    try:
        yield
    except TierstoreError:
        raise
    except Exception as error:
        raise _transfer_error(error, doing, record.block.name, tier, path) from error


def _transfer_error(error: BaseException, doing: str, block: str, tier: Tier, path: str | None) -> TransferError:
    made = TransferError(
        f"{doing} failed: {error!r}" + (f" ({path})" if path is not None else ""),
        remedy="repeat the call; the newest copy is where it was",
        block=block,
        tier=tier.value,
        path=path,
    )
    made.__cause__ = error
    return made


def engine_failed(error: BaseException) -> ClosedError:
    """What everybody gets from an engine that cannot go on."""
    failure = ClosedError(f"the store's engine failed: {error!r}", remedy="open the directory again; the last commit is intact")
    failure.__cause__ = error
    return failure
