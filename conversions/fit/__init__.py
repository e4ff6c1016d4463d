"""Closed forms, least squares and the division of a state budget: tensors in, tensors out."""
