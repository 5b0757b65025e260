"""What training takes on the device beside the budget of the store.

[Note: Outside the budget]
Leased weights, gradients and state lie in the budget. What torch allocates while one layer runs does not, and nobody but the layer knows
how much that is; all else follows from the shapes. With N the bytes of a layer's input for the whole batch, and G those of its gradients:

    kept      the inputs of all layers, N each, until their backward passes; with activations="ram" or "nvme" only small ones. The
              gradients of layers whose update waits for their next forward pass, G each
    forward   the input, the outputs of all micro-batches, and those put together: 3 N
    backward  what one layer takes by itself for one micro-batch, its gradients included; the sums over micro-batches, G, and one more
              gradient that is being added to them; the layer's input, the gradient of its output, those of its inputs by micro-batch, and
              those put together: 4 N
    clip      where gradients are clipped, of the largest parameter: its gradient put together from its ranges, and widened; G and 4 N as
              above
    update    of one chunk: its gradients clipped or widened, and what the optimizer makes for itself (AdamW: twice as much); with
              "backward" the layer's gradients are there as well, G, and 4 N as above

With "deferred" an update is over before the layer runs. With "backward" it is made behind the layer's pass, or a part of it behind each
micro-batch of the next one's: then the gradients of two layers are there, G more than above in `backward` and in `update`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tierstore.training.activations import SMALL


@dataclass(frozen=True, slots=True)
class Shapes:
    """What decides how much is taken. All in bytes but for `layers`.

    Attributes:
        alone: What the largest layer takes by itself: the peak of its forward and backward pass on one micro-batch, everything resident,
            with its gradients and without its parameters and input.
        gradients: Of the largest layer's parameters.
        gradient: Of the largest parameter.
        inputs: Of a layer's input, all rows of one backward call.
        layers: How many there are.
        when: As in `TieredOptimizer`.
        activations: Where inputs wait for the backward pass.
        chunk: Of the gradients that one update takes at once, in the dtype of the masters. See `chunks`.
        widened: Of the largest parameter's gradient in the dtype of the masters, where gradients are clipped and there are masters.
        made: Of the state that one chunk's first step makes: it lies beside the store until that step is over. 0: of a later step.
        deferred_layers: As in `TieredOptimizer`.
        temporaries: What the optimizer makes for itself, in multiples of `chunk`.
    """

    alone: int
    gradients: int
    gradient: int
    inputs: int
    layers: int
    when: Literal["step", "deferred", "backward"]
    activations: Literal["device", "ram", "nvme"]
    chunk: int
    temporaries: float = 2.0
    widened: int = 0
    made: int = 0
    deferred_layers: int = 0


def bytes_outside(shapes: Shapes) -> int:
    """Bytes on the device beside the store's budget, at most. See [Note: Outside the budget]."""
    kept = shapes.layers * shapes.inputs if shapes.activations == "device" or shapes.inputs < SMALL else 0
    kept += shapes.deferred_layers * shapes.gradients
    forward = 3 * shapes.inputs
    backward = shapes.alone + shapes.gradients + shapes.gradient + 4 * shapes.inputs
    clip = shapes.gradients + shapes.gradient + shapes.widened + 4 * shapes.inputs
    update = round((1 + shapes.temporaries) * shapes.chunk) + shapes.made
    if shapes.when == "backward":
        update += 2 * shapes.gradients + 4 * shapes.inputs
        backward += shapes.gradients
    return kept + max(forward, backward, clip, update)
