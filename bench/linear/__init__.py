"""One frozen linear layer with LoRA against the dense product, PEFT and the unfused composition."""
