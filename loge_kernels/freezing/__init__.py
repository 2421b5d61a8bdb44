"""Semantic-aware layer freezing: how many of the first layers a task can leave alone, and a model that leaves them.

Read semantics, trace, gains and plan_freezing for where to cut; prefix, frozen_module and freeze for the cut.
Imports numerics, collectives and batches.
"""
