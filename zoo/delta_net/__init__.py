"""DeltaNet: linear attention that replaces what it has stored under a key."""
