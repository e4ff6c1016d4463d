"""RetNet: linear attention with rotation and a fixed decay per head."""
