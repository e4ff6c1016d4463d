"""Salient: exact attention to a bounded number of tokens, the last ones and those that a score keeps."""
