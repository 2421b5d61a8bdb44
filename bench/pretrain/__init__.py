"""Small LLaMAs from nothing: every parameter, LoRA, SwitchLoRA."""
