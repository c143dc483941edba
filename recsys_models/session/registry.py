"""Session models by name."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embcomp import EmbeddingTables, TableSpec
from embcomp.config import check_at_least, check_choice, check_option_types
from embcomp.errors import ConfigError, did_you_mean
from recsys_models.data import Attribute, Catalogue
from recsys_models.session.bert4rec import BERT4Rec
from recsys_models.session.contrastive import MASKINGS, Contrastive
from recsys_models.session.encoders import Encoder, GRU4Rec, SASRec
from recsys_models.session.floors import ItemKNN, Popularity
from recsys_models.session.items import ITEM, OUTPUT, POOLINGS, Items, ItemTable, MetadataItems
from recsys_models.session.model import SessionModel
from recsys_models.session.objectives import Objective, ObjectiveConfig
from recsys_models.session.prefix_encoders import NARM, SRGNN, M2TRec
from recsys_models.session.ranker import Ranker

ENCODERS: dict[str, type[Encoder]] = {
    "sasrec": SASRec,
    "bert4rec": BERT4Rec,
    "gru4rec": GRU4Rec,
    "narm": NARM,
    "sr_gnn": SRGNN,
    "m2trec": M2TRec,
}
"""Name -> encoder, as in configs and on the command line."""
FLOORS: dict[str, type[Ranker]] = {"popularity": Popularity, "item_knn": ItemKNN}
"""Name -> what session models should beat, which has no tables and is not trained."""


@dataclass(frozen=True)
class ModelConfig(ObjectiveConfig):
    """What session models have in common; encoders have options of their own.

    Attributes:
        items: ``"id"``: a row per item; ``"metadata"``: attributes alone; ``"hybrid"``: both, added. None for what the
            model's paper has.
        attributes: names of those that are used, separated by commas; None for all of the catalogue.
        bag_pooling: of bags of values, see `MetadataItems`.
        head: ``"tied"``: items are scored by the vectors that they are read with; ``"free"``: by a table of their own.
        max_length: items of a session that are read, the last ones.
        targets: what is learned from: ``"positions"``, each of which predicts the item after it, in one pass, or
            ``"prefixes"``, each a pass of its own whose next item is the only target; None for what the model's encoder
            has. SASRec, GRU4Rec, NARM and causal M2TRec take either.
        windows: what is learned from longer sessions by models that learn from every position: the ``"last"`` items,
            or ``"all"``, window by window.
        categories: attribute -> weight of its loss, for those that are predicted along with the next item; None for
            no attribute.
        ssl_weight: of the contrastive loss of the items' attributes, see `Contrastive`; 0 for none.
        ssl_masking: ``"correlated"`` or ``"random"``.
        ssl_items: items drawn for it in a step.
        ssl_temperature: of it.
        ssl_dropout: of values of attributes with several.
    """

    items: str | None = None
    attributes: str | None = None
    bag_pooling: str = "mean"
    head: str = "tied"
    max_length: int = 50
    targets: str | None = None
    windows: str = "last"
    categories: dict[str, float] | None = None
    ssl_weight: float = 0.0
    ssl_masking: str = "correlated"
    ssl_items: int = 512
    ssl_temperature: float = 0.1
    ssl_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.items is not None:
            check_choice(self, "items", ("id", "metadata", "hybrid"))
        check_choice(self, "head", ("tied", "free"))
        check_choice(self, "bag_pooling", POOLINGS)
        check_choice(self, "ssl_masking", MASKINGS)
        if self.targets is not None:
            check_choice(self, "targets", ("positions", "prefixes"))
        check_choice(self, "windows", ("last", "all"))
        if self.targets == "prefixes" and self.windows == "all":
            raise ConfigError("windows='all' is of targets='positions': prefixes are all learned from anyway")
        check_at_least(self, "max_length", 1)
        check_at_least(self, "ssl_weight", 0)
        for name, weight in (self.categories or {}).items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"ModelConfig(categories={{{name!r}: {weight}}}): must be at least 0, and finite")

    def completed(self, name: str) -> ModelConfig:
        """The config with what the model's paper has where nothing is said: metadata for M2TRec, ids for the others."""
        if self.items is not None:
            return self
        return dataclasses.replace(self, items="metadata" if ENCODERS[name] is M2TRec else "id")

    def used(self, catalogue: Catalogue) -> tuple[Attribute, ...]:
        """The attributes that items are composed of.

        Raises:
            ConfigError: if the catalogue has none, or lacks one of them.
        """
        named = () if self.attributes is None else self.attributes.split(",")
        chosen = tuple(_attribute(catalogue, name.strip()) for name in named)
        if self.items == "id":
            return ()
        if not catalogue.attributes:
            raise ConfigError(f"items={self.items!r} needs attributes, and this catalogue has none: use items='id'")
        return chosen or catalogue.attributes


