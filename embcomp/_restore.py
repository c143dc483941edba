"""Fill tables from a checkpoint, alone or inside a model, after everything about them is checked."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embcomp._checkpoint import Checkpoint, get
from embcomp.config import config_from_dict, config_to_dict, strategy_of
from embcomp.errors import EmbcompError, IncompatibleStateError
from embcomp.integrations import fuse_collections
from embcomp.sites import GROUPS, Site, attach, find_groups, find_sites, home_of, owner_path
from embcomp.specs import TableSpec
from embcomp.storage import RowStore
from embcomp.tables import EmbeddingTables


@dataclass(frozen=True)
class SavedGroup:
    """A group as a checkpoint describes it: empty tables on ``meta``, and the tensors that fill them, checked.

    Attributes:
        prefix: of its tensors' names.
        frozen: whether nothing of it is trained.
        empty: the tables.
        state: the tensors.
        digest: of the checkpoint.
        unrounded: names of the row stores whose rounding is switched off; None where that is not known, in serving
            forms and checkpoints from before it was saved.
    """

    prefix: str
    frozen: bool
    empty: EmbeddingTables
    state: dict[str, Tensor]
    digest: str
    unrounded: list[str] | None

    def build(self) -> EmbeddingTables:
        """Fill the tables."""
        self.empty.load_state_dict(self.state, assign=True)
        self.empty.loaded_from = self.digest
        self.set_rounding_of(self.empty)
        return self.empty.requires_grad_(False) if self.frozen else self.empty

    def set_rounding_of(self, tables: EmbeddingTables) -> None:
        """Switch rounding on and off as it was saved; scales stay as they are."""
        if self.unrounded is not None:
            for name, store in stores_of(tables):
                if store.is_unrounded != (name in self.unrounded):
                    store.rounding = name not in self.unrounded

    def owns(self, name: str) -> bool:
        """Whether a tensor of the checkpoint belongs to the group."""
        return name.startswith(self.prefix)


def stores_of(tables: EmbeddingTables) -> list[tuple[str, RowStore]]:
    """The row stores in tables, by name."""
    return [(name, module) for name, module in tables.named_modules() if isinstance(module, RowStore)]


def saved_groups(checkpoint: Checkpoint) -> list[SavedGroup]:
    """Check every group of a checkpoint, and build it on ``meta``."""
    file, groups = checkpoint.config_file, []
    for raw in checkpoint.get("groups", list):
        prefix = get(raw, "prefix", str, file)
        empty = _empty_tables(raw, file)
        state = {
            name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)
        }
        state = empty.adapt_(state)
        compare_states(empty.state_dict(), state, checkpoint.weights_file, prefix, dtypes=True)
        try:
            empty.check_state(state)
        except IncompatibleStateError as error:
            raise IncompatibleStateError(f"{checkpoint.weights_file} contradicts itself: {error}") from error
        frozen, unrounded = get(raw, "frozen", bool, file), _unrounded(raw, empty, file)
        groups.append(SavedGroup(prefix, frozen, empty, state, checkpoint.digest, unrounded))
    if not groups:
        raise IncompatibleStateError(f"{file} describes no group of tables")
    return groups


def _empty_tables(raw: Any, file: Path) -> EmbeddingTables:
    try:
        config = config_from_dict(get(raw, "config", dict, file))
        specs = [TableSpec(**spec) for spec in get(raw, "specs", list, file)]
        with torch.device("meta"):
            tables = strategy_of(config).tables_class(specs, config)
            if "front" in raw:
                tables.load_front_(get(raw, "front", dict, file))
            return tables.finalize_() if get(raw, "is_final", bool, file) else tables
    except IncompatibleStateError:
        raise
    except (EmbcompError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise IncompatibleStateError(f"{file} describes tables that can't be built: {error}") from error


def _unrounded(raw: Any, empty: EmbeddingTables, file: Path) -> list[str] | None:
    if empty.is_final or "unrounded" not in raw:
        return None
    names, known = get(raw, "unrounded", list, file), [name for name, _ in stores_of(empty)]
    if any(name not in known for name in names):
        raise IncompatibleStateError(f"{file}: 'unrounded' must be some of {known}, found {reprlib.repr(names)}")
    return names


def compare_states(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path, prefix: str = "", dtypes: bool = False
) -> None:
    """Raise `IncompatibleStateError` unless names and shapes (and dtypes) are the same."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        texts = (
            f"{what} {_some(prefix, names)}" for what, names in (("lacks", missing), ("has besides", extra)) if names
        )
        raise IncompatibleStateError(f"{file} does not fit: it {' and '.join(texts)}")
    for name, tensor in expected.items():
        want, have = (tuple(tensor.shape), tensor.dtype), (tuple(found[name].shape), found[name].dtype)
        if want[0] != have[0] or (dtypes and want[1] != have[1]):
            raise IncompatibleStateError(
                f"{file}: tensor {prefix + name!r} is {have[1]} {have[0]}, expected {want[1]} {want[0]}"
            )


