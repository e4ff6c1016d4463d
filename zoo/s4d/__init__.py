"""S4D: a linear state space per channel whose matrix is diagonal."""
