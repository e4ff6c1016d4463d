"""The pictures of the documentation: concepts, and the plot of the README."""
