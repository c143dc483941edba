"""Where a model keeps its embedding tables: found by type, joined by the weight they share, checked, and replaced."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from embcomp.config import StrategyConfig, make_config
from embcomp.errors import ConfigError, NoMatchingTableError, SpecError, did_you_mean
from embcomp.specs import TableSpec
from embcomp.tables import EmbeddingTables
from embcomp.views import EmbeddingBagView, EmbeddingView, TableView, TiedLinear

GROUPS = "embcomp_tables"
"""The attribute under which a compressed model owns its groups."""
ROOT = "embedding"
"""The name of the table where the model itself is an ``nn.Embedding``."""
LEAST_STD = 1e-4
"""Initial standard deviation of tables that were constant: factors that are all zero would never train."""
SAMPLE = 2**17
"""Rows that are enough to measure a standard deviation."""

Fields = Mapping[str, int] | Sequence[int]
Filter = Callable[[nn.Module, str], bool]
Plain = nn.Embedding | nn.EmbeddingBag
Patterns = Mapping[str, str | StrategyConfig | None]


class Groups(nn.ModuleList):
    """The groups of a compressed model, in the order in which they were added."""


@dataclass
class Site:
    """A table of the model: one weight, and every place that uses it.

    Attributes:
        name: path of the first place, or `ROOT`.
        weight: float ``(V, D)``.
        embeddings: path and module of every ``nn.Embedding`` and ``nn.EmbeddingBag`` with this weight.
        others: path, attribute and module of everything else that holds the weight.
        fields: field name -> number of ids, where several logical tables lie behind one another in the weight.
    """

    name: str
    weight: Tensor
    embeddings: list[tuple[str, Plain]] = field(default_factory=list)
    others: list[tuple[str, str, nn.Module]] = field(default_factory=list)
    fields: dict[str, int] | None = None

    @property
    def padding_idx(self) -> int | None:
        """The padding id, as the model sees it."""
        return self.embeddings[0][1].padding_idx

    @property
    def names(self) -> list[str]:
        """Names of the logical tables."""
        return [self.name] if self.fields is None else [f"{self.name}.{name}" for name in self.fields]

    @property
    def paths(self) -> set[str]:
        """Every path that will be replaced."""
        return {path for path, _ in self.embeddings} | {path for path, _, _ in self.others}

    def slices(self, values: Tensor) -> dict[str, Tensor]:
        """Cut a weight ``(V, D)`` or counts ``(V,)`` into the logical tables."""
        sizes = [len(values)] if self.fields is None else list(self.fields.values())
        return dict(zip(self.names, values.split(sizes), strict=True))

    def specs(self) -> list[TableSpec]:
        """Describe the logical tables; the standard deviation is measured where there is a weight to measure."""
        specs, start = [], 0
        for name, rows in self.slices(self.weight.detach()).items():
            padding = None if self.padding_idx is None else self.padding_idx - start
            if padding is not None and not 0 <= padding < len(rows):
                padding = None
            specs.append(TableSpec(name, len(rows), rows.shape[1], padding, measured_std(rows, padding)))
            start += len(rows)
        return specs

    def check(self) -> None:
        """Raise `SpecError` if the table does something that a compressed one can't do."""
        for path, module in self.embeddings:
            problem = _problem(module) or (
                f"padding_idx={module.padding_idx} here and {self.padding_idx} at {self.embeddings[0][0]!r}, one weight"
                if module.padding_idx != self.padding_idx
                else None
            )
            if problem:
                raise SpecError(
                    f"table {path or self.name!r} can't be compressed as it is: {problem}. Change that, or leave the "
                    f"table out with filter_fn=lambda module, name: name != {self.name!r}"
                )
        for path, attribute, holder in self.others:
            if attribute != "weight" or type(holder).forward is not nn.Linear.forward:
                raise SpecError(
                    f"the weight of table {self.name!r} is also parameter {attribute!r} of {path or 'the model'!r} "
                    f"({type(holder).__name__}), which would keep the uncompressed copy: remove that parameter and "
                    f"read {self.name}.weight, or call {self.name}.scores(queries), in its forward"
                )


