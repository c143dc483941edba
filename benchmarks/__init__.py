"""The Hydra sweep by memory budget, its report, and speed benchmarks."""
