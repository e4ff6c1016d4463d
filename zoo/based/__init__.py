"""Based: linear attention whose weights are the Taylor series of the exponential."""
