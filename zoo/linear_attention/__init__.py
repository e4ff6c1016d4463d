"""Linear attention: a feature map in the place of the softmax's exponential."""
