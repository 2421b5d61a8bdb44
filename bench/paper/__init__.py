"""A training step predicted from counted bytes and flops."""
