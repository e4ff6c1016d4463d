"""RWKV-5 (Eagle): linear attention with a constant decay per channel and a bonus, between token shifts."""
