"""RWKV-4: a softmax average with decay per channel, between token shifts."""
