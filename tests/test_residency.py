"""The table of states: every pair is either in it or raises, and the diagram is drawn from it."""

from __future__ import annotations

import itertools

import pytest

from tierstore.residency import NEXT, VALID, Event, State, Tier, diagram, step


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)), ids=lambda part: part.name)
def test_every_pair_is_legal_or_raises(state: State, event: Event) -> None:
    if (state, event) in NEXT:
        assert step(state, event) is NEXT[state, event]
    else:
        with pytest.raises(AssertionError, match=state.value):
            step(state, event)


def test_the_only_copy_is_never_dropped() -> None:
    for state in (State.DIRTY, State.SAVING, State.LOADING):
        assert (state, Event.DROP) not in NEXT


def test_nothing_becomes_valid_without_bytes() -> None:
    """A state becomes one that serves only when bytes arrived, were written in place, or were valid before."""
    for (state, event), target in NEXT.items():
        if target in VALID and state not in VALID:
            assert event in (Event.LOADED, Event.CREATED, Event.WRITE)
    assert not {State.ABSENT, State.RESERVED, State.LOADING, State.STALE} & VALID


def test_every_state_is_reached_and_left() -> None:
    reached, edge = {State.ABSENT}, [State.ABSENT]
    while edge:
        state = edge.pop()
        for (source, _), target in NEXT.items():
            if source is state and target not in reached:
                reached.add(target)
                edge.append(target)
    assert reached == set(State)
    for state in State:
        assert any(source is state for source, _ in NEXT)


def test_every_event_happens_somewhere() -> None:
    assert {event for _, event in NEXT} == set(Event)


def test_the_diagram_shows_the_table() -> None:
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == 2 + len(NEXT)
    for (state, event), target in NEXT.items():
        assert f"    {state.value} --> {target.value}: {event.value}" in lines


def test_tiers_are_their_names() -> None:
    assert [str(tier) for tier in Tier] == ["gpu", "ram", "nvme"]
    assert f"{Tier.GPU}" == "gpu"
    assert Tier("ram") is Tier.RAM
