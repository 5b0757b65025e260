"""Our policies keep the contract that is shipped for users' ones; and a policy that does not is caught by the check meant for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tierstore.catalog import BlockId
from tierstore.policies import Arc, Clock, Fifo, Lookahead, Lru, Policy, PolicyBase, S3Fifo, Sieve, Static, View, available, resolve
from tierstore.residency import Tier
from tierstore.testing.contracts import PolicyContract

OURS: dict[str, Callable[[], Policy]] = {
    "arc": Arc,
    "clock": Clock,
    "fifo": Fifo,
    "lookahead": Lookahead,
    "lru": Lru,
    "s3fifo": S3Fifo,
    "sieve": Sieve,
    "static": Static,
}
LEARNS = {"lookahead", "static"}
CHECKS = sorted(name for name in dir(PolicyContract) if name.startswith("test_"))


def contract(make: Callable[[], Policy], **settings: object) -> PolicyContract:
    suite = type("Suite", (PolicyContract,), {"make_policy": lambda self: make(), **settings})
    found = suite()
    assert isinstance(found, PolicyContract)
    return found


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", sorted(OURS))
def test_our_policies_keep_the_contract(name: str, check: str) -> None:
    settled = 100_000 if name in LEARNS else 20_000  # what learns a period remembers many accesses
    getattr(contract(OURS[name], settled_accesses=settled), check)()


def test_no_policy_of_ours_is_left_out() -> None:
    assert set(OURS) <= set(available())
    assert {name: type(resolve(name)) for name in OURS} == OURS


# -- policies that are wrong, each in one way ------------------------------------------------------------------------------------


class NoProtocol:
    """Only ranks."""

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        return iter(())


class Forgetful(Lru):
    """Names all but the last."""

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        named = list(super().victims(tier))
        return iter(named[:-1] if len(named) > 2 else named)


class Stuttering(Lru):
    """Names the first twice."""

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        named = list(super().victims(tier))
        return iter([*named[:1], *named])


class Turning(Lru):
    """Each question turns its order."""

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        named = list(super().victims(tier))
        if named:
            self._order[tier].move_to_end(named[0])
        return iter(named)


class Dice(Lru):
    """Draws from the generator that everybody shares."""

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        named = list(super().victims(tier))
        random.shuffle(named)
        return iter(named)


class OneByOne(Lru):
    """Believes that what it named first is what leaves."""

    def removed(self, block: BlockId, tier: Tier) -> None:
        self._order[tier].popitem(last=False)


class Prophet(Lookahead):
    """Says that everything is needed at once."""

    def next_use(self, block: BlockId) -> float:
        return self.forecast.now


class Hoarder(Lru):
    """Remembers every access."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[BlockId, bool]] = []

    def accessed(self, block: BlockId, write: bool) -> None:
        self.seen.append((block, write))


class Necromancer(Lru):
    """Keeps what was deleted, and asks about it."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[BlockId, None] = {}

    def accessed(self, block: BlockId, write: bool) -> None:
        self.known[block] = None

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        for block in self.known:
            self.view.is_dirty(block, tier)
        return super().victims(tier)


class Sorter(PolicyBase):
    """Sorts all there is for each victim."""

    def bind(self, view: View) -> None:
        self.view = view
        self.inside: dict[Tier, set[BlockId]] = {Tier.GPU: set(), Tier.RAM: set()}

    def admitted(self, block: BlockId, tier: Tier) -> None:
        self.inside[tier].add(block)

    def removed(self, block: BlockId, tier: Tier) -> None:
        self.inside[tier].remove(block)

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        return iter(sorted(self.inside[tier], reverse=True))


class Fragile(Lru):
    """Fails when it has to choose among many, as only a store makes it."""

    def admitted(self, block: BlockId, tier: Tier) -> None:
        super().admitted(block, tier)
        if type(self.view).__name__ != "FakeView" and len(self._order[tier]) > 3:
            raise RuntimeError("too many")


ONE = Lru()
WRONG: list[tuple[str, Callable[[], Policy]]] = [
    ("test_it_has_the_protocol", NoProtocol),  # type: ignore[list-item]
    ("test_it_has_the_protocol", lambda: ONE),
    ("test_victims_are_the_admitted_ones_each_once", Forgetful),
    ("test_victims_are_the_admitted_ones_each_once", Stuttering),
    ("test_victims_are_the_admitted_ones_each_once", Necromancer),
    ("test_asking_changes_nothing", Turning),
    ("test_it_is_deterministic", Dice),
    ("test_what_cannot_leave_is_passed_over", OneByOne),
    ("test_expectations_agree_with_each_other", Prophet),
    ("test_its_memory_is_bounded", Hoarder),
    ("test_its_cost_hardly_depends_on_the_number_of_blocks", Sorter),
    ("test_a_store_serves_the_newest_values_with_it", Fragile),
]


@pytest.mark.parametrize(("check", "make"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_policy_is_caught(check: str, make: Callable[[], Policy]) -> None:
    suite = contract(make, settled_accesses=20_000)
    with pytest.raises(Exception, match=r".") as caught:
        getattr(suite, check)()
    assert not isinstance(caught.value, NotImplementedError)


def test_every_check_catches_something() -> None:
    assert {check for check, _ in WRONG} == set(CHECKS)