def get_encoder(name: str) -> type[Encoder]:
    """Look a model's encoder up by name.

    Raises:
        ConfigError: if there is none; the message names the nearest.
    """
    if name in FLOORS:
        raise ConfigError(
            f"{name!r} has no tables to compress, and nothing to train: make recsys_models.session."
            f"{FLOORS[name].__name__}, or run python -m benchmarks.floors for its metrics"
        )
    if name not in ENCODERS:
        raise ConfigError(f"no session model {name!r}; {did_you_mean(name, ENCODERS)}")
    return ENCODERS[name]


def session_specs(
    name: str, catalogue: Catalogue, embedding_dim: int, init_std: float | None = None, **options: Any
) -> list[TableSpec]:
    """Describe the tables that a session model needs for a catalogue.

    Args:
        name: one of `ENCODERS`.
        catalogue: of the data set.
        embedding_dim: D, of all tables and of the model.
        init_std: standard deviation of initial vectors; None for the encoder's own.
        options: of the model; see `ModelConfig` and the encoder's class.

    Raises:
        ConfigError: for an unknown model or option, or a value that is refused.
    """
    config, _ = _split(name, options)
    attributes = config.used(catalogue)
    if any(a.name in (ITEM, OUTPUT) for a in attributes):
        raise ConfigError(f"an attribute is called {ITEM!r} or {OUTPUT!r}, as tables of items are: rename it")
    init_std = ENCODERS[name].init_std if init_std is None else init_std
    own = [TableSpec(ITEM, catalogue.num_items, embedding_dim, init_std=init_std)]
    of_items = [] if config.items == "metadata" else own
    of_head = [TableSpec(OUTPUT, catalogue.num_items, embedding_dim, init_std=init_std)]
    return [
        *(TableSpec(a.name, a.num_values, embedding_dim, init_std=init_std) for a in attributes),
        *of_items,
        *(of_head if config.head == "free" else []),
    ]


def used_attributes(name: str, catalogue: Catalogue, **options: Any) -> tuple[Attribute, ...]:
    """The attributes that a session model composes items of, by the arguments of `session_specs`; none for ids."""
    return _split(name, options)[0].used(catalogue)


def table_counts(specs: Sequence[TableSpec], catalogue: Catalogue) -> dict[str, torch.Tensor]:
    """How often the ids of each table occur in training, int64 ``(V,)`` each: what plans and strategies ask for."""
    counts = {attribute.name: attribute.counts for attribute in catalogue.attributes}
    return {spec.name: torch.from_numpy(counts.get(spec.name, catalogue.counts).copy()) for spec in specs}


