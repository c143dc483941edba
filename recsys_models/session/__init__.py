"""Session models: SASRec, BERT4Rec, GRU4Rec, NARM, SR-GNN and M2TRec, on compressed tables of items and attributes.

`Popularity` and `ItemKNN`, which have no tables, are the floors that they should beat.
"""

from recsys_models.session.bert4rec import BERT4Rec
from recsys_models.session.distillation import distill_
from recsys_models.session.encoders import CausalEncoder, Encoder, Examples, GRU4Rec, SASRec, Sessions
from recsys_models.session.floors import ItemKNN, Popularity
from recsys_models.session.items import Items, ItemTable, MetadataItems
from recsys_models.session.model import SessionModel
from recsys_models.session.objectives import Objective, ObjectiveConfig
from recsys_models.session.prefix_encoders import NARM, SRGNN, M2TRec
from recsys_models.session.ranker import Ranker
from recsys_models.session.registry import (
    ENCODERS,
    ModelConfig,
    build_session_model,
    get_encoder,
    model_options,
    session_specs,
    table_counts,
    used_attributes,
)

__all__ = [
    "ENCODERS",
    "NARM",
    "SRGNN",
    "BERT4Rec",
    "CausalEncoder",
    "Encoder",
    "Examples",
    "GRU4Rec",
    "ItemKNN",
    "ItemTable",
    "Items",
    "M2TRec",
    "MetadataItems",
    "ModelConfig",
    "Objective",
    "ObjectiveConfig",
    "Popularity",
    "Ranker",
    "SASRec",
    "SessionModel",
    "Sessions",
    "build_session_model",
    "distill_",
    "get_encoder",
    "model_options",
    "session_specs",
    "table_counts",
    "used_attributes",
]
