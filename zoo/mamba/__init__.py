"""Mamba: a selective diagonal state space model."""
