"""Compress the embedding tables of a model in place, and finalize them when it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embcomp.budget import Budget, Plan
from embcomp.config import StrategyConfig, config_to_json
from embcomp.errors import ConfigError, NoMatchingTableError, SpecError, did_you_mean
from embcomp.growth import resize_
from embcomp.integrations import fuse_collections
from embcomp.memory import MemoryReport, format_bytes, sum_reports
from embcomp.phases import PLAIN
from embcomp.planning import plan_groups
from embcomp.reporting import format_rows, table_rows
from embcomp.sites import Fields, Filter, Patterns, Site, attach, choose, find_groups, find_sites, home_of, owner_path
from embcomp.specs import TableSpec
from embcomp.tables import EmbeddingTables
from embcomp.training.batch_norms import recalibrate_
from embcomp.training.joint_cut import cut_groups_, joint_front
from embcomp.training.reassigned import step_tables_

if TYPE_CHECKING:
    from embcomp.training.search import FrontPoint

INITS = ("random", "trained")


@dataclass(frozen=True)
class Compression:
    """What `compress_` did to a model, and the way to everything that its tables offer.

    Attributes:
        model: the model; another object than was given only where the model itself was an ``nn.Embedding``.
        tables: the groups.
        plans: the plan of each group.
        notes: what else changed, for people.
    """

    model: nn.Module
    tables: tuple[EmbeddingTables, ...]
    plans: tuple[Plan, ...]
    notes: tuple[str, ...] = ()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of all groups, for an optimizer of their own."""
        for tables in self.tables:
            yield from tables.parameters()

    def memory(self) -> MemoryReport:
        """The bytes of all groups, part by part."""
        return sum_reports(tables.memory() for tables in self.tables)

    def penalty(self) -> Tensor:
        """The strategies' own loss terms, a float32 scalar to add to the training loss."""
        return torch.stack([tables.penalty() for tables in self.tables]).sum()

    def step_(self, *optimizers: torch.optim.Optimizer) -> None:
        """After a step of the optimizers: what strategies do then; ``dynamic`` counts ids and gives rows to others.

        Args:
            optimizers: all that train the tables; of rows that went to other ids they remember nothing afterwards.
        """
        step_tables_(self.tables, *optimizers)

    def resize_(
        self,
        sizes: Mapping[str, int] | None = None,
        budget: str | float | Budget | None = None,
        num_slots: Mapping[str, int] | None = None,
    ) -> Compression:
        """Give tables more ids, in place, and keep trained rows; make optimizers anew. See `embcomp.resize_`.

        Returns:
            The handle of the same model with the new plans.
        """
        planned = resize_(self.model, sizes, budget, num_slots)
        groups = find_groups(self.model).values()
        plans = {id(tables): plan for tables, plan in zip(groups, planned, strict=True)}
        return replace(self, plans=tuple(plans[id(tables)] for tables in self.tables))

    def finalize_(self) -> Compression:
        """Turn all groups into their serving form, in place."""
        for tables in self.tables:
            tables.finalize_()
        return self

    def pareto(self) -> list[FrontPoint]:
        """The front of sizes that one training has led to, of all groups together; see `EmbeddingTables.pareto`.

        Values are those that the search evaluated, with batch-norm statistics as training had left them.

        Raises:
            ConfigError: if the strategy has no front, it is not there yet, or groups were not cut together.
        """
        return joint_front([tables.pareto() for tables in self.tables])

    def cut_(self, budget: str | float | Budget, recalibrate: Callable[[], None] | None = None) -> Compression:
        """Go to another budget on that front, before `finalize_`; see `EmbeddingTables.cut_`.

        One group alone can be cut too, ``handle.tables[0].cut_(budget)``, where a share is one of the group's bytes;
        `embcomp.training.recalibrate_` then does for the model what ``recalibrate`` does here.

        Args:
            budget: see `Budget.parse`; a share is one of the tables' float32 bytes.
            recalibrate: runs the model on training batches, as in `embcomp.training.Phases.search_`: batch-norm
                statistics are taken from that. A model with batch norms needs it, or has those of another form.

        Raises:
            ConfigError: as `pareto`, and if the tables are finalized.
            BudgetError: if the budget can't be read, or the smallest form takes more.
        """
        cut_groups_(self.tables, budget)
        if recalibrate is not None:
            recalibrate_(self.model, recalibrate)
        return self

    def to_dense(self) -> dict[str, Tensor]:
        """Dense rows of every table: name -> float32 ``(V, D)``, without gradients."""
        return _dense(self.tables)

    def report(self) -> str:
        """Say what was compressed: every table with its bytes before and after, and what else changed."""
        memory, number = self.memory(), sum(tables.num_tables for tables in self.tables)
        head = (
            f"embcomp: {number} tables of {type(self.model).__name__} in {len(self.tables)} groups, "
            f"{format_bytes(memory.full_bytes)} -> {format_bytes(memory.serve_bytes)} ({memory.ratio:.2%})"
        )
        phases = {tables.phases() for tables in self.tables} - {PLAIN}
        of_phases = [
            f"  trains in phases, {', '.join(phase.name for phase in own)}: take the model through them by "
            "embcomp.training.Phases, else it is served as it begins"
            for own in phases
        ]
        return "\n".join([head, format_rows(table_rows(self.tables)), *self.notes, *of_phases])

    def __str__(self) -> str:
        return self.report()


