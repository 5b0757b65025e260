"""The fine-tuning as a user would write it: an ordinary model, an ordinary loop, and `tierstore.training` around them.

The model is built without memory, its parameters go from the file into the store layer by layer, and each is on the device only while
it computes. The same loop with everything resident is in `plain.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tierstore import TierStore
from tierstore.demo.smollm2 import model as models
from tierstore.demo.smollm2.recipe import Recipe
from tierstore.training import TieredOptimizer, attach


class FineTuning:
    """A model and its optimizer over a store, which may hold them already: then they go on from its last commit.

    Attributes:
        model: To be called like any other module.
        state_bytes: Of parameters, gradients and AdamW's two moments together, were they all resident.
    """

    def __init__(self, store: TierStore, directory: Path, recipe: Recipe) -> None:
        config = models.load_config(directory)
        with torch.device("meta"):  # shapes alone: nothing is allocated
            self.model = LlamaForCausalLM(config)
        # No parameter, and in no file: the angles of the rotary embedding are computed from the configuration.
        self.model.model.rotary_emb = LlamaRotaryEmbedding(config).to(store.device)
        self.model.train()
        self.state_bytes = 4 * models.parameter_bytes(self.model)
        self.store = store
        self.recipe = recipe
        self.tiered = attach(self.model, store, layers=self.model.model.layers, init=directory / models.WEIGHTS)
        self.optimizer = TieredOptimizer(self.tiered, torch.optim.AdamW, lr=recipe.lr, when="deferred")

    def step(self, tokens: Tensor) -> float:
        """One optimizer step on (batch, window) tokens.

        Returns:
            The loss before the step, in nats per token.
        """
        loss = models.language_loss(self.model, tokens.to(self.store.device))
        loss.backward()
        self.optimizer.clip_grad_norm_(self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def evaluate(self, batches: list[Tensor]) -> float:
        """Mean loss over batches, in nats per token."""
        return models.evaluate(self.model, batches, self.store.device)
