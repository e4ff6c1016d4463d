"""LSSL: linear state spaces with one dense trainable matrix."""
