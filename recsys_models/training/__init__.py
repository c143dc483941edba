"""Training of click and session models: one loop, resumable, with early stopping on the validation split."""

from recsys_models.training.config import TrainingConfig
from recsys_models.training.groups import make_optimizers, parameter_groups
from recsys_models.training.loop import fit
from recsys_models.training.optimizers import OPTIMIZERS
from recsys_models.training.result import Callback, Evaluation, PhaseResult, TrainingResult

__all__ = [
    "OPTIMIZERS",
    "Callback",
    "Evaluation",
    "PhaseResult",
    "TrainingConfig",
    "TrainingResult",
    "fit",
    "make_optimizers",
    "parameter_groups",
]
