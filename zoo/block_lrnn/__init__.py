"""Block-diagonal, input-dependent linear recurrent network."""
