"""Hawk: the real-gated linear recurrent unit (RG-LRU) in every layer."""
