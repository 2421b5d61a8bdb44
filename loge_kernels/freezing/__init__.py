"""Semantic-aware layer freezing: how many of the first layers a task can leave alone, and a model that leaves them.

`semantics` compares hidden states with labels, `trace` does so in every latent space, `gains` turns the trace into one
gain for each layer, `planning` and `plan` hold the result; `prefix`, `frozen_module` and `freeze` cut a model there.
"""
