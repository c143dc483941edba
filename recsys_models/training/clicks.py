"""Click prediction as a task: binary cross-entropy, judged by AUC and log loss."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embcomp.errors import ConfigError, InputError
from recsys_models.ctr import CTRModel
from recsys_models.data import Batch, Batches, ClickLog
from recsys_models.metrics import EVAL_BATCH_SIZE, evaluate
from recsys_models.training.click_search import ClickSearch
from recsys_models.training.config import TrainingConfig
from recsys_models.training.task import Task, Validate


class ClickTask(Task):
    """Models of `recsys_models.ctr` on a click log.

    Args:
        data: the splits; that for tests is not looked at.
    """

    metrics: ClassVar = {"auc": 1, "log_loss": -1}

    def __init__(self, data: ClickLog) -> None:
        self.data, self.name, self.content_hash = data, data.name, data.content_hash

    def check(self, model: nn.Module, monitor: str) -> None:
        """Check fields, dense features, splits and labels; see `Task.check`."""
        if not isinstance(model, CTRModel):
            raise ConfigError(
                f"{type(model).__name__} can't be trained on the click log {self.name}: take a model of "
                "recsys_models.ctr, or data of load_sessions for session models"
            )
        data, specs = self.data, model.tables.specs
        if len(data.fields) != len(specs) or len(data.dense_names) != model.num_dense:
            raise ConfigError(
                f"{data.name} has {len(data.fields)} fields and {len(data.dense_names)} dense features, but the model "
                f"has {len(specs)} tables and num_dense={model.num_dense}: build it for this data set"
            )
        for spec, known in zip(specs, data.fields, strict=True):
            if known.num_ids > spec.num_embeddings and model.tables.config.unseen == "error":
                raise ConfigError(
                    f"field {known.name!r} of {data.name} has {known.num_ids} ids, but table {spec.name!r} has "
                    f"{spec.num_embeddings}: give it as many, or set unseen='hash', 'zero' or 'oov_row'"
                )
        for name, split in (("train", data.train), ("validation", data.validation)):
            if not len(split):
                raise InputError(
                    f"the {name} split of {data.name} has no rows: load_dataset gives some to every split, shares of "
                    "80, 10 and 10 % with split='random' where that is an option; put rows there in a log of your own"
                )
        labels = data.validation.labels
        if monitor == "auc" and bool((labels == labels[0]).all()):
            raise InputError(
                f"all validation labels of {data.name} are {labels[0]:g}, so that the AUC is undefined: "
                "set monitor='log_loss', or split the data otherwise"
            )

    def ready_(self, model: nn.Module) -> None:
        """Do nothing: click models need to know nothing."""

    def batches(self, split: str, model: nn.Module, config: TrainingConfig, device: torch.device) -> Batches:
        """Batches of rows; a last one of a single row, on which batch norm can't train, is left out."""
        rows = self.data.train if split == "train" else self.data.validation
        if split == "validation" and len(rows) == 1:
            raise InputError(
                f"the validation split of {self.data.name} has one row, but a bilevel phase trains on validation "
                "batches, of which batch norm needs two rows: split the data otherwise, or choose bilevel=False"
            )
        single_left = len(rows) % config.batch_size == 1 and len(rows) > 1
        return rows.batches(config.batch_size, shuffle=True, seed=config.seed, drop_last=single_left, device=device)

    def num_rows(self, batch: Batch) -> int:
        """Rows of the batch."""
        return len(batch.labels)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits ``(B,)``."""
        logits: Tensor = model(batch.ids, batch.dense)
        return logits

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
        """Mean binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(logits, batch.labels)

    def validation(self, model: nn.Module, config: TrainingConfig, device: torch.device) -> Validate:
        """AUC and log loss of the validation split, which is held on the device."""
        batches = self.data.validation.batches(config.eval_batch_size or EVAL_BATCH_SIZE, device=device)

        def validate() -> dict[str, float]:
            metrics = evaluate(model, batches)
            return {"auc": metrics.auc, "log_loss": metrics.log_loss}

        return validate

    def search(self, model: nn.Module, config: TrainingConfig, device: torch.device) -> ClickSearch:
        """Candidates are compared many at once on few rows, the best on all."""
        train = self.batches("train", model, config, device)
        return ClickSearch(model, self.data, train, config, self.monitored(config)[0], device)
