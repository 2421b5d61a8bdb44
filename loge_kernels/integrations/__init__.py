"""Engines that hold the weights of an applied model.

fsdp is the only one: FSDP2, whose backward gathers no frozen weight.
Imports layers, freezing and factors.
"""
