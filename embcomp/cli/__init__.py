"""The command line: ``embcomp plan``, ``embcomp compress``, ``embcomp inspect`` and ``embcomp strategies``."""

from embcomp.cli.main import main

__all__ = ["main"]
