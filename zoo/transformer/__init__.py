"""The Llama-style Transformer: the common baseline."""
