"""minLSTM: an LSTM whose normalised gates do not look at the state, so that a scan can run it."""
