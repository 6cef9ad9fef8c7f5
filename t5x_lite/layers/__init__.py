"""The layers: the only owners of parameters."""
