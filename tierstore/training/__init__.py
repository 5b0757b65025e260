"""Training on three tiers: a model, an optimizer, the user's own loop."""

from tierstore.training.initial import empty_parameters
from tierstore.training.layers import Tiered, attach
from tierstore.training.loss import chunked_loss
from tierstore.training.optimizer import TieredOptimizer
from tierstore.training.progress import progress
from tierstore.training.rules import declare_elementwise

__all__ = ["Tiered", "TieredOptimizer", "attach", "chunked_loss", "declare_elementwise", "empty_parameters", "progress"]
