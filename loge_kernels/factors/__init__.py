"""What stands for a frozen weight in the activation gradient, how it is computed, and where it is kept.

Read factors first; then cache, subspaces, second_moment, statistics.
Imports numerics, files and collectives.
"""