def build_session_model(
    name: str, tables: EmbeddingTables, catalogue: Catalogue, *, residual: EmbeddingTables | None = None, **options: Any
) -> SessionModel:
    """Build a session model on tables whose specs came from `session_specs` with the same options.

    Initial weights of the network are drawn from torch's global generator: call ``torch.manual_seed`` before.

    Args:
        name: one of `ENCODERS`.
        tables: of the items.
        catalogue: of the data set.
        residual: of ``items="hybrid"``, a group of its own for the table ``"item"``, so that its rows have another
            strategy, format or budget than attributes; None where it is in ``tables``.
        options: of the model; see `ModelConfig` and the encoder's class.

    Raises:
        ConfigError: for an unknown model or option, a value that is refused, or tables of other sizes than
            `session_specs` has.
        InputError: if a table is missing.
    """
    config, of_encoder = _split(name, options)
    if residual is not None and config.items != "hybrid":
        raise ConfigError(f"residual= is of items='hybrid', and these are items={config.items!r}")
    specs = session_specs(name, catalogue, tables.embedding_dim, **options)
    _check_tables(specs, tables, residual, config.items == "hybrid")
    items: Items
    if config.items == "id":
        items = ItemTable(tables)
    else:
        rows = (tables if residual is None else residual) if config.items == "hybrid" else None
        items = MetadataItems(tables, config.used(catalogue), rows, config.bag_pooling, catalogue.num_seen)
    encoder = _encoder(name, tables.embedding_dim, config, of_encoder)
    objective = Objective(config, torch.from_numpy(catalogue.counts.copy()))
    head = ItemTable(tables, OUTPUT) if config.head == "free" else None
    categories = {_attribute(catalogue, name): weight for name, weight in (config.categories or {}).items()}
    contrastive = None
    if config.ssl_weight:
        loss = Contrastive(
            items,
            config.used(catalogue),
            config.ssl_masking,
            config.ssl_items,
            config.ssl_temperature,
            config.ssl_dropout,
        )
        contrastive = (loss, config.ssl_weight)
    return SessionModel(tables, items, encoder, objective, head, categories, contrastive, config.windows)


def model_options(name: str) -> dict[str, Any]:
    """The options of a session model and their defaults."""
    own = list(inspect.signature(get_encoder(name)).parameters.values())[2:]
    shared = {option.name: option.default for option in dataclasses.fields(ModelConfig)}
    return shared | {parameter.name: parameter.default for parameter in own}


def _split(name: str, options: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Tell the options that all models have from those of the encoder."""
    known = model_options(name)
    for option in options:
        if option not in known:
            raise ConfigError(f"model {name!r} has no option {option!r}; {did_you_mean(option, known)}")
    shared = {option.name for option in dataclasses.fields(ModelConfig)}
    config = ModelConfig(**{key: value for key, value in options.items() if key in shared}).completed(name)
    of_encoder = {key: value for key, value in options.items() if key not in shared}
    check_option_types(ENCODERS[name].__name__, ENCODERS[name].__init__, of_encoder)
    return config, of_encoder


def _check_tables(
    specs: Sequence[TableSpec], tables: EmbeddingTables, residual: EmbeddingTables | None, is_hybrid: bool
) -> None:
    """Compare tables with what the model needs; a residual may be of fewer items, if it has a policy for new ones."""
    for spec in specs:
        group = tables if residual is None or spec.name != ITEM else residual
        number = group.specs[group.index_of(spec.name)].num_embeddings
        if is_hybrid and spec.name == ITEM and number < spec.num_embeddings and group.config.unseen != "error":
            continue
        if number != spec.num_embeddings:
            raise ConfigError(
                f"table {spec.name!r} has {number} ids, and the catalogue {spec.num_embeddings}: build tables of "
                f"session_specs with the same catalogue and options, or, where items are new, let the table grow: "
                f"embcomp.resize_(tables, {{{spec.name!r}: {spec.num_embeddings}}})"
            )


def _encoder(name: str, dim: int, config: ModelConfig, options: dict[str, Any]) -> Encoder:
    """Build an encoder, and tell it what to learn from."""
    encoder = ENCODERS[name](dim, config.max_length, **options)
    if config.targets not in (None, encoder.targets):
        if not encoder.has_choice:
            hint = ", or set causal=True" if isinstance(encoder, M2TRec) else ""
            raise ConfigError(
                f"targets={config.targets!r}, but {name} learns from {encoder.targets} alone: leave it out{hint}"
            )
        encoder.targets = str(config.targets)
    if config.windows == "all" and encoder.targets != "positions":
        way = "targets='positions'" if encoder.has_choice else "causal=True" if isinstance(encoder, M2TRec) else None
        hint = "" if way is None else f", set {way}"
        raise ConfigError(
            f"windows='all', but {name} learns from prefixes, all of which are learned from anyway: leave windows "
            f"out{hint}, or use a model that learns from every position, such as 'sasrec'"
        )
    return encoder


def _attribute(catalogue: Catalogue, name: str) -> Attribute:
    found = {attribute.name: attribute for attribute in catalogue.attributes}
    if name not in found:
        raise ConfigError(f"items of this catalogue have no attribute {name!r}; {did_you_mean(name, found)}")
    return found[name]
