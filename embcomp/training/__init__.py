"""Training: optimizers that cost bytes per batch, not per table."""

from embcomp.training.rowwise_adagrad import RowwiseAdagrad

__all__ = ["RowwiseAdagrad"]
