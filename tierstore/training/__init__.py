"""Training on three tiers: a model, an optimizer, the user's own loop."""
