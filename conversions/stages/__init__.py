"""Stages of a conversion: calibrate (closed form), align and train (Trainer subclasses)."""
