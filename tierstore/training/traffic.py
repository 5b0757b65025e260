"""What a step moves over each link, from the settings alone: one function, derived from the order of leases. Pure.

[Note: What a step moves]
With A backward calls a step, the leases of a step are A times forward and backward over the layers, and one update of each. A block
that is leased is on the device; one that stays there from one lease to the next is not loaded again, and one that a lease has changed
is written back once before its place is given to another. So, W, G and S being the bytes of weights, gradients and state:

    weights     loaded for each forward and backward pass, 2A times, and once more for an update that is not next to a pass ("step").
                With masters the update writes them whole, and loads nothing. Frozen ones have no update, and are never written back.
    gradients   written whole by the first backward pass and not loaded for it, added to by the others, read by the update: loaded A times
                and written back A times. With "backward" they never leave the device.
    state       loaded and written back once: S each way. Masters are state.

Neither the number of micro-batches nor where their borders are appears: a layer is leased once for all of them.

[Note: Turns]
A pass ends where the next begins, and what the device still has there is used first: at the end of forward the last layers, whose
backward passes come next; at the end of backward the first layers and their gradients, whose updates or next forward passes come next;
and between an update and a forward pass in the same direction, a fixed part of the weights. At each turn the bytes in `kept` are not
loaded: the device's budget, less what the leases around the turn use up themselves (a chunk of state and of gradients, the weights of
a layer where they are not of those kept) and half as much again, for what is on its way while they compute. Where state does not fit RAM,
the policy goes by a plan for both tiers, which leaves `SLOTS` of the largest blocks to what passes through: what is kept is the rest.
This is what `lookahead` reaches from about the sixth step on ([Note: How far ahead] and [Note: Patience] in `placement`). It is within a
block or two of it: which ones are on the device when the turn comes depends on when copies end.

[Note: Weights that make way for state]
RAM is fullest at the end of backward, when all gradients wait. What updates from masters are to overwrite is not wanted back until then:
written to NVMe, such weights give their room to as much state, which is neither written nor read. With several backward calls it is at
the end of the others that RAM is fullest, where the weights are wanted again.

[Note: Why not all that turns keep counts]
A gradient that is still on the device when its update comes need not have been written back. But only "deferred" can know that it is
used up by then: after `step()` gradients are the user's until `zero_grad()`, so "step" has to write it back when its place is needed.
Weights that an update with masters overwrites need not be there for it, and it does not load them; that they are kept saves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ON_ITS_WAY = 0.5
"""What is on its way to the device, as a share of what is leased."""

SLOTS = 3
"""Blocks of the largest size that pass through a tier while others stay, in the plan for two tiers (`plan.OUTLINED`)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides how much a step moves. Bytes are those of blocks, with the gaps in them.

    Attributes:
        weights: Of trainable blocks of weights, all together.
        layer: Of the largest block of weights.
        state: Of the optimizer, masters included.
        state_chunk, gradient_chunk: Of the largest chunk of each. See `chunks`.
        gradients: One for each weight, whole.
        frozen: Of frozen blocks of weights.
        when: As in `TieredOptimizer`.
        masters: Whether updates write weights whole, from masters.
        accumulation: Backward calls a step.
        norms_unseen: Whether gradients are looked at a second time, for their norm: by a `clip_grad_norm_` of a kind that the backward pass
            did not know of, in the first step or with another norm.
        activations: Where inputs of layers wait for the backward pass.
        inputs: Their bytes, of one backward call.
        device: Budget of the device; None: it holds nothing from one lease to the next.
        resident: The share (rho in section 7 of the design) of the weights that stays on the device in any case, as it is held there.
        state_in_ram: The share (kappa there) of the state that RAM holds. See `share_in_ram`.
    """

    weights: int
    layer: int
    state: int
    state_chunk: int
    gradients: int
    gradient_chunk: int
    frozen: int = 0
    when: Literal["step", "deferred", "backward"] = "step"
    masters: bool = False
    accumulation: int = 1
    norms_unseen: bool = False
    activations: Literal["device", "ram", "nvme"] = "device"
    inputs: int = 0
    device: int | None = None
    resident: float = 0.0
    state_in_ram: float = 1.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes per step over each link."""

    h2d: float
    d2h: float
    nvme_read: float = 0.0
    nvme_write: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """Where one pass over the layers ends and the next begins.

    Attributes:
        kept: Bytes on the device that the next pass would otherwise load.
        saved: Of these, those that it would load in truth.
        unwritten: And those that are used up by it, so that they are never written back.
    """

    kept: float
    saved: float
    unwritten: float = 0.0


