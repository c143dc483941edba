"""The sizes of ``dynamic``: slots and fallback rows of each table, and which tables need neither."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from embcomp.specs import TableSpec
from embcomp.storage import stored_bytes
from embcomp.strategies._allocation import allocate_rows, check_table_names

if TYPE_CHECKING:
    from embcomp.strategies.dynamic import DynamicConfig

ID_BYTES = 8
"""What a slot costs beside its row: the id that has it."""


def num_ids_of(spec: TableSpec, config: DynamicConfig) -> int:
    """Ids of a table, its OOV id included."""
    return spec.num_embeddings + _oov(config)


def is_open(config: DynamicConfig) -> bool:
    """Whether any 64-bit id may come, so that the numbers below V mean nothing."""
    return config.unseen == "hash"


def most_rows(specs: Sequence[TableSpec], config: DynamicConfig) -> list[int]:
    """The largest size of each table, in rows with an id: what plain rows cost, or a slot for V ids.

    Fallback rows have scales of their own, which plain rows do without.
    """
    return [_most(spec, config) for spec in specs]


def fewest_rows(specs: Sequence[TableSpec], config: DynamicConfig) -> list[int]:
    """The smallest size of each table: a slot and a fallback row or two, unless plain rows cost no more."""
    if config.num_fallback is not None:
        check_table_names(config, "num_fallback", [spec.name for spec in specs])
    return [min(_fewest(spec, config), most) for spec, most in zip(specs, most_rows(specs, config), strict=True)]


def sizes_within(specs: Sequence[TableSpec], config: DynamicConfig, total: int) -> DynamicConfig:
    """Share ``total`` rows with an id out over the tables.

    A table that gets its largest size has a row for every id below V, and no map, unless ids are open.
    """
    most = most_rows(specs, config)
    rows = allocate_rows(total, most, exempt_share=config.exempt_share, smallest=fewest_rows(specs, config))
    slots, fallback = {}, {}
    for spec, own, largest in zip(specs, rows, most, strict=True):
        if _may_be_whole(spec, config) and own == largest:
            slots[spec.name], fallback[spec.name] = num_ids_of(spec, config), 0
        else:
            fallback[spec.name] = _fallback(spec, config, own)
            slots[spec.name] = own - fallback[spec.name] - _oov(config)
    return replace(config, num_slots=slots, num_fallback=fallback)


def with_fallback(specs: Sequence[TableSpec], config: DynamicConfig) -> DynamicConfig:
    """Fill in ``num_fallback`` where ``num_slots`` is given."""
    names = [spec.name for spec in specs]
    check_table_names(config, "num_slots", names)
    if config.num_fallback is not None:
        check_table_names(config, "num_fallback", names)
        return config
    assert config.num_slots is not None
    share, fallback = config.fallback_share, {}
    for spec in specs:
        slots = config.num_slots[spec.name]
        whole = not is_open(config) and slots >= num_ids_of(spec, config)
        fallback[spec.name] = 0 if whole else max(1, round(share / (1 - share) * slots))
    return replace(config, num_fallback=fallback)


def _oov(config: DynamicConfig) -> int:
    return int(config.unseen == "oov_row")


def _most(spec: TableSpec, config: DynamicConfig) -> int:
    if _may_be_whole(spec, config):
        dim = spec.embedding_dim
        scales = stored_bytes(0, dim, config.rows)
        row = (stored_bytes(1024, dim, config.rows) - scales) / 1024
        return max(1, math.ceil((num_ids_of(spec, config) * row - scales) / (row + ID_BYTES)))
    return spec.num_embeddings + _fallback(spec, config, math.ceil(spec.num_embeddings / (1 - config.fallback_share)))


def _fewest(spec: TableSpec, config: DynamicConfig) -> int:
    if config.num_fallback is not None and config.num_fallback[spec.name] == 0:
        return _most(spec, config)
    return 1 + _fallback(spec, config, 1) + _oov(config)


def _may_be_whole(spec: TableSpec, config: DynamicConfig) -> bool:
    if config.num_fallback is not None:
        return config.num_fallback[spec.name] == 0
    return not is_open(config) or spec.num_embeddings <= 3


def _fallback(spec: TableSpec, config: DynamicConfig, rows: int) -> int:
    """Fallback rows among ``rows``; open ids get two at least, so that strangers do not all look the same."""
    if config.num_fallback is not None:
        return config.num_fallback[spec.name]
    return max(1 + is_open(config), round(config.fallback_share * rows))
