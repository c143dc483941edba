"""Speed of lookups and training steps beside their peers, in one run: ``python -m benchmarks.speed``."""
