"""What every benchmark shares: clocks, memory, the environment, ceilings, shapes, tables and files."""
