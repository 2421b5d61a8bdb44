"""PEFT methods beside LoRA.

Read registry first; then loretta and switchlora, each laid out as a tuner of PEFT.
Imports layers and numerics.
"""
