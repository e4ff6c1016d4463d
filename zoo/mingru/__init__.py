"""minGRU: a GRU whose gate does not look at the state, so that a scan can run it."""
