"""A training step of a LLaMA-shaped model, each policy in turn."""
