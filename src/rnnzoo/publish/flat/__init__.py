"""What takes the place of modules of rnnzoo in the flat copy of a model's code, where there is one backend and no zoo."""
