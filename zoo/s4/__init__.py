"""S4: a linear state space per channel whose matrix is diagonal plus low rank, started from HiPPO."""
