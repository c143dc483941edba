"""Hydra configs: strategy/, model/, data/, training/ and experiment/ groups."""
