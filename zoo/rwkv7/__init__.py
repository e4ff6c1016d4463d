"""RWKV-7 (Goose): a delta rule with decay and learning rate per channel, and a value residual over the layers."""
