"""Click models by name."""

from __future__ import annotations

import inspect
from typing import Any

from embcomp import EmbeddingTables
from embcomp.config import check_option_types
from embcomp.errors import ConfigError, did_you_mean
from recsys_models.ctr.base import CTRModel
from recsys_models.ctr.dcnv2 import DCNv2
from recsys_models.ctr.deepfm import DeepFM
from recsys_models.ctr.dlrm import DLRM
from recsys_models.ctr.fm import FM
from recsys_models.ctr.fnn import FNN
from recsys_models.ctr.ipnn import IPNN
from recsys_models.ctr.lr import LR
from recsys_models.ctr.widedeep import WideDeep

MODELS: dict[str, type[CTRModel]] = {
    "lr": LR,
    "fm": FM,
    "fnn": FNN,
    "ipnn": IPNN,
    "deepfm": DeepFM,
    "widedeep": WideDeep,
    "dcnv2": DCNv2,
    "dlrm": DLRM,
}
"""Name -> model, as in configs and on the command line."""


def get_model(name: str) -> type[CTRModel]:
    """Look a model up by name.

    Raises:
        ConfigError: if there is none; the message names the nearest.
    """
    if name not in MODELS:
        raise ConfigError(f"no model {name!r}; {did_you_mean(name, MODELS)}")
    return MODELS[name]


def build_model(name: str, tables: EmbeddingTables, num_dense: int = 0, **options: Any) -> CTRModel:
    """Build a model on tables whose specs came from the model's ``table_specs``.

    Initial weights of the network are drawn from torch's global generator: call ``torch.manual_seed`` before.

    Args:
        name: one of `MODELS`.
        tables: one table per field.
        num_dense: P.
        options: of the model; see its class.

    Raises:
        ConfigError: for an unknown model or option, or a value that the model refuses.
    """
    model_class = get_model(name)
    allowed = [option for option in inspect.signature(model_class).parameters if option not in ("tables", "num_dense")]
    for option in options:
        if option not in allowed:
            known = did_you_mean(option, allowed) if allowed else "it has none"
            raise ConfigError(f"model {name!r} has no option {option!r}; {known}")
    check_option_types(model_class.__name__, model_class.__init__, options)
    return model_class(tables, num_dense, **options)
