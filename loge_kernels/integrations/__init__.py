"""Engines that hold the weights of an applied model, and trainers that apply it by a config.

fsdp: FSDP2, whose backward gathers no frozen weight; axolotl: a plug-in, whose options are in axolotl_section.
Imports conversion, layers, freezing, factors and numerics.
"""
