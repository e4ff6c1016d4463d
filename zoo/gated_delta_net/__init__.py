"""Gated DeltaNet: the delta rule on a state that decays, one rate per head and token; and gated attention beside it."""
