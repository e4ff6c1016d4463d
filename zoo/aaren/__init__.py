"""Aaren: softmax attention as a recurrent network, with a learned query."""
