"""``optembed``: which rows and which dimensions are worth their bytes, learned and searched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from embcomp.config import check_at_least, check_choice, register_strategy
from embcomp.errors import ConfigError
from embcomp.hooks import Repeat
from embcomp.phases import Phase
from embcomp.specs import Knowledge, TableSpec
from embcomp.storage import RowFormat
from embcomp.strategies._candidates import first_block, owners
from embcomp.strategies._frequency_sizes import is_falling
from embcomp.strategies._pruned import PrunedConfig, PrunedTables, form_bytes
from embcomp.strategies._row_budget import RowBudget
from embcomp.strategies._width_repair import CONSTRAINTS, WidthRepair
from embcomp.training.evolution import Evolution
from embcomp.training.search import Candidate, Search

SAMPLINGS = ("log_uniform", "uniform")
SCORES = ("auto", "norm", "norm_frequency", "frequency", "taylor")
STARTS = ("initial", "supernet")
TINY = 1e-30
_LARGEST = 3


@dataclass(frozen=True)
class OptEmbedConfig(PrunedConfig):
    """OptEmbed. With ``pruned="zero"``, ``projection="none"``, ``sampling="uniform"`` and no budget it is the paper's.

    Attributes:
        prune_rows: learn which rows to keep; False is the paper's OptEmbed-D.
        search_dims: search widths of fields; False is the paper's OptEmbed-E.
        sampling: how widths are drawn, in the supernet and by the search: ``"log_uniform"``, in proportion to ``1/w``,
            so that small forms are trained as much as large ones; ``"uniform"``, as in the paper.
        norm: 1 or 2: the norm of a row that its threshold is compared with.
        threshold_per_id: a threshold for every id instead of every table. ``Σ exp(−t)`` is then a mean over the ids of
            each table, so that ``alpha`` means the same.
        threshold_lr: learning rate of the thresholds' SGD.
        alpha: weight of ``Σ exp(−t)``, which pushes thresholds up. With the defaults of both
            they hardly move, and next to nothing is pruned without a budget: raise them for that.
        decay: share by which a row shrinks whenever it is looked up in the supernet. It is decoupled from the loss and
            from the optimizer, and touches no row that is not used, so that a norm tells how much a row is needed,
            not how long ago it was seen.
        bilevel: thresholds learn from validation batches.
        score: by what rows are ranked under a budget: ``"norm"``; ``"norm_frequency"``: norm times the id's count;
            ``"frequency"``; ``"taylor"``: the sum of ``|∂loss/∂e · e|`` over the supernet's training; ``"auto"``:
            ``"norm_frequency"`` where counts are given, else ``"norm"``.
        constraint: how candidates are brought within a budget: ``"prune"``: rows of the lowest score per byte go;
            ``"shrink"``: randomly chosen fields get narrower; ``"reject"``: they are drawn anew, and rows are pruned
            where no draw fits. Candidates that leave some of the budget are widened until they use it up.
        generations: of the search.
        mutations: candidates by mutation, per generation.
        crossovers: candidates by crossover, per generation.
        parents: best candidates that parents are drawn from.
        mutation_probability: of each field's width.
        supernet_epochs: at most; None for as many as the loop is told.
        supernet_patience: evaluations without improvement that end the supernet; the paper has 1.
        retrain_from: ``"initial"``: the last phase begins with the first weights, as in the paper; ``"supernet"``: it
            goes on from the supernet's.
    """

    prune_rows: bool = True
    search_dims: bool = True
    sampling: str = "log_uniform"
    norm: int = 1
    threshold_per_id: bool = False
    threshold_lr: float = 1e-4
    alpha: float = 1e-5
    decay: float = 0.0
    bilevel: bool = False
    score: str = "auto"
    constraint: str = "prune"
    generations: int = 30
    mutations: int = 10
    crossovers: int = 10
    parents: int = 15
    mutation_probability: float = 0.1
    supernet_epochs: int | None = None
    supernet_patience: int | None = None
    retrain_from: str = "initial"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "sampling", SAMPLINGS)
        check_choice(self, "score", SCORES)
        check_choice(self, "constraint", CONSTRAINTS)
        check_choice(self, "retrain_from", STARTS)
        for field in ("generations", "mutations", "parents", "supernet_epochs", "supernet_patience"):
            check_at_least(self, field, 1)
        for field in ("crossovers", "alpha", "threshold_lr", "decay"):
            check_at_least(self, field, 0)
        if self.norm not in (1, 2):
            raise ConfigError(f"OptEmbedConfig(norm={self.norm!r}): must be 1 or 2")
        if not 0 < self.mutation_probability <= 1:
            raise ConfigError(
                f"OptEmbedConfig(mutation_probability={self.mutation_probability!r}): must be above 0 and at most 1"
            )
        if not self.decay < 1:
            raise ConfigError(f"OptEmbedConfig(decay={self.decay!r}): must be below 1")
        if self.decay and RowFormat.parse(self.rows).pure:
            raise ConfigError(
                f"OptEmbedConfig(decay={self.decay!r}, rows={self.rows!r}): small steps round away in rows that are "
                "trained in 16 bits; leave 'pure' out, for a float32 copy in training"
            )
        if not self.prune_rows and not self.search_dims:
            raise ConfigError("OptEmbedConfig(prune_rows=False, search_dims=False): nothing is left to choose")

    @property
    def is_projected(self) -> bool:
        """Whether there are matrices: only where there may be narrow rows."""
        return self.projection == "linear" and self.search_dims


@register_strategy("optembed", OptEmbedConfig)
class OptEmbedTables(PrunedTables):
    """OptEmbed: learned thresholds say which rows stay, and a search says how wide each field is.

    After "OptEmbed: Learning Optimal Embedding Table for Click-through Rate Prediction" (Lyu et al., arXiv 2208.04482).
    Three phases. *Supernet*: a row counts where its norm exceeds its table's learned threshold, with a long-tailed
    surrogate derivative for the step, and every sample sees every field at a random width. *Search*: evolution of the
    fields' widths on the supernet's weights, by validation quality. *Retrain*: rows and widths are fixed, the model
    begins anew. Served are only kept rows, at their field's width.

    Where it differs from the paper: under a budget, rows are kept by `score` per byte until the budget is used up to
    less than a row, so that every candidate of the search has its price and the result is as small as was asked;
    without one it is as small as it happens to be. Where the bits that say which ids are kept would take more than a
    sixteenth of the budget, tables whose ids are numbered by falling frequency are kept from the first id on, if what
    fits is worth more so. A learned matrix per table, cut like the rows, lets narrow rows take
    part in all dimensions, and narrow widths are drawn as often as wide ones. Under a budget the search begins with
    widths that are the same for all tables, or for all but a large one, before random ones; it keeps the best
    candidates of all rounds, never evaluates one twice, and its finalists are compared with batch norms of their own.
    """

    config: OptEmbedConfig
    thresholds: nn.Parameter
    importance: Tensor
    _levels: Tensor
    _frequency: Tensor

    def __init__(
        self, specs: Sequence[TableSpec], config: OptEmbedConfig, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        self.stage = "fixed"
        super().__init__(specs, config, counts)
        self._rows_of_step: list[Tensor] = []
        self._shown: tuple[Tensor, Tensor] | None = None
        self._budget: RowBudget | None = None
        number = self.rows.num_rows if config.threshold_per_id else self.num_tables
        if config.prune_rows:
            self.thresholds = nn.Parameter(torch.zeros(number), requires_grad=False)
            if config.score == "taylor":
                self.register_buffer("importance", torch.zeros(self.rows.num_rows))
        harmonic = (1 / torch.arange(1, self.embedding_dim + 1, dtype=torch.float64, device="cpu")).cumsum(0)
        self.constant("_levels", (harmonic / harmonic[-1]).float())
        self._keep_frequency(counts or {})

    def _keep_frequency(self, counts: Mapping[str, Tensor]) -> None:
        self._has_frequency = all(name in counts for name in self.names)
        if self._has_frequency and not self.kept.is_meta:
            padded = [torch.cat([counts[n].float(), torch.zeros(int(self.has_shared))]) for n in self.names]
            self.register_buffer("_frequency", torch.cat(padded), persistent=False)

    # ---- lookups ----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        if self.is_final or self.stage == "fixed":
            return super().lookup(ids, table)
        if self.stage == "candidates":
            return self._lookup_candidates(ids, table)
        return self._lookup_supernet(ids, table)

    def _lookup_supernet(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        starts = self.pick(self._starts, table)
        rows = ids + starts
        own = vectors = self.rows(rows, table)
        if self.config.prune_rows:
            gate = Step.apply(self._norms(vectors) - self._thresholds_of(rows, table)).unsqueeze(-1)
            if self.has_shared:
                gate = torch.where((ids == self.pick(self._sizes, table)).unsqueeze(-1), 1.0, gate)
            own = vectors * gate
            vectors = own + self._shared_vectors(table) * (1 - gate) if self.config.pruned == "oov" else own
        if self.training:
            self._note(rows, vectors, own)
            if self.config.search_dims:
                vectors = vectors * self.prefix(self._drawn_widths(vectors.shape[:-1]))
        return self.projected(vectors, table)

    def _lookup_candidates(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """Each block of ids is shown as its candidate has it; rows are read once for all blocks."""
        assert self._shown is not None
        widths, numbers = self._shown
        ids, table = first_block(ids, table, len(widths))
        rows = ids + self.pick(self._starts, table)
        one_for_all = ids.dim() > 0 and not isinstance(table, Tensor)
        owner = owners(ids[:1] if one_for_all else ids, table, self.num_tables)
        vectors: Tensor = self.rows(rows, table)
        kept = (self._row_budget().place[rows] < numbers[:, owner]).unsqueeze(-1)
        shown = self.prefix(widths[:, owner])
        if self.config.pruned == "oov":
            vectors = torch.where(kept, vectors, self._shared_vectors(table))
        else:
            shown = shown & kept
        return self.projected(torch.where(shown, vectors, 0.0), table).flatten(0, 1)

    def _drawn_widths(self, shape: Sequence[int]) -> Tensor:
        """A width for every sample and field, each on its own."""
        if self.config.sampling == "uniform":
            return torch.randint(1, self.embedding_dim + 1, shape, device=self.kept.device)
        return torch.searchsorted(self._levels, torch.rand(shape, device=self.kept.device)) + 1

    def _shared_vectors(self, table: Tensor | int | None) -> Tensor:
        """What ids without a row get: float32 ``(T, D)``, or broadcastable to ``table`` and D."""
        vectors: Tensor = self.rows(self._starts + self._sizes, None)
        return self.pick(vectors, table)

    def _norms(self, vectors: Tensor) -> Tensor:
        return vectors.abs().sum(-1) if self.config.norm == 1 else vectors.norm(dim=-1)

    def _thresholds_of(self, rows: Tensor, table: Tensor | int | None) -> Tensor:
        return self.thresholds[rows] if self.config.threshold_per_id else self.pick(self.thresholds, table)

    def _note(self, rows: Tensor, vectors: Tensor, own: Tensor) -> None:
        """Remember what this lookup says of its rows: that they were used, and what they are worth to the loss.

        Not where only architecture parameters are trained, or nothing: rows are judged by training batches.

        Args:
            rows: int64 ``(...)``.
            vectors: float32 ``(..., D)``, of which the model gets the first dimensions.
            own: float32 ``(..., D)``, the part of it that is the rows', not that of shared ones.
        """
        if not cast(Tensor, self.rows.weight).requires_grad or not torch.is_grad_enabled():
            return
        if self.config.decay:
            self._rows_of_step.append(rows.reshape(-1))
        if self.config.prune_rows and self.config.score == "taylor" and vectors.requires_grad:
            plain, importance = own.detach(), self.importance

            def add(gradient: Tensor) -> None:
                worth = (gradient * plain).sum(-1).abs().reshape(-1).float()
                worth = worth.where(worth.isfinite().all(), torch.zeros_like(worth))  # a step that scaled losses skip
                importance.index_add_(0, rows.reshape(-1), worth)

            vectors.register_hook(add)

    # ---- phases -----------------------------------------------------------------------------------------------------

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        trained = ("network", "tables", *(["architecture"] if config.prune_rows else []))
        supernet = Phase(
            "supernet",
            trains=trained,
            bilevel=config.bilevel and config.prune_rows,
            epochs=config.supernet_epochs,
            patience=config.supernet_patience,
            any_budget=config.score != "taylor",  # whose scores are no weights
        )
        search = (Phase("search", kind="search"),) if config.search_dims else ()
        return (supernet, *search, Phase("retrain", penalty=False, rewind=config.retrain_from == "initial"))

    def enter_phase_(self, phase: Phase) -> None:
        if self.config.score in ("norm_frequency", "frequency") and not self._has_frequency:
            raise ConfigError(
                f"OptEmbedConfig(score={self.config.score!r}) needs counts of all tables: give counts= to plan or "
                "compress_, or choose score='norm' or 'taylor'"
            )
        self._budget, self._shown, self._rows_of_step = None, None, []
        self.stage = "fixed" if phase.name == "retrain" else "supernet"  # while another group is searched too

    def leave_phase_(self, phase: Phase) -> None:
        if phase.name == "supernet" and not self.config.search_dims:
            self.adopt_((self.embedding_dim,) * self.num_tables)
        self.stage = "fixed"
        self._shown = None

    def architecture(self) -> list[dict[str, Any]]:
        return [{"params": [self.thresholds], "lr": self.config.threshold_lr}] if self.config.prune_rows else []

    def penalty(self) -> Tensor:
        if self.is_final or self.stage != "supernet" or not self.config.prune_rows:
            return super().penalty()
        # Of thresholds per id the mean of each table, so that alpha means the same.
        if not self.config.threshold_per_id:
            return self.config.alpha * torch.exp(-self.thresholds).sum()
        parts = torch.exp(-self.thresholds).split(self.rows.segments)
        return self.config.alpha * torch.stack([part.mean() for part in parts]).sum()

    @torch.no_grad()
    def step_(self) -> None:
        if self._rows_of_step:
            used = torch.cat(self._rows_of_step).unique()
            weight = cast(Tensor, self.rows.weight)
            weight[used] = weight[used] * (1 - self.config.decay)
            self._rows_of_step = []

    def repeatable(self) -> Repeat:
        draws = self.training and self.stage == "supernet" and self.config.search_dims
        return _drawing_again(self.kept.device) if draws else contextlib.nullcontext

    # ---- search -----------------------------------------------------------------------------------------------------

    def make_search(self) -> Search:
        budget = self._row_budget()
        dim, config = self.embedding_dim, self.config
        constraint = "shrink" if config.constraint == "prune" and not config.prune_rows else config.constraint
        repair = None if config.limit_bytes is None else WidthRepair(budget, constraint)
        return Evolution(
            [1] * self.num_tables,
            [dim] * self.num_tables,
            config.generations,
            config.mutations,
            config.crossovers,
            config.parents,
            config.mutation_probability,
            repair=repair,
            seeds=[] if config.limit_bytes is None else _seeds(self.sizes, dim),
            power=1.0 if config.sampling == "log_uniform" else 0.0,
            seed=config.seed,
        )

    def show_(self, candidates: Sequence[Candidate]) -> None:
        budget, device = self._row_budget(), self.kept.device
        numbers = np.stack([budget.numbers(candidate) for candidate in candidates])
        widths = torch.tensor([list(candidate) for candidate in candidates], device=device)
        self._shown = widths, torch.from_numpy(numbers).int().to(device)
        self.stage = "candidates"

    def hide_(self) -> None:
        if self.stage == "candidates":
            self._shown, self.stage = None, "supernet"

    def candidate_bytes(self, candidate: Candidate) -> int:
        budget = self._row_budget()
        return budget.bytes_of(candidate, budget.numbers(candidate).tolist())

    @torch.no_grad()
    def adopt_(self, candidate: Candidate) -> None:
        self.choose_(self._row_budget().kept(candidate), candidate)
        self._budget, self._shown, self.stage = None, None, "fixed"

    def _row_budget(self) -> RowBudget:
        """What the supernet's rows are worth; worked out once, when its training is over."""
        if self._budget is None:
            falling = None
            if self._has_frequency:
                parts = self._frequency.split(self.rows.segments)
                falling = [is_falling(part[:size]) for part, size in zip(parts, self.sizes, strict=True)]
            self._budget = RowBudget(self.specs, self.config, self._scores(), self.has_shared, form_bytes, falling)
        return self._budget

    @torch.no_grad()
    def _scores(self) -> Tensor:
        """Score of every row, float32 ``(R,)``; of rows that the supernet drops as `RowBudget` has them."""
        rows = torch.arange(self.rows.num_rows, device=self.kept.device)
        owner = torch.repeat_interleave(
            torch.arange(self.num_tables, device=rows.device), torch.tensor(self.rows.segments, device=rows.device)
        )
        norms = torch.cat(
            [self._norms(self.rows(r, t)) for r, t in zip(rows.split(65536), owner.split(65536), strict=True)]
        )
        if not self.config.prune_rows:
            return torch.full_like(norms, torch.inf)
        score = self._ranked(norms)
        kept = norms > self._thresholds_of(rows, owner)
        score = torch.where(kept, score.clamp_min(TINY), -1 / score.clamp_min(TINY))
        for start, size in zip(self.rows.starts(), self.sizes, strict=True):
            score[start + size : start + size + self.has_shared] = torch.inf
        return score

    def _ranked(self, norms: Tensor) -> Tensor:
        score = self.config.score
        if score == "taylor":
            return self.importance.clone()
        if score == "norm" or (score == "auto" and not self._has_frequency):
            return norms
        return self._frequency.clone() if score == "frequency" else norms * self._frequency

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @classmethod
    def size_range(cls, specs: Sequence[TableSpec], config: Any, known: Knowledge) -> tuple[int, int]:
        if config.prune_rows or config.num_kept is not None or config.dims is not None:
            return super().size_range(specs, config, known)
        return 1, specs[0].embedding_dim

    @classmethod
    def resize(cls, specs: Sequence[TableSpec], config: Any, size: int, known: Knowledge) -> Any:
        if config.prune_rows or config.num_kept is not None or config.dims is not None:
            return super().resize(specs, config, size, known)
        return cls.complete(specs, replace(config, dims={spec.name: size for spec in specs}), known)

    def training_only(self) -> list[str]:
        names = ["thresholds", "importance", "_frequency"]
        return [*super().training_only(), *(name for name in names if hasattr(self, name))]