def _some(prefix: str, names: Sequence[str]) -> str:
    shown = ", ".join(repr(prefix + name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _rest(saved: Sequence[SavedGroup], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors beside the groups."""
    aliases = checkpoint.get("aliases", dict)
    owned = {n for n in checkpoint.tensors if any(g.owns(n) or g.owns(aliases.get(n, n)) for g in saved)}
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in owned}


def load_plain(
    model: nn.Module, saved: Sequence[SavedGroup], checkpoint: Checkpoint
) -> tuple[nn.Module, list[EmbeddingTables]]:
    """Compress a plain model as the saved one was, and load its weights."""
    placed = _place(model, saved, checkpoint)
    owner = owner_path(model, [site for site, _ in placed])
    for index, group in enumerate(saved):
        prefix = f"{owner}.{GROUPS}.{index}.".lstrip(".")
        if group.prefix != prefix:
            raise IncompatibleStateError(
                f"{checkpoint.config_file}: group {index} was saved as {group.prefix!r}, and would be {prefix!r} in "
                "this model: compress the model as the saved one was, or load the tables alone with load_tables(folder)"
            )
    replaced = {f"{path}.weight".lstrip(".") for site, _ in placed for path in site.paths}
    rest = _rest(saved, checkpoint)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in replaced}
    compare_states(expected, rest, checkpoint.weights_file)
    assign = any(tensor.is_meta for tensor in expected.values())
    homes = {id(group): home_of(site, model) for site, group in placed}
    built = {id(group): group.build() for group in saved}
    for key, home in homes.items():
        built[key].to("cpu" if home.type == "meta" else home)
    model, _ = fuse_collections(attach(model, [(s, built[id(group)]) for s, group in placed], list(built.values())))
    _load_rest_(model, rest, assign)
    return model, list(built.values())


def _load_rest_(model: nn.Module, rest: Mapping[str, Tensor], assign: bool) -> None:
    """Load the tensors beside the groups; names that were one tensor, as those of tied weights are, stay one."""
    names: dict[int, list[str]] = {}
    for name, tensor in _named_tensors(model).items():
        names.setdefault(id(tensor), []).append(name)
    model.load_state_dict(rest, strict=False, assign=assign)
    if assign:
        loaded = _named_tensors(model)
        for tied in names.values():
            if filled := [name for name in tied if name in rest]:  # else it is a buffer that is not saved, or of tables
                for path, _, own in (name.rpartition(".") for name in tied):
                    setattr(model.get_submodule(path), own, loaded[filled[-1]])  # the last, as where values are copied


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _fused(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Fields of the tables that hold several."""
    file, found = checkpoint.config_file, checkpoint.get("fused", dict)
    tables = {table: get(found, table, dict, file) for table in found}
    return {table: {name: get(fields, name, int, file) for name in fields} for table, fields in tables.items()}


def _place(model: nn.Module, saved: Sequence[SavedGroup], checkpoint: Checkpoint) -> list[tuple[Site, SavedGroup]]:
    """Find the model's table for every saved one, in the order of the groups."""
    file = checkpoint.config_file
    try:
        sites = find_sites(model, _fused(checkpoint))
    except EmbcompError as error:
        raise IncompatibleStateError(f"{file} does not fit the model: {error}") from error
    owners = {name: site for site in sites for name in site.names}
    placed: dict[str, tuple[Site, SavedGroup]] = {}
    for group in saved:
        for spec in group.empty.specs:
            site = owners.get(spec.name)
            if site is None:
                raise IncompatibleStateError(
                    f"{file} has table {spec.name!r}, the model has not; the model's: {', '.join(owners) or 'none'}"
                )
            own = next(own for own in site.specs() if own.name == spec.name)
            if own != dataclasses.replace(spec, init_std=own.init_std):
                raise IncompatibleStateError(f"{file}: table {spec.name!r} is {_size(spec)}, in the model {_size(own)}")
            placed.setdefault(site.name, (site, group))
    for site, _ in placed.values():
        site.check()
    return list(placed.values())


def load_compressed(model: nn.Module, saved: Sequence[SavedGroup], checkpoint: Checkpoint) -> list[EmbeddingTables]:
    """Load weights into a model that is compressed as the saved one was."""
    groups = find_groups(model)
    by_prefix = {group.prefix: group for group in saved}
    if groups.keys() != by_prefix.keys():
        raise IncompatibleStateError(
            f"{checkpoint.config_file} has groups {sorted(by_prefix)}, the model {sorted(groups)}: compress the model "
            "as the saved one was, or load into a plain model"
        )
    for prefix, tables in groups.items():
        _check_same(tables, by_prefix[prefix].empty, checkpoint.config_file)
    rest = _rest(saved, checkpoint)
    expected = {name: t for name, t in model.state_dict().items() if not any(name.startswith(p) for p in groups)}
    compare_states(expected, rest, checkpoint.weights_file)
    for prefix, tables in groups.items():
        if by_prefix[prefix].empty.is_final:
            tables.finalize_()
        tables.take_specs_(by_prefix[prefix].empty.specs)
        tables.load_state_dict(by_prefix[prefix].state, assign=any(p.is_meta for p in tables.parameters()))
        tables.loaded_from = checkpoint.digest
        by_prefix[prefix].set_rounding_of(tables)
        tables.load_front_(by_prefix[prefix].empty.front_state())
    _load_rest_(model, rest, assign=any(tensor.is_meta for tensor in expected.values()))
    return list(groups.values())


def _check_same(tables: EmbeddingTables, empty: EmbeddingTables, file: Path) -> None:
    have, want = config_to_dict(tables.config), config_to_dict(empty.config)
    if have != want:
        differ = {key for key in have.keys() | want.keys() if have.get(key) != want.get(key)}
        shown = ", ".join(f"{key} {want.get(key)!r}, in the model {have.get(key)!r}" for key in sorted(differ))
        raise IncompatibleStateError(
            f"{file}: tables {', '.join(empty.names)} were saved with another strategy or other sizes: {shown}. "
            "Compress the model with the same config and budget, or load into a plain model"
        )
    for mine, own in zip(tables.specs, empty.specs, strict=False):
        if mine != dataclasses.replace(own, init_std=mine.init_std):
            raise IncompatibleStateError(
                f"{file}: table {own.name!r} is {_size(own)}, the model has {mine.name!r} of {_size(mine)}"
            )
    if len(tables.specs) != len(empty.specs):
        raise IncompatibleStateError(f"{file} has tables {', '.join(empty.names)}, the model {', '.join(tables.names)}")
    if tables.is_final and not empty.is_final:
        raise IncompatibleStateError(f"{file} has the training form, the model's tables are finalized: build it anew")


def _size(spec: TableSpec) -> str:
    padding = "" if spec.padding_idx is None else f", padding_idx {spec.padding_idx}"
    return f"{spec.num_embeddings} x {spec.embedding_dim}{padding}"
