"""Gated linear attention: every channel of the keys forgets at a rate that depends on the token."""
