"""A page on this machine that shows a model at work beside its teacher: text, speed and memory as they come about."""
