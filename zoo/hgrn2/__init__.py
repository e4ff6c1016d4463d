"""HGRN2: linear attention whose keys are what the forget gates let go, with lower bounds that rise over the layers."""
