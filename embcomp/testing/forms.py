"""Checks of the forms that tables take: finalized, saved, copied, moved, compiled, exported."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable

import torch
from torch import Tensor
from torch.export import ExportedProgram

from embcomp.budget import Plan
from embcomp.config import config_from_dict, config_to_json, strategy_of
from embcomp.errors import IncompatibleStateError
from embcomp.tables import EmbeddingTables
from embcomp.testing._cases import (
    UNSEEN_IDS,
    Strategy,
    build,
    clone_state,
    every_id,
    every_vector,
    make_specs,
    make_weights,
    planned,
    require,
    require_close,
    require_finalized,
    require_same,
    train_step,
)


def check_finalize(strategy: Strategy) -> None:
    """`finalize` gives the vectors of evaluation, exactly but where rows are rounded only then; nothing is trained.

    Rows that are rounded after training (``rows="int4:after"``) may be off by ``4 · 2⁻ᵇⁱᵗˢ`` of the vectors' size.
    """
    for with_counts in (False, True):
        tables = fitted(planned(strategy, make_specs(), with_counts=with_counts)).eval()
        wanted, before = every_vector(tables), clone_state(tables)
        final = tables.finalize()
        require_finalized(every_vector(final), wanted, strategy)
        require(final.is_final and not any(p.requires_grad for p in final.parameters()), "something is still trained")
        for name, tensor in before.items():
            require_same(clone_state(tables)[name], tensor, f"finalize() changed {name} of the training form")
        served = every_vector(final)
        require_same(every_vector(final.train()), served, "the finalized form in train mode")
        require_same(every_vector(final.finalize()), served, "finalizing twice")
        require(tables.finalize_() is tables, "finalize_ does not return the tables themselves")
        require_same(every_vector(tables), served, "finalize_ in place")
        _require_no_fit(final)


def _require_no_fit(final: EmbeddingTables) -> None:
    try:
        final.load_dense_(make_weights(final.specs))
    except IncompatibleStateError:
        return
    raise AssertionError("load_dense_ on the finalized form raises no IncompatibleStateError")


def check_widths(strategy: Strategy) -> None:
    """`widths_of` gives a number per id, 0 to D and the same in both forms, or None; a value takes a bit or more."""
    tables = fitted(planned(strategy, make_specs())).eval()
    final, total = tables.finalize(), 0
    for spec in tables.specs:
        widths, served = tables.widths_of(spec.name), final.widths_of(spec.name)
        if widths is None or served is None:
            require(widths is served, f"widths_of({spec.name!r}) is None in one form alone")
            continue
        shape = tuple(widths.shape)
        require(
            widths.dtype == torch.int64 and shape == (spec.num_embeddings,),
            f"widths_of({spec.name!r}) is {widths.dtype} {shape}, not int64 ({spec.num_embeddings},)",
        )
        require(bool(((widths >= 0) & (widths <= spec.embedding_dim)).all()), f"widths of {spec.name!r} not in [0, D]")
        require_same(served, widths, f"widths_of({spec.name!r}) after finalizing")
        total += int(widths.sum())
    held = 8 * tables.memory().serve_bytes
    require(total <= held, f"widths_of tells of {total} values in {held} bits")


def fitted(plan: Plan) -> EmbeddingTables:
    """Tables that are neither as initialised nor at rest: fitted to weights, then trained by a step."""
    return train_step(plan.build().load_dense_(make_weights(plan.specs)))


def check_state_dict(strategy: Strategy) -> None:
    """A state dict brings other tables of the same plan to the same vectors, bit by bit; both forms."""
    for with_counts in (False, True):
        made = planned(strategy, make_specs(), with_counts=with_counts)
        tables, fresh = fitted(made), made.build()
        fresh.load_state_dict(tables.state_dict())
        require_same(every_vector(fresh), every_vector(tables), "training form after load_state_dict")
        final, fresh = tables.finalize(), made.build().finalize()
        fresh.load_state_dict(final.state_dict())
        require_same(every_vector(fresh), every_vector(final), "serving form after load_state_dict")


def check_config(strategy: Strategy) -> None:
    """A completed config survives JSON, and with a state it rebuilds the tables on ``meta``, without data at hand."""
    for with_counts in (False, True):
        made = planned(strategy, make_specs(), with_counts=with_counts)
        config = config_from_dict(json.loads(config_to_json(made.config)))
        require(config == made.config, f"{made.config} came back from JSON as {config}")
        tables = fitted(made)
        for what, source in (("training", tables), ("serving", tables.finalize())):
            with torch.device("meta"):
                rebuilt = strategy_of(config).tables_class(made.specs, config)
                rebuilt = rebuilt.finalize_() if source.is_final else rebuilt
            rebuilt.load_state_dict(source.state_dict(), assign=True)
            require_same(every_vector(rebuilt), every_vector(source), f"rebuilt {what} form (counts: {with_counts})")


def check_copies(strategy: Strategy) -> None:
    """`copy.deepcopy` and `pickle` keep vectors, and a copy shares no memory with its source."""
    tables = fitted(planned(strategy, make_specs(), with_counts=True))
    for form in (tables, tables.finalize()):
        wanted = every_vector(form)
        for what, twin in (("deepcopy", copy.deepcopy(form)), ("pickle", pickle.loads(pickle.dumps(form)))):
            require_same(every_vector(twin), wanted, what)
            with torch.no_grad():
                for tensor in twin.parameters():
                    tensor.zero_()
            require_same(every_vector(form), wanted, f"the source of a {what} that was changed")


def check_moves(strategy: Strategy) -> None:
    """`.to` keeps vectors: to the CPU, to CUDA where there is one, to float64, and to bfloat16 but for its rounding."""
    tables = fitted(planned(strategy, make_specs()))
    for form in (tables, tables.finalize()):
        ids, wanted = every_id(form), every_vector(form)
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            moved = copy.deepcopy(form).to(device)
            require_close(moved(ids.to(device)).cpu(), form(ids), f"vectors on {device}", 1e-4)
            require_same(every_vector(moved.to("cpu")), wanted, f"vectors back from {device}")
        require_close(every_vector(copy.deepcopy(form).to(torch.float64)), wanted, "vectors in float64")
        off = (every_vector(copy.deepcopy(form).to(torch.bfloat16)) - wanted).norm() / wanted.norm()
        require(off < 0.25, f"vectors in bfloat16 are off by {off:.3f} of their norm")


def check_compile(strategy: Strategy, backend: str = "aot_eager") -> None:
    """`torch.compile(fullgraph=True)` agrees with eager, unseen ids too: training form with gradients, serving form.

    Args:
        strategy: a strategy's name or config.
        backend: backend of `torch.compile`; ``"inductor"`` generates code, and takes long.
    """
    tables = build(strategy, unseen="hash")
    final = build(strategy, unseen="zero").finalize()
    ids, table = _mixed_ids(tables), torch.tensor(1)
    wanted, got = _compiled(tables, ids, backend)
    require_close(got, wanted, "compiled training form", 1e-4)
    _require_same_gradients(tables, wanted, got)
    wanted, got = _compiled(lambda ids: final(ids[:, 2], "item"), ids, backend)
    require_close(got, wanted, "compiled serving form, one table", 1e-4)
    wanted, got = _compiled(lambda ids: final.bag(ids, None, table), ids, backend)
    require_close(got, wanted, "compiled serving form, bag of a table given as a tensor", 1e-4)
    torch.compiler.reset()


def _compiled(call: Callable[[Tensor], Tensor], ids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    torch.compiler.reset()
    return call(ids), torch.compile(call, fullgraph=True, backend=backend)(ids)


def _require_same_gradients(tables: EmbeddingTables, wanted: Tensor, got: Tensor) -> None:
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    trained = {name: p for name, p in tables.named_parameters() if p.requires_grad}
    eager, compiled = (
        torch.autograd.grad((vectors * pull).sum(), [*trained.values()], allow_unused=True) for vectors in (wanted, got)
    )
    for name, one, two in zip(trained, eager, compiled, strict=True):
        require((one is None) == (two is None), f"compiling changes whether {name} gets a gradient")
        if one is not None and two is not None:
            require_close(two.to_dense(), one.to_dense(), f"gradient of {name}, compiled", 1e-3)


def _mixed_ids(tables: EmbeddingTables) -> Tensor:
    """Seen ids, and below them unseen ones, int64 ``(B, T)``."""
    return torch.cat([every_id(tables)[:6], torch.tensor(UNSEEN_IDS)[:, None].expand(-1, tables.num_tables)])


def check_export(strategy: Strategy) -> None:
    """`torch.export` with a dynamic batch agrees with eager: evaluation form with OOV rows, raising serving form.

    The latter goes through a ``.pt2`` file.
    """
    tables = build(strategy, unseen="oov_row").eval()
    evaluated = _export(tables).module()
    require_close(evaluated(_mixed_ids(tables)), tables(_mixed_ids(tables)), "exported evaluation form", 1e-4)
    final = build(strategy, unseen="error").finalize()
    exported, ids = _saved(_export(final)), every_id(final)
    require_close(exported(ids), final(ids), "exported serving form", 1e-4)
    try:
        exported(_mixed_ids(final))
    except (RuntimeError, IndexError):
        return
    raise AssertionError("unseen='error': the exported form looks up ids outside their tables")


def _export(tables: EmbeddingTables) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        return torch.export.export(tables, (every_id(tables)[:5],), dynamic_shapes={"ids": {0: batch}})


def _saved(program: ExportedProgram) -> Callable[[Tensor], Tensor]:
    """The program as it is after saving and loading."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()
