"""RWKV-6 (Finch): linear attention whose decay and token shift depend on the data."""
