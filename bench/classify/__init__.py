"""A real encoder on a real classification text."""
