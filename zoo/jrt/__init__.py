"""JRT-RNN: Based, with an encoder that reads the whole prompt before the first token."""
