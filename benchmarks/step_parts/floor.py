"""The least time that a step can take, from its bytes, the links' rates and the compute time. Section 7 of the design has the formulas.

Nothing here counts what the store moves: bytes follow from the number of parameters.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.step_parts.links import Rates


@dataclass(frozen=True)
class Compute:
    """Seconds of a step with everything resident, each layer's forward pass computed again in backward."""

    forward: float
    backward: float
    update: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.update


@dataclass(frozen=True)
class Work:
    """What a step has to move.

    Attributes:
        parameters: P.
        resident: The share (rho) of the 16-bit weights that stays on the device.
        state_in_ram: The share (kappa) of the fp32 state, 12 bytes a parameter, that stays in RAM.
        weights_in_ram: The same of the weights that are not on the device.
        gradients_on_device: Whether they wait there for a clipped update.
        room: Bytes of the device that may be filled before they are needed; without training, that keep weights from one pass to the next.
        trains: False: forward only.
    """

    parameters: int
    resident: float = 1.0
    state_in_ram: float = 1.0
    weights_in_ram: float = 1.0
    gradients_on_device: bool = False
    room: int = 0
    trains: bool = True


@dataclass(frozen=True)
class Floor:
    """Seconds, and by what.

    Attributes:
        seconds: The floor.
        by: Seconds of each resource by itself.
        busiest: That which decides.
    """

    seconds: float
    by: dict[str, float]
    busiest: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def floor(work: Work, compute: Compute, rates: Rates, *, clipped: bool) -> Floor:
    """Of one step."""
    streamed = 2.0 * (1 - work.resident) * work.parameters  # bytes of 16-bit weights that pass through the device once
    state = 12.0 * work.parameters
    gradients = 2.0 * work.parameters if not work.gradients_on_device else 0.0
    if not work.trains:
        passing = max(0.0, streamed - work.room)
        by = {"compute": compute.forward, "h2d": link(passing, 0.0, rates), **_drive(passing * (1 - work.weights_in_ram), 0.0, rates)}
    elif not clipped:
        link_s = link(state + 2 * streamed, state + streamed, rates)
        nvme = (1 - work.state_in_ram) * state
        passing = (1 - work.weights_in_ram) * streamed
        by = {"compute": compute.total, "h2d and d2h": link_s, **_drive(nvme + 2 * passing, nvme + passing, rates)}
    else:
        # No update can precede the end of backward: what crosses the link in each of the two parts, beside what is computed in it.
        backward = max(compute.backward, link(streamed, gradients, rates))
        early = min(work.room, state) if work.room else 0.0
        second = link(state + gradients + streamed - early, state + streamed, rates)
        forward = max(compute.forward + compute.update, second)
        nvme = (1 - work.state_in_ram) * state
        passing = (1 - work.weights_in_ram) * streamed
        by = {
            "backward": backward,
            "update and forward": forward,
            "backward, then update and forward": backward + forward,
            **_drive(nvme + 2 * passing, nvme + passing, rates),
        }
    busiest = max(by, key=lambda name: by[name])
    return Floor(by[busiest], by, busiest)


def link(h2d: float, d2h: float, rates: Rates) -> float:
    """Seconds for so many bytes each way: both at once while both last, the rest alone."""
    together = min(h2d, d2h)
    return together / rates.median("both") + (h2d - together) / rates.median("h2d") + (d2h - together) / rates.median("d2h")


def _drive(read: float, write: float, rates: Rates) -> dict[str, float]:
    """Seconds that the drive takes: reads and writes at once, or one after the other, if it serves them so."""
    if not read and not write:
        return {}
    return {"nvme": max(read / rates.median("read"), write / rates.median("write"), (read + write) / rates.median("mixed"))}
