"""The model, its optimizer and its schedule over a store, and one step of training with them."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tierstore.finetune.data import IGNORED, Batch
from tierstore.finetune.options import FinetuneError, Recipe
from tierstore.huggingface.models import from_pretrained, require
from tierstore.huggingface.positions import check_positions
from tierstore.sync import TierStore
from tierstore.training.layers import Tiered
from tierstore.training.loss import chunked_loss
from tierstore.training.optimizer import TieredOptimizer

log = logging.getLogger("tierstore")

CLOSE = 1e-4
"""How near the loss by pieces has to come to the model's own, as a share of it, to be the same loss rounded otherwise."""

TRIED_TOKENS = 8


class Tuning:
    """One process's model and optimizer; on a store that holds a commit, they go on from it.

    Attributes:
        by_pieces: Whether the loss is computed for a few tokens at a time.
        resumed: The metadata of that commit; None at the beginning.
    """

    def __init__(
        self, store: TierStore, folder: Path, recipe: Recipe, steps: int, activations: Any = "device", *, longest: int = 0
    ) -> None:
        """Make or resume it. `longest`: tokens of the longest sample, which must not be more than the model takes."""
        self.store = store
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.model, self.tiered = from_pretrained(
            folder,
            store,
            adapt=self._with_adapters if recipe.lora_rank is not None else None,
            dtype=recipe.dtype,
            micro_batch=recipe.micro_batch,
            activations=activations,
        )
        check_positions(self.model, longest, what="samples are too long", remedy="use --seq-len {most}")
        if any(weight.dtype is torch.float16 for weight in self.tiered.structure.weights):
            raise FinetuneError(
                "gradients in float16 vanish without a scaled loss, which this does not do: add --dtype bfloat16, or float32"
            )
        trained = [weight for weight in self.tiered.structure.weights if weight.requires_grad]
        masters = torch.float32 if any(weight.dtype in (torch.bfloat16, torch.float16) for weight in trained) else None
        self.has_masters = masters is not None
        self.optimizer = TieredOptimizer(
            self.tiered,
            torch.optim.AdamW,
            params=_groups(self.tiered, recipe.weight_decay),
            master_dtype=masters,
            when="deferred",
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(recipe, step, steps))
        self.by_pieces = self._can_go_by_pieces()
        self.model.train()
        self.resumed: dict[str, Any] | None = self.tiered.resume(schedule=self.schedule)

    @property
    def num_trained(self) -> int:
        return sum(weight.numel for weight in self.tiered.structure.weights if weight.requires_grad)

    @property
    def num_frozen(self) -> int:
        return sum(weight.numel for weight in self.tiered.structure.weights if not weight.requires_grad)

    @property
    def hidden_bytes(self) -> int:
        """Of one token between two layers."""
        width: int = self._plain().config.get_text_config().hidden_size
        dtype: torch.dtype = self._plain().dtype
        return width * dtype.itemsize

    def _with_adapters(self, model: Any) -> Any:
        require("peft")
        import peft  # noqa: PLC0415  # of an extra

        recipe = self.recipe
        targets: Any = recipe.lora_targets
        if targets != "all-linear":
            targets = [name.strip() for name in targets.split(",")]
        assert recipe.lora_rank is not None
        config = peft.LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha if recipe.lora_alpha is not None else 2 * recipe.lora_rank,
            lora_dropout=recipe.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # PEFT sets it right itself
                return peft.get_peft_model(model, config)
        except ValueError as error:
            raise FinetuneError(f"no adapters can be added to this model: {error}") from error

    # -- a step ----------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """One optimizer step. Returns the loss before it, in nats per token that counts, and the gradients' norm before clipping."""
        loss = self.loss(batch)
        loss.backward()
        norm = self.optimizer.clip_grad_norm_(self.recipe.clip) if self.recipe.clip else None
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss in nats per token that counts, without learning from it."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in batches:
            total += self.loss(batch).item() * batch.num_targets
            count += batch.num_targets
        self.model.train()
        return total / count

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the tokens that count, each after those before it."""
        device = self.store.device
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        mask = None if bool(batch.mask.all()) else batch.mask.to(device)
        if self.by_pieces:
            loss: Tensor = self.tiered.run(self._loss_by_pieces, tokens, targets, mask)
            return loss
        return self._own_loss(tokens, targets, mask)

    def _own_loss(self, tokens: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, attention_mask=mask, labels=targets, use_cache=False).loss
        return loss

    def _loss_by_pieces(self, tokens: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """The same without a tensor of all tokens times the vocabulary."""
        plain = self._plain()
        hidden = plain.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        shifted = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], 1)
        return chunked_loss(plain.get_output_embeddings(), hidden, shifted)

    def _plain(self) -> Any:
        return self.model.get_base_model() if self.recipe.lora_rank is not None else self.model

    @torch.no_grad()
    def _can_go_by_pieces(self) -> bool:
        """Whether this model's loss is that of its head on its last hidden state, which is found by trying: some cap or scale logits."""
        plain = self._plain()
        if plain.base_model is plain or plain.get_output_embeddings() is None:
            return False
        device = self.store.device
        tokens = (torch.arange(TRIED_TOKENS, device=device)[None] + 3) % plain.config.get_text_config().vocab_size
        self.model.eval()
        own = self.model(input_ids=tokens, labels=tokens, use_cache=False)
        ours = self.tiered.run(self._loss_by_pieces, tokens, tokens, None).item()
        logits = self.tiered.run(lambda: plain.get_output_embeddings()(plain.base_model(input_ids=tokens, use_cache=False)[0]))
        close = math.isclose(own.loss.item(), ours, rel_tol=CLOSE) and torch.equal(logits, own.logits)
        if not close:
            log.info("the loss of %s is its own: logits of all tokens of a batch are in memory at once", type(plain).__name__)
        return close


def factor(recipe: Recipe, step: int, steps: int) -> float:
    """Of the learning rate in a step, counted from 0."""
    if step < recipe.warmup:
        return (step + 1) / (recipe.warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    done = min(1.0, (step - recipe.warmup) / max(1, steps - recipe.warmup))
    return 1.0 - done if recipe.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def _groups(tiered: Tiered, weight_decay: float) -> Any:
    """Without decay what is no matrix: norms and biases."""
    trained = [weight for weight in tiered.structure.weights if weight.requires_grad]
    if not weight_decay:
        return None
    matrices = [weight.name for weight in trained if len(weight.shape) > 1]
    others = [weight.name for weight in trained if len(weight.shape) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
