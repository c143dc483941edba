"""What training can be told: one frozen dataclass, also a Hydra structured config."""

from __future__ import annotations

from dataclasses import dataclass

from embcomp.config import check_at_least, check_choice, check_field_types
from embcomp.errors import ConfigError
from recsys_models.training.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. The defaults are the recipe of BARS (Zhu et al., arXiv 2205.09626), without its L2.

    After an evaluation that does not improve the monitored metric, learning rates fall; after ``patience`` of them in
    a row training stops, and the weights of the best evaluation are restored. The test split is never looked at.

    Attributes:
        optimizer: one of `OPTIMIZERS`, for the network and, by default, for the tables.
        learning_rate: of the network.
        embedding_optimizer: for the tables' parameters; None for the same.
        embedding_learning_rate: for the tables' parameters; None for the same.
        embedding_l2: λ of ``λ/2 ||E||²`` over all stored rows, at every step, as in BARS; it decays the rows of the
            row stores, not scales, projections or the network. It is added to the gradient after clipping.
        batch_size: rows per step.
        eval_batch_size: rows at once in evaluations; None for the task's own.
        epochs: at most so many, in each phase of training.
        max_steps: at most so many steps, in each phase; None for no limit.
        float_epochs: epochs in which rows stay float32 before they are rounded to what will be served; low-bit rows
            train better so. Evaluations before that neither count as best nor against ``patience``.
        eval_steps: evaluate after every so many steps; None for after every epoch.
        monitor: metric of the validation split: ``"auc"`` or ``"log_loss"`` of clicks, ``"ndcg@10"``, ``"hr@20"``,
            ``"mrr@20"``, … of sessions; None for the task's first.
        min_delta: a smaller improvement is none.
        patience: evaluations in a row without improvement after which training stops; None for never.
        plateau_factor: what learning rates are multiplied by at a plateau; 1 for never.
        plateau_patience: evaluations in a row without improvement that are a plateau. With 1, chance says when rates
            fall; ``patience`` should be as many times higher.
        plateau_rewind: whether training goes on from the weights of the best evaluation after a plateau, instead of
            from where it is: tables overfit within an epoch, and a lower learning rate does not undo that.
        min_learning_rate: learning rates don't fall below.
        clip_norm: gradients are scaled down to this Euclidean norm; None for no limit.
        restore_best: whether the model ends with the weights of the best evaluation, or with the last.
        search_rows: rows of the validation split that candidates of a search are compared on, the same ones for all;
            None for the whole split. The best few are compared on the whole split in any case.
        search_at_once: candidates that are evaluated at once, on one lookup of their rows.
        seed: of the order of rows, and of torch's generators while training (dropout).
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
        progress: show a progress bar, where the output is a terminal.
    """

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    embedding_optimizer: str | None = None
    embedding_learning_rate: float | None = None
    embedding_l2: float = 0.0
    batch_size: int = 4096
    eval_batch_size: int | None = None
    epochs: int = 100
    max_steps: int | None = None
    float_epochs: int = 0
    eval_steps: int | None = None
    monitor: str | None = None
    min_delta: float = 1e-6
    patience: int | None = 2
    plateau_factor: float = 0.1
    plateau_patience: int = 1
    plateau_rewind: bool = False
    min_learning_rate: float = 1e-6
    clip_norm: float | None = 10.0
    restore_best: bool = True
    search_rows: int | None = 4096
    search_at_once: int = 8
    seed: int = 0
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        check_field_types(self)
        check_choice(self, "optimizer", tuple(OPTIMIZERS))
        if self.embedding_optimizer is not None:
            check_choice(self, "embedding_optimizer", tuple(OPTIMIZERS))
        for field in (
            "batch_size",
            "eval_batch_size",
            "epochs",
            "max_steps",
            "eval_steps",
            "patience",
            "plateau_patience",
            "search_at_once",
        ):
            check_at_least(self, field, 1)
        check_at_least(self, "search_rows", 2)
        for field in ("embedding_l2", "min_delta", "min_learning_rate", "seed", "float_epochs"):
            check_at_least(self, field, 0)
        for field in ("learning_rate", "embedding_learning_rate", "clip_norm", "plateau_factor"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ConfigError(f"TrainingConfig({field}={value!r}): must be above 0")
        if self.float_epochs >= self.epochs:
            raise ConfigError(
                f"TrainingConfig(float_epochs={self.float_epochs}): must be less than epochs={self.epochs}, "
                "so that what is served is trained too"
            )
        if self.plateau_factor > 1:
            raise ConfigError(f"TrainingConfig(plateau_factor={self.plateau_factor!r}): must be at most 1")
