"""Engines that hold the weights of an applied model, and trainers that apply it by a config.

fsdp: FSDP2 without frozen weights in backward, once the ranks agree (agreement); axolotl: a plug-in (axolotl_section).
Imports conversion, layers, freezing, factors and numerics.
"""