def traffic(settings: Settings) -> Traffic:
    """Bytes that a step moves over each link, once the policy knows the period. See [Note: What a step moves]."""
    backward_calls = settings.accumulation
    streamed = (1 - settings.resident) * settings.weights
    frozen = (1 - settings.resident) * settings.frozen
    passes = 2 * backward_calls
    if settings.masters:
        passes -= settings.when == "deferred"  # the first forward pass uses what the update has just written
    else:
        passes += settings.when == "step"
    stored = settings.when != "backward"
    h2d = passes * streamed + 2 * backward_calls * frozen + settings.state
    d2h = streamed + settings.state
    if stored:
        h2d += (backward_calls + settings.norms_unseen) * settings.gradients
        d2h += backward_calls * settings.gradients
    for turn in turns(settings):
        h2d -= turn.saved
        d2h -= turn.unwritten
    nvme = (1 - settings.state_in_ram) * settings.state
    # [Note: Weights that make way for state]
    spared = min(streamed, nvme) if settings.masters and stored and backward_calls == 1 else 0.0
    waiting = backward_calls * settings.inputs
    if settings.activations != "device":
        h2d += waiting
        d2h += waiting
    if settings.activations == "nvme":
        nvme += waiting
    return Traffic(h2d, d2h, nvme - spared, nvme)


def turns(settings: Settings) -> Iterator[Turn]:
    """The turns of one step. See [Note: Turns]."""
    if settings.device is None:
        return
    streamed = (1 - settings.resident) * (settings.weights + settings.frozen)
    device = settings.device - settings.resident * (settings.weights + settings.frozen)
    when, layer, gradient = settings.when, settings.layer, settings.gradient_chunk if settings.when != "backward" else 0
    update = settings.state_chunk + gradient  # what an update leases beside weights

    def kept(busy: float, most: float = streamed) -> float:
        passing = (1 + ON_ITS_WAY) * busy
        if settings.state_in_ram < 1:
            largest = max(layer, settings.state_chunk, gradient)
            passing = SLOTS * largest - (layer if busy == layer / 2 else 0)  # the layer at the turn is one of those that pass
        return min(max(0.0, device - passing), most)

    # From forward to backward: the layer at the turn is leased on both sides of it. With "deferred", updates precede it in the first pass.
    for number in range(settings.accumulation):
        bytes_kept = kept(update if when == "deferred" and number == 0 else layer / 2)
        yield Turn(bytes_kept, bytes_kept)
    # From backward to forward, where gradients are to be added to.
    for _ in range(settings.accumulation - 1):
        bytes_kept = kept(gradient)
        yield Turn(bytes_kept, bytes_kept)
    if when == "backward":
        bytes_kept = kept(settings.state_chunk)
        yield Turn(bytes_kept, bytes_kept)
        return
    # From backward to the update, or to the forward pass that begins with it: weights and gradients.
    together = streamed + settings.gradients
    bytes_kept = kept(settings.state_chunk, together)
    of_gradients = bytes_kept * settings.gradients / together
    saved = of_gradients if settings.masters else bytes_kept
    yield Turn(bytes_kept, saved, of_gradients if when == "deferred" else 0.0)
    # From the update to the next forward pass, in the same direction.
    if when == "step":
        bytes_kept = kept(update + layer / 2)
        yield Turn(bytes_kept, bytes_kept)


def share_in_ram(settings: Settings, ram: int) -> float:
    """`Settings.state_in_ram`: what RAM has left for state beside gradients, weights that are not resident, and what passes through it.

    Weights and gradients are used more often, so they stay. Gradients live from the backward pass to the update only, but the state is
    wanted back by then: room that is free in between is of no use to it ([Note: Room for what is yet to be written] in `placement`).

    Args:
        settings: Of the step.
        ram: Bytes of the RAM tier, without transfer space.
    """
    gradients = settings.gradients if settings.when != "backward" else 0
    passing = SLOTS * max(settings.layer, settings.state_chunk, settings.gradient_chunk)
    inputs = settings.inputs if settings.activations == "ram" else 0
    left = ram - (1 - settings.resident) * (settings.weights + settings.frozen) - gradients - inputs
    if left >= settings.state or not settings.state:
        return 1.0
    return min(1.0, max(0.0, (left - passing) / settings.state))
