"""Save and load compressed tables, alone or inside their model: safetensors and JSON, no pickle, atomically.

A checkpoint is a folder with ``embcomp_config.json``, the weights, and a README for people. The config names the
weights file by a digest of its content and is replaced last, so a process that dies at any moment leaves the old
checkpoint or the new one, whole, and files of other origin in the folder are never touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from embcomp._checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from embcomp._optimizer_state import (
    OptimizerState,
    PhaseState,
    check_fit,
    listed,
    load_states_,
    packed,
    read_phase,
    read_states,
    states_of,
)
from embcomp._restore import compare_states, load_compressed, load_plain, saved_groups, stores_of
from embcomp.budget import Plan
from embcomp.config import config_to_dict
from embcomp.errors import ConfigError, IncompatibleStateError
from embcomp.memory import format_bytes, sum_reports
from embcomp.reporting import markdown_rows, table_rows
from embcomp.sites import find_groups, unwrapped
from embcomp.swap import Compression, groups_of
from embcomp.tables import EmbeddingTables
from embcomp.views import TableView

if TYPE_CHECKING:
    from embcomp.training import Phases


def save_pretrained(
    module: nn.Module | Compression,
    folder: str | Path,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    phases: Phases | None = None,
) -> Path:
    """Save tables, or a model with all its weights, into a folder.

    The form is saved that the tables have: `finalize_` first to save what serves, or save the training form to go on
    with, which keeps its front of sizes, and whether rows are rounded (`EmbeddingTables.set_rounding_`). An older
    checkpoint in the folder is replaced atomically. One process may save to a folder at a time; others may load from it
    meanwhile.

    Args:
        module: `EmbeddingTables`, a model with compressed tables, or what `compress_` returned. Of what
            ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` wrap, the model is saved.
        folder: made if it is not there.
        optimizers: whose state and options are saved along, for `load_optimizers_`, to go on with training.
        phases: that the model is being trained in, if it is: they know the weights that a later phase goes back to.

    Returns:
        the folder.

    Raises:
        NoMatchingTableError: if there are no compressed tables in the model.
        ConfigError: if one of the optimizers is none of torch, or wraps others, or two train one parameter, or
            ``phases`` are missing.
        IncompatibleStateError: if something in the state is no tensor with values, so that it can't be saved, or rows
            lie in several processes, or an optimizer trains what is not the model's.
        WriteError: if the folder can't be written to; it has the older checkpoint then, or the new one, whole.
    """
    model = unwrapped(module.model if isinstance(module, Compression) else module)
    if any(tables.is_sharded for tables in find_groups(model).values()):
        raise IncompatibleStateError("rows of these tables lie in several processes: use save_sharded in all of them")
    states, initial = None, None
    if optimizers is not None or phases is not None:
        _check_phases(model, phases)
        initial = None if phases is None else PhaseState(phases.phase.name, phases.initial)
        states = states_of(dict(model.named_parameters()), _every(optimizers or (), phases))
    return write_pretrained(model, folder, model.state_dict(), states, initial)


def write_pretrained(
    model: nn.Module,
    folder: str | Path,
    state: Mapping[str, Any],
    states: Sequence[OptimizerState] | None = None,
    phase: PhaseState | None = None,
) -> Path:
    """Save a model whose state, and that of its optimizers, was gathered elsewhere; see `save_pretrained`."""
    groups_of(model)
    optimizers, kept = packed(states or (), phase)
    tensors, aliases = _distinct({**state, **kept})
    groups = find_groups(model)
    views = [view for view in model.modules() if isinstance(view, TableView) and len(view.names) > 1]
    described = {
        "groups": [_describe(prefix, tables) for prefix, tables in groups.items()],
        "fused": {view.table: _fields(view) for view in views},
        "aliases": aliases,
        **({} if states is None else {"training": optimizers}),
    }
    return write_checkpoint(Path(folder), described, tensors, _card(list(groups.values())))


def load_tables(folder: str | Path, device: torch.device | str = "cpu") -> list[EmbeddingTables]:
    """Load every group of a checkpoint, in its saved form; no model is needed.

    Args:
        folder: where `save_pretrained` saved.
        device: where the tables go.

    Raises:
        IncompatibleStateError: if the checkpoint is missing, corrupt, truncated or foreign, or needs a strategy that is
            not registered.
    """
    checkpoint = read_checkpoint(Path(folder))
    return [group.build().to(device) for group in saved_groups(checkpoint)]


def from_pretrained(folder: str | Path, device: torch.device | str = "cpu") -> EmbeddingTables:
    """Load the one group of a checkpoint; see `load_tables`.

    Raises:
        IncompatibleStateError: as `load_tables`, and if there are several groups.
    """
    groups = load_tables(folder, device)
    if len(groups) != 1:
        raise IncompatibleStateError(
            f"{folder} holds {len(groups)} groups of tables: use load_tables(folder) or load_pretrained_(model, folder)"
        )
    return groups[0]


def load_pretrained_(model: nn.Module, folder: str | Path, verbose: bool = True) -> Compression:
    """Load a saved model into a freshly built one, in place: its tables are compressed as the saved ones were.

    The model may be plain, as before `compress_`, or compressed with the same configs. Everything is checked before
    the model is touched.

    Args:
        model: built like the saved one; of what is wrapped, see `save_pretrained`, the model within is loaded.
        folder: where `save_pretrained` saved.
        verbose: print the report.

    Raises:
        IncompatibleStateError: as `load_tables`, and if the checkpoint does not fit the model: other tables,
            strategies, sizes, or other weights beside them.
    """
    checkpoint = read_checkpoint(Path(folder))
    saved = saved_groups(checkpoint)
    if {group.prefix for group in saved} != find_groups(model).keys():
        model = unwrapped(model)
    if find_groups(model):
        groups = load_compressed(model, saved, checkpoint)
    else:
        model, groups = load_plain(model, saved, checkpoint)
    plans = tuple(Plan(tables.specs, tables.config, None, tables.memory(), {}) for tables in groups)
    handle = Compression(model, tuple(groups), plans)
    if verbose:
        print(handle.report())
    return handle


def load_optimizers_(
    model: nn.Module | Compression,
    folder: str | Path,
    optimizers: Sequence[torch.optim.Optimizer],
    phases: Phases | None = None,
) -> None:
    """Give optimizers the state that was saved with a model, to go on with training after `load_pretrained_`.

    Learning rates and other options become those that were saved, as with ``load_state_dict`` of torch's optimizers.

    Args:
        model: the loaded one, whose parameters the optimizers train.
        folder: where `save_pretrained` saved, with ``optimizers=``.
        optimizers: as those that were saved: of the same kinds, in the same order, for the same parameters.
        phases: if the model was saved with some: those of the loaded model, in the phase that it was saved in. As to
            enter a phase may change weights, these become what they were when they were saved.

    Raises:
        ConfigError: if one of the optimizers is none of torch, or wraps others, or two train one parameter.
        IncompatibleStateError: as `load_tables`, if there is no state of optimizers, it does not fit, phases are not as
            they were, or the model was loaded from another checkpoint; nothing is changed then.
    """
    model = unwrapped(model.model if isinstance(model, Compression) else model)
    checkpoint = read_checkpoint(Path(folder))
    saved, phase = read_states(checkpoint), read_phase(checkpoint)
    check_loaded(model, checkpoint)
    there = None if phases is None else phases.phase.name
    if (wanted := None if phase is None else phase.name) != there:
        raise IncompatibleStateError(
            f"{checkpoint.config_file} was saved in phase {wanted}, and is loaded in phase {there}: give phases=, "
            "entered as they were"
        )
    parameters = dict(model.named_parameters())
    optimizers = _every(optimizers, phases)
    check_fit(states_of(parameters, optimizers), saved, checkpoint)
    if phases is not None and phase is not None:
        own = {name: tensor for name, tensor in phases.weights().items() if name in phase.initial}
        compare_states(own, phase.initial, checkpoint.weights_file, "first weight ")
        load_compressed(model, saved_groups(checkpoint), checkpoint)
        phases.initial = phase.initial
    load_states_(parameters, optimizers, saved)


def _every(optimizers: Iterable[torch.optim.Optimizer], phases: Phases | None) -> list[torch.optim.Optimizer]:
    """The optimizers of a loop, and those of architecture parameters."""
    return [*listed(optimizers), *([] if phases is None else phases.optimizers)]


def _check_phases(model: nn.Module, phases: Phases | None) -> None:
    """Refuse to leave out what later phases go back to."""
    for tables in groups_of(model):
        if phases is None and tables.current_phase is not None:
            raise ConfigError(
                f"tables {', '.join(tables.names[:3])} are in phase {tables.current_phase!r}, one of several: give "
                "phases= too, which know the weights that a later one goes back to"
            )


def check_loaded(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse a model whose tables were loaded from another checkpoint, such as the one that was in the folder before.

    Raises:
        IncompatibleStateError: if so.
    """
    for tables in groups_of(model):
        if tables.loaded_from not in (None, checkpoint.digest):
            raise IncompatibleStateError(
                f"{checkpoint.config_file} is not the checkpoint that the model was loaded from, but a later one or "
                "another: call load_pretrained_ again, so that weights and optimizers are of one moment"
            )


def _describe(prefix: str, tables: EmbeddingTables) -> dict[str, Any]:
    front = tables.front_state()
    report, trained = tables.memory(), [p.requires_grad for p in tables.parameters()]
    return {
        "prefix": prefix,
        "config": config_to_dict(tables.config),
        "specs": [dataclasses.asdict(spec) for spec in tables.specs],
        "is_final": tables.is_final,
        "frozen": bool(trained) and not any(trained) and not tables.is_paused,
        "serve_bytes": report.serve_bytes,
        "full_bytes": report.full_bytes,
        **({} if front is None else {"front": front}),
        **({} if tables.is_final else {"unrounded": [name for name, own in stores_of(tables) if own.is_unrounded]}),
    }


def _fields(view: TableView) -> dict[str, int]:
    sizes = {spec.name: spec.num_embeddings for spec in view.tables.specs}
    return {name.removeprefix(f"{view.table}."): sizes[name] for name in view.names}


def _distinct(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors that share no memory, and name -> name of those that are one tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.layout is not torch.strided:
            raise IncompatibleStateError(
                f"state {name!r} is no dense tensor with values ({type(value).__name__}"
                f"{' on meta' if getattr(value, 'is_meta', False) else ''}): it can't be saved without pickle"
            )
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.detach().clone() if storage in seen else value.detach().contiguous()
        seen[key] = seen[storage] = name
    return tensors, aliases


def _card(groups: Sequence[EmbeddingTables]) -> str:
    report = sum_reports(tables.memory() for tables in groups)
    state = "serving form" if all(tables.is_final for tables in groups) else "training form"
    return (
        f"<!-- Written by embcomp with every save. Delete this line to keep your own text. -->\n"
        f"# Compressed embedding tables\n\n{format_bytes(report.full_bytes)} of float32 tables, served in "
        f"{format_bytes(report.serve_bytes)} ({report.serve_bytes} B, {report.ratio:.2%}); saved in their {state}.\n\n"
        f"{markdown_rows(table_rows(groups))}\n\n```python\nimport embcomp\n\n"
        f"tables = embcomp.load_tables(folder)             # the tables alone\n"
        f"handle = embcomp.load_pretrained_(model, folder)  # into a freshly built model\n```\n"
    )
