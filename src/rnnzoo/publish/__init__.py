"""What makes a folder ready for others: a copy of a model, with its code in one file on request."""
