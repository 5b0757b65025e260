"""What stands between the scheduler and a policy: however wrong the policy is, the store is only slower."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from inspect import getattr_static
from typing import TypeVar

from tierstore.catalog import BlockId
from tierstore.errors import OptionError
from tierstore.policies.base import Policy, View
from tierstore.policies.lru import Lru
from tierstore.residency import Tier

log = logging.getLogger("tierstore")
T = TypeVar("T")
_BOUND = "_tierstore_bound"


class Guard:
    """Asks the policy; from its first error on, LRU in its place.

    Raises:
        OptionError: On binding a policy object that another store uses or has used.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._given = policy
        self._resident: dict[Tier, dict[BlockId, None]] = {Tier.GPU: {}, Tier.RAM: {}}
        self._epoch = 0
        self._look_for_options()

    def _look_for_options(self) -> None:
        """Which optional questions the policy answers; `ranks_ahead`: whether `victims_for`."""
        self.ranks_ahead = callable(getattr_static(self._policy, "victims_for", None))
        stays = callable(getattr_static(self._policy, "stays", None))
        self._stays: Callable[[BlockId, Tier, int, float], bool | None] | None = self._policy.stays if stays else None  # type: ignore[attr-defined]
        repeats = callable(getattr_static(self._policy, "repeats", None))
        self._repeats: Callable[[int], int | None] | None = self._policy.repeats if repeats else None  # type: ignore[attr-defined]

    def bind(self, view: View) -> None:
        if getattr(self._given, _BOUND, False):
            raise OptionError(
                "policy= is an object that another store uses or has used",
                need="a policy of its own for each store",
                have=repr(self._given),
                remedy="pass its class or its name, or make a new object",
            )
        try:
            setattr(self._given, _BOUND, True)
        except AttributeError:  # it has slots: then nothing can be told
            log.debug("%r cannot be marked as used", self._given)
        self._view = view
        self._ask(lambda policy: policy.bind(view), None)

    def accessed(self, block: BlockId, write: bool) -> None:
        self._ask(lambda policy: policy.accessed(block, write), None)

    def touched(self, block: BlockId, tier: Tier) -> None:
        self._ask(lambda policy: policy.touched(block, tier), None)

    def admitted(self, block: BlockId, tier: Tier) -> None:
        self._resident[tier][block] = None
        self._ask(lambda policy: policy.admitted(block, tier), None)

    def removed(self, block: BlockId, tier: Tier) -> None:
        self._resident[tier].pop(block, None)
        self._ask(lambda policy: policy.removed(block, tier), None)

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        return self._checked(tier, lambda policy: policy.victims(tier))

    def victims_for(self, tier: Tier, position: int) -> Iterator[BlockId]:
        return self._checked(tier, lambda policy: policy.victims_for(tier, position))  # type: ignore[attr-defined]

    def _checked(self, tier: Tier, ask: Callable[[Policy], Iterator[BlockId]]) -> Iterator[BlockId]:
        try:
            for block in ask(self._policy):
                if not isinstance(block, int):
                    raise TypeError(f"victims() gave {block!r}, which is no block id")
                yield block
        except Exception as error:
            self._give_up(error)
            yield from self._policy.victims(tier)

    def stays(self, block: BlockId, tier: Tier, position: int, until: float = 0.0) -> bool | None:
        """As `Lookahead.stays`; None for a policy without it."""
        try:
            answer = self._stays(block, tier, position, until) if self._stays is not None else None
            return None if answer is None else bool(answer)
        except Exception as error:
            self._give_up(error)
            return None

    def repeats(self, position: int) -> int | None:
        """As `Lookahead.repeats`; None for a policy without it."""
        try:
            answer: object = self._repeats(position) if self._repeats is not None else None
        except Exception as error:
            self._give_up(error)
            return None
        return answer if isinstance(answer, int) else None

    def next_use(self, block: BlockId) -> float:
        try:  # as `_ask` does, in a third of the time: these are asked for each candidate of each decision
            answer: object = self._policy.next_use(block)
        except Exception as error:
            self._give_up(error)
            return math.inf
        return answer if isinstance(answer, (int, float)) else math.inf

    def expected(self, position: int) -> BlockId | None:
        try:
            answer: object = self._policy.expected(position)
        except Exception as error:
            self._give_up(error)
            return None
        return BlockId(answer) if isinstance(answer, int) else None

    @property
    def epoch(self) -> int:
        try:
            answer: object = self._policy.epoch
        except Exception as error:
            self._give_up(error)
            return self._epoch
        return self._epoch + answer if isinstance(answer, int) else self._epoch

    def _ask(self, question: Callable[[Policy], T], otherwise: T) -> T:
        try:
            return question(self._policy)
        except Exception as error:
            self._give_up(error)
            return otherwise

    def _give_up(self, error: Exception) -> None:
        """The policy is a user's code, and a user's error must not cost him his tensors."""
        if isinstance(self._policy, Lru) and self._policy is not self._given:
            raise error
        log.error("policy %r failed and is replaced by lru: %r", self._given, error, exc_info=error)
        self._policy = Lru()
        self._look_for_options()
        self._policy.bind(self._view)
        self._view.measure(False)  # nobody else would say so
        self._epoch += 1
        for tier, blocks in self._resident.items():
            for block in blocks:
                self._policy.admitted(block, tier)
