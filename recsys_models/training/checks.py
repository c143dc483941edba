"""Checks before training starts."""

from __future__ import annotations

import torch

from embcomp.errors import ConfigError, InputError
from recsys_models.ctr import CTRModel
from recsys_models.data import ClickLog
from recsys_models.training.config import TrainingConfig


def device_named(name: str) -> torch.device:
    """The device of a config.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"TrainingConfig(device={name!r}): write 'auto', 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"TrainingConfig(device={name!r}): no CUDA device is there; write 'auto' or 'cpu'")
    return device


def check_data(model: CTRModel, data: ClickLog, config: TrainingConfig) -> None:
    """Check that a model can be trained on a data set.

    Raises:
        ConfigError: if the model was built for other data.
        InputError: if a split is empty, or the AUC is monitored and undefined.
    """
    specs = model.tables.specs
    if len(data.fields) != len(specs) or len(data.dense_names) != model.num_dense:
        raise ConfigError(
            f"{data.name} has {len(data.fields)} fields and {len(data.dense_names)} dense features, but the model has "
            f"{len(specs)} tables and num_dense={model.num_dense}: build it for this data set"
        )
    for spec, known in zip(specs, data.fields, strict=True):
        if known.num_ids > spec.num_embeddings and model.tables.config.unseen == "error":
            raise ConfigError(
                f"field {known.name!r} of {data.name} has {known.num_ids} ids, but table {spec.name!r} has "
                f"{spec.num_embeddings}: give it as many, or set unseen='hash', 'zero' or 'oov_row'"
            )
    for name, split in (("train", data.train), ("validation", data.validation)):
        if not len(split):
            raise InputError(f"the {name} split of {data.name} has no rows")
    labels = data.validation.labels
    if config.monitor == "auc" and bool((labels == labels[0]).all()):
        raise InputError(
            f"all validation labels of {data.name} are {labels[0]:g}, so that the AUC is undefined: "
            "set monitor='log_loss', or split the data otherwise"
        )
