"""Training on three tiers: a model, an optimizer, the user's own loop."""

from tierstore.training.initial import empty_parameters
from tierstore.training.layers import Tiered, attach
from tierstore.training.optimizer import TieredOptimizer
from tierstore.training.progress import progress

__all__ = ["Tiered", "TieredOptimizer", "attach", "empty_parameters", "progress"]
