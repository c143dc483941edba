"""What a cell trains and how it is judged: clicks, or sessions; the model's name says which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import metric_values
from embcomp import EmbeddingTables, TableSpec
from embcomp.errors import ConfigError, did_you_mean
from recsys_models.ctr import MODELS, build_model, get_model
from recsys_models.data import ClickLog, SessionLog, load_dataset, load_sessions, metadata_twin_rate
from recsys_models.metrics import evaluate
from recsys_models.ranking import bound_cases, evaluate_cases, ranking_metrics, sliced_metrics, slices_of
from recsys_models.session import (
    ENCODERS,
    SessionModel,
    build_session_model,
    session_specs,
    table_counts,
    used_attributes,
)
from recsys_models.training import TrainingResult


@dataclass(frozen=True)
class Quality:
    """How good a model is.

    Attributes:
        metrics: as they stand in a result.
        slices: part of the test split -> its ``"cases"`` and metrics; empty where there are none.
    """

    metrics: dict[str, dict[str, Any]]
    slices: dict[str, dict[str, float]] = field(default_factory=dict)


class Workload(ABC):
    """A data set and a model on it.

    Args:
        config: of a cell.
    """

    data: ClickLog | SessionLog

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.model_name, self.data_name = str(config["model"]["name"]), str(config["data"]["name"])
        self.options = group_options(config["model"])
        self.embedding_dim = int(config["embedding_dim"])
        self.init_std = None if config["init_std"] is None else float(config["init_std"])

    @abstractmethod
    def specs(self) -> list[TableSpec]:
        """The tables that the model needs."""

    @abstractmethod
    def counts(self) -> dict[str, Tensor]:
        """How often the ids of each table occur in training, int64 ``(V,)``."""

    @abstractmethod
    def build(self, tables: EmbeddingTables) -> nn.Module:
        """The model, with initial weights."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Name, hash and sizes of the data."""

    @abstractmethod
    def quality(self, model: nn.Module, trained: TrainingResult) -> Quality:
        """Metrics of the finalized model, by the names of `benchmarks.results.METRICS`, and of parts of the test."""

    def composing_bytes(self, model: nn.Module) -> int | None:
        """Bytes beside the tables that items are composed by; None where there are no items."""
        return None

    @abstractmethod
    def lookup_ids(self) -> Tensor:
        """Ids of the test split to time lookups with, int64 ``(N, T)``."""


class Clicks(Workload):
    """A model of `recsys_models.ctr` on a click log."""

    data: ClickLog

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.data = load_dataset(self.data_name, *places_of(config), **group_options(config["data"]))

    def specs(self) -> list[TableSpec]:
        """A table per field."""
        return get_model(self.model_name).table_specs(self.data.fields, self.embedding_dim, self.init_std)

    def counts(self) -> dict[str, Tensor]:
        """Of the fields' ids."""
        return {known.name: torch.from_numpy(known.counts) for known in self.data.fields}

    def build(self, tables: EmbeddingTables) -> nn.Module:
        """The model, with initial weights."""
        return build_model(self.model_name, tables, len(self.data.dense_names), **self.options)

    def about(self) -> dict[str, Any]:
        """Name, hash and sizes of the data."""
        data = self.data
        return {
            "name": data.name,
            "content_hash": data.content_hash,
            "train_rows": len(data.train),
            "validation_rows": len(data.validation),
            "test_rows": len(data.test),
            "num_fields": len(data.fields),
            "num_dense": len(data.dense_names),
            "num_ids": sum(known.num_ids for known in data.fields),
        }

    def quality(self, model: nn.Module, trained: TrainingResult) -> Quality:
        """AUC and log loss."""
        test, validation = evaluate(model, self.data.test), evaluate(model, self.data.validation)
        found = {
            "test_auc": test.auc,
            "test_log_loss": test.log_loss,
            "validation_auc": validation.auc,
            "validation_log_loss": validation.log_loss,
            "trained_validation_auc": trained.best.metrics["auc"],
        }
        return Quality(metric_values(found))

    def lookup_ids(self) -> Tensor:
        """Rows of the test split."""
        return next(iter(self.data.test.batches(len(self.data.test)))).ids