def measured_std(rows: Tensor, padding_idx: int | None) -> float:
    """Standard deviation of a table's entries (of a sample, if it is big), its padding row aside.

    On ``meta``, where there is nothing to measure, the default of `TableSpec`.
    """
    if rows.is_meta:
        return TableSpec.init_std
    ids = torch.arange(0, len(rows), max(1, len(rows) // SAMPLE), device=rows.device)
    if padding_idx is not None and len(rows) > 1:
        ids = ids[ids != padding_idx]
    values = rows[ids].float()
    std = values.std(correction=0) if values.numel() > 1 else values.abs().max()
    return max(float(std), LEAST_STD)


def find_sites(model: nn.Module, fused: Mapping[str, Fields] | None = None) -> list[Site]:
    """Find every table of a model, compressed ones aside.

    Args:
        model: any module, an ``nn.Embedding`` included.
        fused: name of a table -> its fields, where it holds several logical tables that ids address by offsets.

    Raises:
        NoMatchingTableError: if there is no table of a name in ``fused``.
        SpecError: if the fields don't add up to the table's rows.
    """
    inside = {id(m) for group in find_groups(model).values() for m in group.modules()}
    modules = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if id(m) not in inside]
    sites: dict[int, Site] = {}
    for path, module in modules:
        if isinstance(module, Plain):
            site = sites.setdefault(id(module.weight), Site(path or ROOT, module.weight))
            site.embeddings.append((path, module))
    for path, module in modules:
        if not isinstance(module, Plain):
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(parameter) in sites:
                    sites[id(parameter)].others.append((path, name, module))
    by_name = {site.name: site for site in sites.values()}
    for name, fields in (fused or {}).items():
        if name not in by_name:
            raise NoMatchingTableError(f"fused={{{name!r}: ...}} names no table; {did_you_mean(name, by_name)}")
        by_name[name].fields = _checked_fields(by_name[name], fields)
    return list(by_name.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in what compiles it or copies it to several devices, whose names have a prefix of theirs."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile, slow to import
            model = inner
        else:
            return model


def find_groups(model: nn.Module) -> dict[str, EmbeddingTables]:
    """The groups inside a model, by their prefix in its state dict; groups that are parts of others are not listed."""
    groups: dict[str, EmbeddingTables] = {}
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingTables) and not any(path.startswith(prefix) for prefix in groups):
            groups[f"{path}." if path else ""] = module
    return groups


def choose(
    sites: Sequence[Site], config: str | StrategyConfig | Patterns, filter_fn: Filter | None
) -> list[tuple[Site, StrategyConfig]]:
    """Choose the tables to compress, and how.

    Args:
        sites: the model's tables.
        config: for all of them, or by name: exact, with ``*`` and ``?``, or ``"re:..."`` (a regular expression for the
            whole name). The first pattern that fits wins; None leaves a table as it is.
        filter_fn: gets a module and its name, and says whether it may be compressed.

    Raises:
        NoMatchingTableError: if nothing remains, or a pattern fits no table.
        ConfigError: if a pattern is no regular expression, or earlier patterns took all that it fits.
    """
    allowed = [site for site in sites if filter_fn is None or filter_fn(site.embeddings[0][1], site.name)]
    if not sites:
        raise NoMatchingTableError(
            "the model has no nn.Embedding and no nn.EmbeddingBag that is not compressed already: nothing to compress "
            "(tables that another library has quantized are none any more: compress_ comes first)"
        )
    names = ", ".join(site.name for site in sites)
    if not allowed:
        raise NoMatchingTableError(f"filter_fn allows none of the model's tables: {names}")
    if not isinstance(config, Mapping):
        return [(site, make_config(config)) for site in allowed]
    chosen: dict[str, tuple[Site, StrategyConfig] | None] = {}
    for pattern, value in config.items():
        fitting = [site for site in allowed if any(_fits(pattern, path or ROOT) for path, _ in site.embeddings)]
        if not fitting:
            raise NoMatchingTableError(f"pattern {pattern!r} fits no table; tables: {names}")
        fresh = [site for site in fitting if site.name not in chosen]
        if not fresh and pattern != "*":
            raise ConfigError(f"pattern {pattern!r} is never reached: earlier patterns fit its tables; put it first")
        chosen |= {site.name: None if value is None else (site, make_config(value)) for site in fresh}
    found = [pair for site in allowed if (pair := chosen.get(site.name)) is not None]
    if not found:
        raise NoMatchingTableError(f"every pattern says None: nothing to compress; tables: {names}")
    return found


def home_of(site: Site, model: nn.Module, meta_device: torch.device | str | None = None) -> torch.device:
    """Where a table's replacement goes: its device; for ``meta``, the one given or that of the first real parameter."""
    if not site.weight.is_meta:
        return site.weight.device
    if meta_device is not None:
        return torch.device(meta_device)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("meta"))


