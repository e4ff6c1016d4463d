"""LRU: a diagonal linear recurrence of complex numbers, with a stable parameterisation and a ring to start on."""
