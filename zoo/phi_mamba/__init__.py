"""Discrete Mamba-2: Mamba-2 with B and C for each head, and nothing between the projections and the state."""