def owner_path(model: nn.Module, sites: Sequence[Site]) -> str:
    """The path of the module that will own the groups: the model, or the first view where the model is a container.

    Raises:
        SpecError: if the model has an attribute of that name already.
    """
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):  # a member more would change what they do
        owners = [path.rpartition(".")[0] for path, module in model.named_modules() if isinstance(module, Groups)]
        return (owners or [sites[0].embeddings[0][0]])[0]
    if hasattr(model, GROUPS) and not isinstance(getattr(model, GROUPS), Groups):
        raise SpecError(f"{type(model).__name__} has an attribute {GROUPS!r} already, where the groups go: rename it")
    return ""


def attach(
    model: nn.Module, placed: Sequence[tuple[Site, EmbeddingTables]], groups: Sequence[EmbeddingTables]
) -> nn.Module:
    """Put views in the place of tables, and register their groups.

    Returns:
        the model, or its replacement where the model itself was a table.
    """
    owner = owner_path(model, [site for site, _ in placed])
    training = model.training
    for site, tables in placed:
        views: dict[int, TableView] = {}
        for path, module in [*site.embeddings, *((path, module) for path, _, module in site.others)]:
            if id(module) not in views:
                views[id(module)] = _view_of(module, site, tables).train(module.training)
            model = put(model, path, views[id(module)])
    home = model.get_submodule(owner)
    registered = getattr(home, GROUPS, Groups())
    registered.extend(group.train(training and not group.is_final) for group in groups)
    registered.training = training
    home.add_module(GROUPS, registered)
    return model


def _view_of(module: nn.Module, site: Site, tables: EmbeddingTables) -> TableView:
    options = {"dtype": site.weight.dtype, "padding_idx": site.padding_idx, "table": site.name}
    if isinstance(module, nn.EmbeddingBag):
        return EmbeddingBagView(tables, site.names, module.mode, module.include_last_offset, **options)
    if isinstance(module, nn.Linear):
        return TiedLinear(tables, site.names, module.bias, **options)
    return EmbeddingView(tables, site.names, **options)  # type: ignore[arg-type]


def put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module in the place of another; returns the model, or the module where it takes the model's place."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


def has_hooks(module: nn.Module) -> bool:
    """Whether anything was registered to be called with a module: forward, backward, or by state dicts."""
    return any(kept for name, kept in vars(module).items() if name.endswith("_hooks"))


def _problem(module: Plain) -> str | None:
    plain = nn.EmbeddingBag if isinstance(module, nn.EmbeddingBag) else nn.Embedding
    if type(module).forward is not plain.forward:
        return f"{type(module).__name__} has a forward of its own, which would be lost"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is computed by a parametrization"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} renormalizes dense rows in place"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True scales gradients of dense rows"
    if has_hooks(module):
        return "it has hooks, which would be lost: register them after compress_"
    return None


def _checked_fields(site: Site, fields: Fields) -> dict[str, int]:
    sizes = dict(fields) if isinstance(fields, Mapping) else {str(i): size for i, size in enumerate(fields)}
    if not sizes or any(int(size) != size or size < 1 for size in sizes.values()):
        raise SpecError(f"fused table {site.name!r}: fields {sizes} must be sizes of at least 1")
    if sum(sizes.values()) != len(site.weight):
        raise SpecError(
            f"fused table {site.name!r}: its fields have {sum(sizes.values())} ids together, its weight "
            f"{len(site.weight)} rows; add a field for rows that none of them uses"
        )
    return {name: int(size) for name, size in sizes.items()}


def _fits(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return pattern == name or fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from None
