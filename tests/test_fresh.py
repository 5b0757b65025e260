"""What a lease writes whole: nobody loads it before, and RAM keeps room for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from tests.test_scheduler import Sim
from tierstore.catalog import PAGE
from tierstore.policies import Lookahead
from tierstore.policies.plan import OUTLINED
from tierstore.requests import Action, Order, Record
from tierstore.residency import Tier

BLOCKS = 12


class Training(Sim):
    """Leases that write blocks whole, or use them up, and a count of all transfers, in pages, by the first letter of the block."""

    def __init__(self, *, gpu: int, ram: int, has_nvme: bool = True) -> None:
        super().__init__(gpu=gpu, ram=ram, has_nvme=has_nvme, policy=Lookahead())
        self.moved: Counter[tuple[Action, str]] = Counter()

    def _start(self, order: Order) -> None:
        if order.record is not None:
            self.moved[order.action, order.record.block.name[0]] += order.nbytes // PAGE
        super()._start(order)

    def train(self, gradients: Sequence[Record], order: Sequence[Record], *, learnt: int) -> None:
        """Some steps, and five more that alone are counted: gradients written, the last first, then gradients used up and state written."""
        for period in range(learnt + 5):
            if period == learnt:
                self.moved.clear()
            for gradient in reversed(gradients):
                self.use(gradient, fresh=True)
            for record in order:
                if record in gradients:
                    self.use(record, spent=True)
                else:
                    self.use(record, write=True)


def test_what_will_be_written_whole_is_not_loaded() -> None:
    """Weights with masters: read in two passes, then overwritten."""
    sim = Training(gpu=4, ram=BLOCKS + 4, has_nvme=False)
    weights = [sim.put(f"w{number}", 1) for number in range(BLOCKS)]
    for period in range(8):
        if period == 4:
            sim.moved.clear()
        for weight in weights:
            sim.use(weight)
        for weight in reversed(weights):
            sim.use(weight)
        for weight in weights:
            sim.use(weight, fresh=True)
    # Two of three uses need the content. Forward to backward, and update to forward, some of four are there still.
    assert sim.moved[Action.H2D, "w"] <= 4 * (2 * BLOCKS - 2 * 2)
    assert sim.moved[Action.D2H, "w"] <= 4 * BLOCKS


def test_what_is_written_soon_after_it_was_written_whole_is_not_loaded_in_between() -> None:
    """An update put off to right before the pass that uses the weights."""
    sim = Training(gpu=4, ram=2 * BLOCKS + 4, has_nvme=False)
    weights = [sim.put(f"w{number}", 1) for number in range(BLOCKS)]
    states = [sim.put(f"s{number}", 1) for number in range(BLOCKS)]
    for period in range(8):
        if period == 4:
            sim.moved.clear()
        for weight, state in zip(weights, states, strict=True):
            sim.use(weight, fresh=True)
            sim.use(state, write=True)
            sim.use(weight)
        for weight in reversed(weights):
            sim.use(weight)
    assert sim.moved[Action.H2D, "w"] <= 4 * BLOCKS
    assert sim.moved[Action.H2D, "s"] <= 4 * BLOCKS


@pytest.mark.parametrize("ram", [BLOCKS + 8, 2 * BLOCKS, 2 * BLOCKS + 8])
def test_ram_keeps_room_for_what_is_yet_to_be_written(ram: int) -> None:
    """Gradients leave room between two backward passes; state that is fetched into it would have to leave again."""
    sim = Training(gpu=3, ram=ram)
    gradients = [sim.declare(f"g{number}", 1) for number in range(BLOCKS)]
    states = [sim.put(f"s{number}", 1) for number in range(2 * BLOCKS)]
    order = [record for number, gradient in enumerate(gradients) for record in (gradient, *states[2 * number : 2 * number + 2])]
    sim.train(gradients, order, learnt=5)
    streamed = len(states) - (ram - len(gradients) - OUTLINED - 1)  # one more than the plan leaves is still on the device
    assert sim.moved[Action.READ, "s"] <= 5 * streamed
    assert sim.moved[Action.WRITE, "s"] <= 5 * streamed
    assert sim.moved[Action.H2D, "s"] <= 5 * len(states)
    assert sim.moved[Action.READ, "g"] == sim.moved[Action.WRITE, "g"] == 0


def test_the_extent_of_what_is_being_written_is_not_given_to_what_comes() -> None:
    """State is fetched ahead while another block of it is leased; what is leased comes back to RAM, and pushes out nothing there."""
    sim = Training(gpu=2, ram=BLOCKS)
    states = [sim.put(f"s{number}", 1) for number in range(BLOCKS + 4)]
    for period in range(10):
        if period == 5:
            sim.moved.clear()
        for state in states:
            lease = sim.leased(sim.ask("main", (state,), (state,)))
            sim.settle()
            sim.release(lease)
            sim.settle()
    streamed = len(states) - (BLOCKS - OUTLINED)
    assert sim.moved[Action.READ, "s"] <= 5 * streamed
    assert sim.moved[Action.WRITE, "s"] <= 5 * streamed


def test_what_stays_on_the_device_is_promised_no_room_in_ram() -> None:
    """Gradients that wait on the device for their update: RAM is not to be emptied for them."""
    sim = Training(gpu=BLOCKS + 6, ram=BLOCKS + 6)
    gradients = [sim.declare(f"g{number}", 1) for number in range(BLOCKS)]
    states = [sim.put(f"s{number}", 1) for number in range(BLOCKS + 8)]
    order = [record for pair in zip(gradients, states[:BLOCKS], strict=True) for record in pair] + states[BLOCKS:]
    sim.train(gradients, order, learnt=7)
    streamed = len(states) - (sim.placement.arenas[Tier.RAM].capacity_bytes // PAGE - OUTLINED)
    assert sim.moved[Action.D2H, "g"] == 0, "they were to stay"
    assert sim.moved[Action.READ, "s"] <= 5 * streamed
    assert sim.moved[Action.WRITE, "s"] <= 5 * streamed


@pytest.mark.parametrize("deferred", [False, True])
def test_ram_keeps_room_for_what_will_come_down(deferred: bool) -> None:
    """Some weights stay on the device from one pass to the next, and then come down changed; RAM is full of the others and of state."""
    gpu, ram = 10, 2 * BLOCKS
    sim = Training(gpu=gpu, ram=ram)
    weights = [sim.put(f"w{number}", 1) for number in range(BLOCKS)]
    states = [sim.put(f"s{number}", 1) for number in range(2 * BLOCKS)]
    for period in range(14):
        if period == 9:
            sim.moved.clear()
        for number, weight in enumerate(weights):
            if deferred:
                lease = sim.leased(sim.ask("main", (weight,), (weight,)))
                for state in states[2 * number : 2 * number + 2]:
                    sim.use(state, write=True)
                sim.release(lease)
            sim.use(weight)
        for number, weight in reversed(list(enumerate(weights))):
            for state in states[2 * number : 2 * number + 2] if not deferred else ():
                sim.use(state, write=True)
            sim.use(weight, write=not deferred)
    streamed = len(weights) + len(states) - (gpu - OUTLINED) - (ram - OUTLINED)
    assert sim.moved[Action.READ, "w"] + sim.moved[Action.READ, "s"] <= 5 * (streamed + 2)
    assert sim.moved[Action.WRITE, "w"] + sim.moved[Action.WRITE, "s"] <= 5 * (streamed + 3)
