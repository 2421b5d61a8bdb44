"""The time in which each policy comes to exact LoRA's held-out loss."""
