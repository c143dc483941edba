"""What a model is trained for: batches, loss and validation metrics; `fit` knows no more of data and models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from embcomp.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from recsys_models.training.config import TrainingConfig

RECALIBRATION_BATCHES = 20
"""Training batches that statistics of batch norms are taken from."""

Validate = Callable[[], dict[str, float]]
"""Evaluates a model on the validation split: metric -> value."""


class Stream(Protocol):
    """Batches in an order that depends on the seed and the epoch alone."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch, from number ``start`` on."""


class TaskSearch(Protocol):
    """How candidates of a search are compared; all values are such that higher is better."""

    most_at_once: int | None
    """Candidates that can be evaluated at once; None for any number."""

    def evaluate(self) -> float:
        """The monitored metric on the whole validation split."""

    def evaluate_many(self, number: int) -> list[float]:
        """The monitored metric of the candidates that the tables show, on a part of the split."""

    def recalibrate(self) -> None:
        """Run the model on some training batches."""


class Task(ABC):
    """A data set, and what models learn from it.

    Attributes:
        metrics: metric of the validation split -> 1 if higher is better, else -1; the first is monitored by default.
        name: of the data set.
        content_hash: of the data set.
    """

    metrics: ClassVar[Mapping[str, int]]
    name: str
    content_hash: str

    @abstractmethod
    def check(self, model: nn.Module, monitor: str) -> None:
        """Check that a model can be trained on the data, and selected by a metric.

        Raises:
            ConfigError: if the model was built for other data.
            InputError: if a split is empty, or the metric is undefined on it.
        """

    @abstractmethod
    def ready_(self, model: nn.Module) -> None:
        """Tell a model that was checked what it needs to know of the data to learn from it, before training begins."""

    @abstractmethod
    def batches(self, split: str, model: nn.Module, config: TrainingConfig, device: torch.device) -> Stream:
        """Shuffled batches to learn from, of split ``"train"`` or ``"validation"``."""

    @abstractmethod
    def num_rows(self, batch: Any) -> int:
        """Rows of a batch, by which losses are averaged."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model: logits, one row for each example."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, logits: Tensor) -> Tensor:
        """The mean loss of what `predict` gave, a scalar."""

    @abstractmethod
    def validation(self, model: nn.Module, config: TrainingConfig, device: torch.device) -> Validate:
        """Get ready to evaluate a model again and again."""

    @abstractmethod
    def search(self, model: nn.Module, config: TrainingConfig, device: torch.device) -> TaskSearch:
        """Get ready to compare candidates of a search."""

    def monitored(self, config: TrainingConfig) -> tuple[str, int]:
        """The metric that models are selected by, and its sign.

        Raises:
            ConfigError: if the task has no such metric.
        """
        name = next(iter(self.metrics)) if config.monitor is None else config.monitor
        if name not in self.metrics:
            known = did_you_mean(name, self.metrics)
            raise ConfigError(f"TrainingConfig(monitor={name!r}): {self.name} has no such metric; {known}")
        return name, self.metrics[name]