class Step(torch.autograd.Function):
    """``1[x > 0]``, with the long-tailed derivative ``2 − 4|x|`` up to 0.4, 0.4 up to 1, and 0 beyond."""

    @staticmethod
    def forward(ctx: Any, margin: Tensor) -> Tensor:
        """Compare float ``(...)`` with zero."""
        ctx.save_for_backward(margin)
        return (margin > 0).to(margin.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Multiply by the surrogate derivative."""
        size = ctx.saved_tensors[0].abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))
        return gradient * slope


def _drawing_again(device: torch.device) -> Repeat:
    """A context in which random numbers begin where they are now, and afterwards go on as if it had not been."""
    on_gpu = device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng([device] if on_gpu else []):
            if on_gpu:
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
            yield

    return again


def _seeds(sizes: Sequence[int], dim: int) -> list[Candidate]:
    """First candidates: one width for all tables, and one of the largest tables at another width than the others.

    Under a budget the widths of the largest tables pay for each other, so that a good pair of them is hard to reach by
    changing one at a time.
    """
    widths = sorted({dim, *(-(-dim // 2**power) for power in range(1, dim.bit_length() + 1))}, reverse=True)
    uniform = [(width,) * len(sizes) for width in widths]
    largest = sorted(range(len(sizes)), key=lambda table: -sizes[table])[:_LARGEST]
    changed = [
        (*base[:table], width, *base[table + 1 :])
        for base in uniform
        for table in largest
        for width in widths
        if width != base[table]
    ]
    return list(dict.fromkeys([*uniform, *changed]))
