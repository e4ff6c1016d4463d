"""What takes the place of modules of rnnzoo in a model's flat code, where there is one backend and no zoo."""
