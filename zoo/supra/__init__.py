"""SUPRA: linear attention that a Transformer is up-trained into."""
