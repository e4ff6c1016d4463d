"""Hedgehog: an exact window and sinks beside a linear state, under one denominator."""
