"""Liger: gated linear attention whose gates are its keys, beside a window of attention; no parameter of its own."""