def compress_(
    model: nn.Module,
    config: str | StrategyConfig | Patterns,
    budget: str | float | Budget | None = None,
    filter_fn: Filter | None = None,
    counts: Mapping[str, Any] | None = None,
    init: str = "random",
    fused: Mapping[str, Fields] | None = None,
    device: torch.device | str | None = None,
    budget_on: str = "serve",
    verbose: bool = True,
) -> Compression:
    """Replace the embedding tables of a model by compressed ones, in place: same calls, same shapes, same dtypes.

    Tables are ``nn.Embedding`` and ``nn.EmbeddingBag`` modules anywhere in the model, in containers too. They are named
    by their path. Modules that share one weight become one table; an ``nn.Linear`` tied to it scores with the
    compressed table. Tables with one dimension and one config become one group. If anything raises, the model is as it
    was. Create the optimizer afterwards. References that Python code holds to the old modules, and subclass attributes
    of theirs, are not carried over. A padding id's vector is zero, whatever row the plain table had there.

    Args:
        model: the model. If it is itself a table, go on with ``handle.model``.
        config: a strategy's name or config, for all tables or by name: pattern -> config. A pattern is a name, one with
            ``*`` and ``?``, or ``"re:..."``, a regular expression for the whole name; the first that fits wins, and
            None leaves a table as it is.
        budget: one for all tables together, see `Budget.parse`; a share is one of their float32 bytes.
        filter_fn: ``(module, name) -> bool``: whether a table may be compressed.
        counts: table name -> ``(V,)`` how often ids occur in the training data.
        init: ``"random"``: new weights, of each table's measured standard deviation; ``"trained"``: fitted to the
            tables' weights as they are. Tables without gradients stay frozen, and must be fitted.
        fused: table name -> sizes (or field name -> size) of the logical tables that lie in it one behind another.
        device: where tables on ``meta`` are built; by default with the model's first real parameter.
        budget_on: see `plan`.
        verbose: print the report.

    Raises:
        NoMatchingTableError: if there is nothing to compress, or a pattern or a name fits no table.
        SpecError: if a table can't be replaced faithfully, or counts or fields don't fit it.
        ConfigError: if a config is wrong.
        BudgetError: if the budget can't be met; ``minimum_bytes`` is the smallest that can.
    """
    if init not in INITS:
        raise ConfigError(f"init={init!r}: {did_you_mean(init, INITS)}")
    chosen = choose(find_sites(model, fused), config, filter_fn)
    for site, _ in chosen:
        site.check()
        _check_init(site, init)
    owner_path(model, [site for site, _ in chosen])
    groups = _grouped(chosen, model, device)
    dense = {name: rows for site, _ in chosen for name, rows in site.slices(site.weight.detach()).items()}
    counts = _split_counts([site for site, _ in chosen], counts or {})
    wanted = [(group.specs(), group.config) for group in groups]
    plans = plan_groups(wanted, budget, counts, dense if init == "trained" else None, budget_on)
    built = [group.build(planned) for group, planned in zip(groups, plans, strict=True)]
    if init == "trained":
        for tables in built:
            own = {name: counts[name] for name in tables.names if name in counts}
            tables.load_dense_({name: dense[name] for name in tables.names}, own)
    placed = [(site, tables) for group, tables in zip(groups, built, strict=True) for site in group.sites]
    notes = _notes(model, [site for site, _ in placed], groups)
    model, of_collections = fuse_collections(attach(model, placed, built))
    handle = Compression(model, tuple(built), tuple(plans), (*notes, *of_collections))
    if verbose:
        print(handle.report())
    return handle


