"""Mamba-2: a selective state space as gated linear attention with one decay per head."""
