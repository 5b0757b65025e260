"""The training loop by hand, over the store's public calls alone.

The whole training state lives in the store, three blocks per part of the model: `<part>`, its weights; `gradients/<part>`; and
`optimizer/<part>`, AdamW's two moments in fp32. Names that begin so are training state, which `tierstore export` leaves out. A part is on
the device only while it is leased. What the loop keeps between leases is the input of each layer, which the backward pass starts from,
and single numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tierstore import TierStore
from tierstore.demo import model
from tierstore.demo.audit import Audit


def block_names(part: str) -> tuple[str, str, str]:
    """The blocks of one part: weights, gradients, moments."""
    return part, f"gradients/{part}", f"optimizer/{part}"


def initialise(store: TierStore, config: model.Config) -> None:
    """Put the state of step 0 into the store, part by part: a model larger than memory is never whole anywhere."""
    for part in model.parts(config):
        weights = {f"{part}.{name}": tensor for name, tensor in model.initial_weights(config, part).items()}
        weights_block, gradients_block, moments_block = block_names(part)
        store.put(weights_block, weights)
        store.put(gradients_block, {name: torch.zeros_like(tensor) for name, tensor in weights.items()})
        moments = {f"{moment}.{name}": torch.zeros_like(tensor) for moment in ("exp_avg", "exp_avg_sq") for name, tensor in weights.items()}
        store.put(moments_block, moments)


def within(part: str, tensors: model.Weights) -> dict[str, Tensor]:
    """A part's tensors under the names that its function knows: "qkv" for "layer0.qkv"."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


@dataclass(slots=True)
class Trainer:
    """Runs steps over a store that `initialise`, or an earlier run's commit, has filled.

    Attributes:
        audit: Asked, between leases of some steps, whether the loop has kept what it must not.
    """

    store: TierStore
    config: model.Config
    audit: Audit

    def step(self, index: int, inputs: Tensor, targets: Tensor) -> float:
        """One optimizer step on (batch, context) tokens.

        Args:
            index: Counted from 0.

        Returns:
            The loss before the step, in nats per byte.
        """
        layer_inputs, x = self._forward(inputs)
        self.audit.between_leases(index, "after forward", [*layer_inputs, x])
        loss, norms = self._backward(inputs, targets, layer_inputs, x)
        del layer_inputs, x
        self.audit.between_leases(index, "after backward", [])
        self._update(index, norms)
        self.audit.between_leases(index, "after the update", [])
        return loss.item()

    def evaluate(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        """Mean loss over batches in nats per byte, without learning from them."""
        total = torch.zeros((), dtype=torch.float64)
        for inputs, targets in batches:
            _, x = self._forward(inputs, keep=False)
            with torch.no_grad(), self.store.use("head") as weights:
                total += model.loss(within("head", weights), x, targets.to(self.config.device)).item() * targets.numel()
        return float(total / sum(targets.numel() for _, targets in batches))

    @torch.no_grad()
    def _forward(self, inputs: Tensor, keep: bool = True) -> tuple[list[Tensor], Tensor]:
        """Returns the input of each layer (none without `keep`) and the output of the last."""
        layer_inputs = []
        with self.store.use("embedding") as weights:
            x = model.embed(within("embedding", weights), inputs.to(self.config.device))
        for index in range(self.config.layers):
            if keep:
                layer_inputs.append(x)
            with self.store.use(f"layer{index}") as weights:
                x = model.layer(within(f"layer{index}", weights), x, self.config.heads)
        return layer_inputs, x

    def _backward(self, inputs: Tensor, targets: Tensor, layer_inputs: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the head down, each part computed once more and differentiated. The gradients go into the store.

        Returns:
            The loss, and the norm of every gradient in the order of the parameters.
        """
        inputs, targets = inputs.to(self.config.device), targets.to(self.config.device)
        heads = self.config.heads
        norms: dict[str, list[Tensor]] = {}
        loss, slope, norms["head"] = self._part_backward("head", lambda w, x: model.loss(w, x, targets), x, None)
        del x
        for index in reversed(range(self.config.layers)):
            part = f"layer{index}"
            _, slope, norms[part] = self._part_backward(part, lambda w, x: model.layer(w, x, heads), layer_inputs.pop(), slope)
        _, _, norms["embedding"] = self._part_backward("embedding", lambda w, _: model.embed(w, inputs), None, slope)
        return loss, [norm for part in model.parts(self.config) for norm in norms[part]]

    def _part_backward(
        self, part: str, function: Callable[[model.Weights, Tensor], Tensor], x: Tensor | None, slope: Tensor | None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Recompute `function(weights, x)` and follow `slope`, the loss's derivative by its result, back through it.

        Returns:
            The result, the derivative by `x` (None without `x`), and the norm of each weight's gradient.
        """
        names = block_names(part)[:2]
        with self.store.use(*names, write=names[1:]) as (weights, gradients), torch.enable_grad():
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
            x = None if x is None else x.detach().requires_grad_()
            result = function(within(part, leaves), x)  # type: ignore[arg-type]  # the embedding takes no x and is given none
            sources = [*leaves.values()] if x is None else [*leaves.values(), x]
            found = torch.autograd.grad(result, sources, slope)
            for name, gradient in zip(leaves, found, strict=False):
                gradients[name].copy_(gradient)
            norms = [torch.linalg.vector_norm(gradients[name]) for name in leaves]
            return result.detach(), None if x is None else found[-1], norms

    @torch.no_grad()
    def _update(self, index: int, norms: list[Tensor]) -> None:
        """Clip by the global norm, as `clip_grad_norm_` does, and take one step of AdamW, part by part."""
        config = self.config
        total_norm = torch.linalg.vector_norm(torch.stack(norms))
        scale = torch.clamp(config.clip_norm / (total_norm + 1e-6), max=1.0)
        for part in model.parts(config):
            names = block_names(part)
            with self.store.use(*names, write=(names[0], names[2])) as (weights, gradients, moments):
                adamw(
                    list(weights.values()),
                    # Out of place: the gradients are then only read, and need not be written back a second time.
                    [gradients[name] * scale for name in weights],
                    [moments[f"exp_avg.{name}"] for name in weights],
                    [moments[f"exp_avg_sq.{name}"] for name in weights],
                    max_exp_avg_sqs=[],
                    state_steps=[torch.tensor(float(index)) for _ in weights],
                    foreach=False,
                    fused=False,
                    amsgrad=False,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    lr=model.learning_rate(config, index),
                    weight_decay=config.weight_decay,
                    eps=config.eps,
                    maximize=False,
                )