def finalize_(model: nn.Module) -> nn.Module:
    """Turn every group in a model into its serving form, in place: smallest bytes, no gradients, the same vectors.

    Raises:
        NoMatchingTableError: if there is no group in the model.
    """
    for tables in groups_of(model):
        tables.finalize_()
    return model


def to_dense(model: nn.Module) -> dict[str, Tensor]:
    """Dense rows of every compressed table in a model: name -> float32 ``(V, D)``, without gradients.

    Raises:
        NoMatchingTableError: if there is no group in the model.
    """
    return _dense(groups_of(model))


def groups_of(model: nn.Module) -> list[EmbeddingTables]:
    """The groups in a model.

    Raises:
        NoMatchingTableError: if there is none.
    """
    groups = list(find_groups(model).values())
    if not groups:
        raise NoMatchingTableError(f"{type(model).__name__} has no compressed tables: call compress_ first")
    return groups


@dataclass
class _Group:
    """Tables that become one group."""

    config: StrategyConfig
    device: torch.device
    frozen: bool
    sites: list[Site]

    def specs(self) -> list[TableSpec]:
        return [spec for site in self.sites for spec in site.specs()]

    def build(self, planned: Plan) -> EmbeddingTables:
        if self.device.type == "meta":
            with self.device:
                tables = planned.build()
        else:
            tables = planned.build(self.device)
        return tables.requires_grad_(False) if self.frozen else tables


def _grouped(
    chosen: Sequence[tuple[Site, StrategyConfig]], model: nn.Module, meta_device: torch.device | str | None
) -> list[_Group]:
    groups: dict[tuple[Any, ...], _Group] = {}
    for site, config in chosen:
        device, frozen = home_of(site, model, meta_device), not site.weight.requires_grad
        key = (site.weight.shape[1], config_to_json(config), device, frozen)
        groups.setdefault(key, _Group(config, device, frozen, [])).sites.append(site)
    return list(groups.values())


def _check_init(site: Site, init: str) -> None:
    if init == "trained" and site.weight.is_meta:
        raise SpecError(f"init='trained': table {site.name!r} is on meta, it has no weights; load them first")
    if init == "random" and not site.weight.requires_grad:
        raise SpecError(
            f"table {site.name!r} is frozen (requires_grad=False): random weights would never be trained; give "
            "init='trained', or unfreeze it"
        )


def _split_counts(sites: Sequence[Site], counts: Mapping[str, Any]) -> dict[str, Tensor]:
    whole = {site.name: site for site in sites if site.fields is not None}
    split: dict[str, Tensor] = {}
    for name, values in counts.items():
        count = torch.as_tensor(values)
        if name not in whole:
            split[name] = count
        elif count.shape != (len(whole[name].weight),):
            raise SpecError(f"counts of {name!r} have shape {tuple(count.shape)}, not ({len(whole[name].weight)},)")
        else:
            split |= whole[name].slices(count)
    return split


def _notes(model: nn.Module, sites: Sequence[Site], groups: Sequence[_Group]) -> tuple[str, ...]:
    notes = []
    for site in sites:
        paths = [path for path, _ in site.embeddings[1:]]
        notes += [f"  {site.name}: also at {', '.join(paths)}, one table"] * bool(paths)
        notes += [f"  {path}: tied to {site.name}, scores with the compressed table" for path, _, _ in site.others]
        if site.fields is not None:
            notes.append(f"  {site.name}: {len(site.fields)} fields, addressed by offsets")
    if any(group.frozen for group in groups):
        frozen = [site.name for group in groups if group.frozen for site in group.sites]
        notes.append(f"  frozen, as before: {', '.join(frozen)}")
    if any(not path for site in sites for path, _ in site.embeddings):
        notes.append(f"  the model itself was the {type(model).__name__}, which is as it was: go on with handle.model")
    return tuple(notes)


@torch.no_grad()
def _dense(groups: Sequence[EmbeddingTables]) -> dict[str, Tensor]:
    return {name: tables.materialize(name) for tables in groups for name in tables.names}
