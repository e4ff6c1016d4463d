"""TOVA: attention that keeps a fixed number of tokens and drops the one that the last query weighs least."""