class Sessions(Workload):
    """A model of `recsys_models.session` on sessions."""

    data: SessionLog

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.data = load_sessions(self.data_name, *places_of(config), **group_options(config["data"]))

    def specs(self) -> list[TableSpec]:
        """Tables of items, of attributes, or both."""
        return session_specs(self.model_name, self.data.catalogue, self.embedding_dim, self.init_std, **self.options)

    def counts(self) -> dict[str, Tensor]:
        """Of items and of values of attributes."""
        return table_counts(self.specs(), self.data.catalogue)

    def build(self, tables: EmbeddingTables) -> nn.Module:
        """The model, with initial weights."""
        return build_session_model(self.model_name, tables, self.data.catalogue, **self.options)

    def about(self) -> dict[str, Any]:
        """Name, hash and sizes of the data, and how many test targets have twins in the attributes that are used."""
        data = self.data
        attributes = used_attributes(self.model_name, data.catalogue, **self.options)
        return {
            "name": data.name,
            "content_hash": data.content_hash,
            "train_sessions": len(data.train),
            "train_events": len(data.train.items),
            "validation_cases": len(data.validation),
            "test_cases": len(data.test),
            "num_items": data.catalogue.num_items,
            "num_attributes": len(data.catalogue.attributes),
            "metadata_twin_rate": metadata_twin_rate(data, attributes=attributes) if attributes else None,
            "num_ids": sum(spec.num_embeddings for spec in self.specs()),
        }

    def quality(self, model: nn.Module, trained: TrainingResult) -> Quality:
        """NDCG, hit rate and MRR of the ranking of the whole catalogue, by frequency and by length too.

        Those of the test split are told twice: with ties against the model, and with ties at random.
        """
        assert isinstance(model, SessionModel)
        data = self.data
        best, worst = bound_cases(model, data.test, data.filters_seen)
        validation = evaluate_cases(model, data.validation, data.filters_seen)
        found = {f"test_{name}": value for name, value in ranking_metrics(worst, best=best).items()}
        found |= {f"validation_{name}": value for name, value in validation.items()}
        found["trained_validation_ndcg@10"] = trained.best.metrics["ndcg@10"]
        parts = slices_of(data.catalogue, data.test)
        return Quality(metric_values(found), sliced_metrics(worst, parts, best=best))

    def composing_bytes(self, model: nn.Module) -> int:
        """Bytes of the model's items."""
        assert isinstance(model, SessionModel)
        return model.composing_bytes

    def lookup_ids(self) -> Tensor:
        """Items of the test cases and the first values of their attributes, those without any being looked up as 0."""
        items = self.data.test.targets
        columns = []
        for spec in self.specs():
            own = [a for a in self.data.catalogue.attributes if a.name == spec.name]
            columns.append(torch.from_numpy(own[0].firsts[items] if own else items).long())
        return torch.stack(columns, dim=1)


def workload_of(config: Mapping[str, Any]) -> Workload:
    """Load what a cell's model is trained on.

    Raises:
        ConfigError: if there is no such model, or it does not go with the data.
        DataError: if the data can't be read.
    """
    name = str(config["model"]["name"])
    if name in ENCODERS:
        return Sessions(config)
    if name not in MODELS:
        raise ConfigError(f"no model {name!r}; {did_you_mean(name, [*MODELS, *ENCODERS])}")
    return Clicks(config)


def initial_std(model_name: str) -> float | None:
    """Standard deviation of the initial embeddings of a model; None where there is no such model."""
    model = ENCODERS.get(model_name) or MODELS.get(model_name)
    return None if model is None else model.init_std


def places_of(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Where the data sets are, and their cache."""
    return config.get("data_root"), config.get("data_cache")


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a group of a config, without its name."""
    return {name: value for name, value in group.items() if name != "name"}
