"""GateLoop: linear recurrence whose complex decay the data control, magnitude and phase."""
