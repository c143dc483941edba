"""``magnitude``: of all values of all tables only the largest are kept, and served in a sparse form."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embcomp.config import StrategyConfig, check_at_least, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.phases import PLAIN, Phase
from embcomp.row_source import RowSource
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowFormat, make_row_store
from embcomp.storage.pruned import PrunedRows, make_pruned_store
from embcomp.storage.sparse import SparseRows
from embcomp.storage.sparse_sizes import (
    LAYOUTS,
    check_granularity,
    dense_bytes,
    most_slots,
    smallest_layout,
    sparse_bytes,
)
from embcomp.tables import EmbeddingTables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MagnitudeConfig(StrategyConfig):
    """How many values are kept, and which.

    Attributes:
        min_per_row: values that every row keeps in any case, its largest. With 0, whole rows may become zero.
        weighted: compare magnitudes times the square root of the id's count, so that the squared error over all
            lookups is what pruning keeps small; where counts of all tables are known when the tables are built.
        finetune_epochs: epochs of training after pruning, in which kept values go on learning.
        num_values: values that are kept of all tables together; None to let the budget choose.
        num_slots: rows that have a place for values in layout ``"dcsr"``, as many as could be needed, else 0; None to
            work it out.
        layout: how they are served: ``"bitmap"``, ``"csr"`` or ``"dcsr"`` (see `SparseRows`), or ``"dense"``, with
            all values and no index; None for whichever takes the fewest bytes.
    """

    min_per_row: int = 0
    weighted: bool = False
    finetune_epochs: int = 0
    num_values: int | None = None
    num_slots: int | None = None
    layout: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "min_per_row", 0)
        check_at_least(self, "finetune_epochs", 0)
        check_at_least(self, "num_values", 1)
        if self.layout is not None:
            check_choice(self, "layout", ("dense", *LAYOUTS))
        if self.num_values is None and not (self.layout is None and self.num_slots is None):
            raise ConfigError("MagnitudeConfig: layout and num_slots follow from num_values: give that too, or neither")
        check_granularity(RowFormat.parse(self.rows))


@register_strategy("magnitude", MagnitudeConfig)
class MagnitudeTables(EmbeddingTables):
    """Magnitude pruning: the largest values of all tables are kept, one by one, the others become zero.

    Post-training pruning as in "A Thorough Performance Benchmarking on Lightweight Embedding-based Recommender Systems"
    (arXiv 2406.17335), where it beats many a method that is harder to train. Tables are trained whole; any budget can
    be cut from them afterwards. Here the budget is bytes of what is served, its index included, and not a share of
    values; it is spent to the last value, as magnitudes that are equal are told apart by their places.

    Training sees whole rows, and so does validation in its phase, since the tables are pruned when they are trained;
    `prune_` settles which values are kept, and lookups then show only them. The end of the phase does so, `load_dense_`
    too, and `finalize_` at the latest; with ``finetune_epochs`` a second phase goes on training what is kept. Outside
    of phases, evaluation shows what would be served if training ended now.
    Checkpoints of the training form hold a bit per value for it; counts, for ``weighted``, are in no checkpoint.

    Values of padding ids are pruned first. Other ids may be left with zeros too, and so may unseen ids that share
    their rows, unless ``min_per_row`` keeps some values of each row.
    """

    knob = "values"
    chosen_by_budget = ("num_values", "num_slots", "layout")
    has_zero_vectors = True
    can_be_streamed = True
    config: MagnitudeConfig
    _starts: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: MagnitudeConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(specs, config)
        values, slots, layout = self._checked_sizes()
        if layout == "dense":
            self.rows = make_row_store(config.rows, self.num_ids, self.embedding_dim, config.sparse)
        else:
            self.rows = self._pruned_rows(values, slots, layout, counts or {})
        self.constant("_starts", self.rows.starts())
        self.reset_parameters()

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        return self.rows(ids + self.pick(self._starts, table), table)

    def widths_of(self, table: int | str) -> Tensor:
        index = self.index_of(table)
        ids = torch.arange(self.specs[index].num_embeddings, device=self._starts.device)
        if isinstance(self.rows, PrunedRows | SparseRows):
            return self.rows.is_kept(ids + self._starts[index]).sum(-1)
        return torch.full_like(ids, self.embedding_dim)

    # ---- life -------------------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        self.rows.reset_parameters([spec.init_std for spec in self.specs], self.generator())

    def fit(self, weights: Sequence[RowSource], counts: Sequence[Tensor]) -> None:
        for start, weight in zip(self.rows.starts(), weights, strict=True):
            self.rows.write_(start, weight)
        if isinstance(self.rows, PrunedRows):
            self.rows.restore_()
        self.prune_()

    def prune_(self) -> MagnitudeTables:
        """Settle which values are kept, by the weights as they are now; afterwards only kept values are trained."""
        if isinstance(self.rows, PrunedRows):
            self.rows.prune_()
        return self

    def phases(self) -> tuple[Phase, ...]:
        epochs = self.config.finetune_epochs
        return (Phase("train", any_budget=True), Phase("finetune", epochs=epochs)) if epochs else PLAIN

    def enter_phase_(self, phase: Phase) -> None:
        if isinstance(self.rows, PrunedRows):
            self.rows.is_free = phase.name == "train"
            if phase.name == "finetune":
                self.prune_()
                self.rows.fit_scales_()

    def leave_phase_(self, phase: Phase) -> None:
        if isinstance(self.rows, PrunedRows):
            self.rows.is_free = False
        self.prune_()

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: MagnitudeConfig, known: Knowledge) -> tuple[int, int]:
        if config.num_values is not None:
            return config.num_values, config.num_values
        rows = sum(_rows_of(specs, config))
        return max(1, rows * config.min_per_row), rows * specs[0].embedding_dim

    @classmethod
    def resize(
        cls, specs: Sequence[TableSpec], config: MagnitudeConfig, size: int, known: Knowledge
    ) -> MagnitudeConfig:
        if config.num_values is not None:
            return cls.complete(specs, config, known)
        segments, dim = _rows_of(specs, config), specs[0].embedding_dim
        row_format = RowFormat.parse(config.rows).resolve(dim)
        layout, slots = smallest_layout(segments, dim, row_format, size)
        every = sum(segments) * dim
        if size == every or sparse_bytes(segments, dim, row_format, size, slots, layout) >= dense_bytes(
            segments, dim, row_format
        ):
            size, layout, slots = every, "dense", 0
        return replace(config, num_values=size, num_slots=slots, layout=layout)

    @classmethod
    def complete(cls, specs: Sequence[TableSpec], config: MagnitudeConfig, known: Knowledge) -> MagnitudeConfig:
        if config.num_values is None:
            sized: MagnitudeConfig = super().complete(specs, config, known)
            return sized
        segments, dim = _rows_of(specs, config), specs[0].embedding_dim
        layout = config.layout
        if layout is None:
            row_format = RowFormat.parse(config.rows).resolve(dim)
            whole = config.num_values == sum(segments) * dim
            layout = "dense" if whole else smallest_layout(segments, dim, row_format, config.num_values)[0]
        slots = most_slots(segments, config.num_values, layout) if config.num_slots is None else config.num_slots
        return replace(config, layout=layout, num_slots=slots)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _checked_sizes(self) -> tuple[int, int, str]:
        config, rows, dim = self.config, sum(self.num_ids), self.embedding_dim
        if config.num_values is None or config.num_slots is None or config.layout is None:
            raise ConfigError("MagnitudeConfig leaves its sizes open: plan with a budget, or plan with num_values")
        if config.min_per_row > dim:
            raise ConfigError(f"MagnitudeConfig(min_per_row={config.min_per_row}): rows have {dim} values")
        low, high = max(1, rows * config.min_per_row), rows * dim
        if not low <= config.num_values <= high:
            raise ConfigError(
                f"MagnitudeConfig(num_values={config.num_values}): must be in [{low}, {high}] for {rows} rows of {dim} "
                f"values with min_per_row={config.min_per_row}"
            )
        if (config.layout == "dense") != (config.num_values == high):
            raise ConfigError(
                f"MagnitudeConfig(num_values={config.num_values}, layout={config.layout!r}): 'dense' keeps all {high} "
                f"values, the other layouts fewer"
            )
        slots = most_slots(self.num_ids, config.num_values, config.layout)
        if config.num_slots != slots:
            raise ConfigError(
                f"MagnitudeConfig(num_slots={config.num_slots}): {config.num_values} values in layout "
                f"{config.layout!r} need {slots}"
            )
        return config.num_values, slots, config.layout

    def _pruned_rows(self, values: int, slots: int, layout: str, counts: Mapping[str, Tensor]) -> PrunedRows:
        config = self.config
        rows = make_pruned_store(
            config.rows, self.num_ids, self.embedding_dim, config.sparse, values, slots, layout, config.min_per_row
        )
        pads = zip(rows.starts(), self.specs, strict=True)
        rows.last_rows = tuple(start + spec.padding_idx for start, spec in pads if spec.padding_idx is not None)
        if config.weighted and not rows.mask.is_meta:
            missing = [name for name in self.names if name not in counts]
            if missing:
                logger.info("no counts of tables %s: magnitudes are compared unweighted", ", ".join(missing))
            else:
                rows.importance = self._importance(counts).to(rows.mask.device)
        return rows

    def _importance(self, counts: Mapping[str, Tensor]) -> Tensor:
        """Square roots of counts, float32 ``(R,)``; an OOV row counts as a row of its table does on average."""
        parts = []
        for name, num_ids in zip(self.names, self.num_ids, strict=True):
            count = counts[name].to("cpu", torch.float32)
            parts += [count, count.mean().expand(num_ids - len(count))]
        return torch.cat(parts).sqrt()


def _rows_of(specs: Sequence[TableSpec], config: MagnitudeConfig) -> list[int]:
    """Rows of each table, the OOV row included."""
    return [spec.num_embeddings + (config.unseen == "oov_row") for spec in specs]
