"""Exports to ONNX, for ONNX Runtime.

Everything that tables compute exists there: integers of 64 bits that wrap, shifts, and gathers. What does not is
rewritten before: bytes that are read as another dtype (`embcomp.storage.RowStore.portable`) and assertions
(`_IndexGuard`). Every file is loaded and run before it takes its place.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import default_decompositions
from torch.onnx import ONNXProgram
from torch.onnx.errors import OnnxExporterError
from torch.utils._pytree import tree_leaves

from embcomp.errors import ExportError, MissingDependencyError
from embcomp.integrations.export.files import Exported, whole_file
from embcomp.integrations.export.graphs import capture, quiet, told
from embcomp.integrations.export.subjects import Subject, check_on_cpu, is_keyed, make_subject, twin_of
from embcomp.sites import find_groups
from embcomp.storage import RowStore
from embcomp.swap import Compression
from embcomp.tables import EmbeddingTables

_LARGEST = 2**31 - 1
"""Bytes of the largest message of Protocol Buffers, in which an ONNX file consists."""
_TOLERANCE = 1e-5


def export_onnx(
    model: nn.Module | Compression,
    path: str | Path,
    *,
    table: str | int | None = None,
    bag: str | None = None,
    example: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Export to one ``.onnx`` file, and check that ONNX Runtime computes what is computed here.

    Vectors are the same bit for bit where they are stored rows, and to 1e-6 of their size where they are sums or
    products, which ONNX Runtime may add up in another order. Unseen ids follow the policy of the tables. With
    ``unseen="error"`` the graph has an index that is out of range as soon as an id is; by the ONNX specification that
    is an error, and ONNX Runtime raises it on the CPU (``InvalidArgument``, "indices element out of data bounds"). Its
    GPU providers do not check indices: there, vectors of unseen ids are NaN.

    Args:
        model: as `export_pt2`; on the CPU.
        path: ends with ``.onnx``.
        table: as `export_pt2`.
        bag: as `export_pt2`.
        example: as `export_pt2`.
        dynamic_shapes: as `export_pt2`.
        overwrite: as `export_pt2`.

    Raises:
        ExportError: as `export_pt2`, if the model has an operation that ONNX or ONNX Runtime lacks, which is named,
            takes a ``KeyedJaggedTensor``, or 2 GiB or more.
        InputError: if there is no such table.
        MissingDependencyError: without ``embcomp[serve]``.
    """
    runtime = _packages()
    subject = make_subject(model, table, bag, example, dynamic_shapes)
    check_on_cpu(subject, "ONNX")
    if any(is_keyed(value) for value in subject.example):
        raise ExportError(
            "ONNX has no KeyedJaggedTensor: use 'pt2' or 'aoti', or export the groups of tables, such as "
            "handle.tables[0], with bag="
        )
    if subject.serve_bytes > _LARGEST:
        raise ExportError(f"an ONNX file holds 2 GiB at most, and these tables take {subject.serve_bytes} B: use 'pt2'")
    with whole_file(path, ".onnx", overwrite) as unfinished:
        program = _converted(replace(subject, module=rewritten(subject.module)), subject.strategies)
        program.save(unfinished, external_data=False)
        inputs, outputs = _run(runtime, unfinished, subject)
    return told("onnx", path, replace(subject, inputs=inputs, outputs=outputs))


class _IndexGuard(EmbeddingTables):
    """Refuses unseen ids by an index that is out of range, for graphs that can't assert."""

    _nothing: Tensor

    def _raise_if_unseen(self, ids: Tensor, table: Tensor | int | None) -> None:
        """Nothing: `lookup` does."""

    def lookup(self, ids: Tensor, table: Tensor | int | None) -> Tensor:
        """Look up, and add zeros: those of unseen ids are where none are."""
        seen = (ids >= 0) & (ids < self.pick(self._sizes, table))
        zero = self._nothing.index_select(0, (~seen).long().reshape(-1)).view(ids.shape)
        vectors = super().lookup(torch.where(seen, ids, 0), table)
        return vectors + torch.where(seen, zero, math.nan).unsqueeze(-1)


def rewritten(module: nn.Module) -> nn.Module:
    """Copy a module, but for its tensors, into one that computes the same by what ONNX has."""
    twin = twin_of(module)
    for tables in find_groups(twin).values():
        for owner in list(tables.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, RowStore):
                    setattr(owner, name, child.portable())
        if tables.config.unseen == "error":
            tables.constant("_nothing", torch.zeros(1))
            tables.__class__ = type(type(tables).__name__, (_IndexGuard, type(tables)), {})
    return twin


def _converted(subject: Subject, strategies: str) -> ONNXProgram:
    inputs, outputs = subject.inputs or None, subject.outputs or None
    otherwise = _written_otherwise()
    try:
        with quiet():
            program = capture(subject)
            if any(node.target in otherwise for node in program.graph.nodes):
                program = program.run_decompositions(otherwise)
            found = torch.onnx.export(program, input_names=inputs, output_names=outputs, verbose=False)
    except OnnxExporterError as error:
        missing = ", ".join(_missing_operations(error)) or f"something ({str(error).partition(chr(10))[0]})"
        raise ExportError(
            f"strategy {strategies} can't be exported to ONNX, which lacks {missing}: use 'pt2' or 'aoti', which run "
            "every strategy"
        ) from error
    assert found is not None
    for node in found.model.graph:  # where each came from, many times the size of a small table
        node.metadata_props.clear()
    return found


def _written_otherwise() -> dict[OpOverload, Callable[..., Tensor]]:
    """Operations that torch's exporter does not know, or translates to what ONNX Runtime refuses."""
    aten = torch.ops.aten
    return {
        aten.__rshift__.Tensor: _shift_right,
        aten.__lshift__.Tensor: torch.bitwise_left_shift,
        aten.einsum.default: default_decompositions()[aten.einsum.default],
    }


def _shift_right(values: Tensor, by: Tensor) -> Tensor:
    """Shift; that of bytes would become signed."""
    if values.dtype != torch.uint8:
        return torch.bitwise_right_shift(values, by)
    return torch.bitwise_right_shift(values.to(torch.int32), by.to(torch.int32)).to(torch.uint8)


def _missing_operations(error: BaseException | None) -> list[str]:
    """Those that torch's exporter names in an error or its causes."""
    found: list[str] = []
    while error is not None:
        found += re.findall(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error))
        error = error.__cause__
    return sorted(set(found))


def _run(runtime: ModuleType, file: Path, subject: Subject) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Run a file on the subject's example; returns the names of inputs and outputs."""
    try:
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        given = [leaf for leaf in tree_leaves(subject.example) if isinstance(leaf, Tensor)]
        inputs = tuple(one.name for one in session.get_inputs())
        found = session.run(None, {name: value.numpy() for name, value in zip(inputs, given, strict=True)})
    except _runtime_errors(runtime) as error:
        raise ExportError(
            f"strategy {subject.strategies}: ONNX Runtime {runtime.__version__} can't run what was exported ({error}): "
            "use 'pt2' or 'aoti', which run every strategy"
        ) from error
    with torch.no_grad():
        wanted = tree_leaves(subject.module(*subject.example))
    if not all(_are_close(torch.from_numpy(one), two) for one, two in zip(found, wanted, strict=True)):
        raise ExportError(f"strategy {subject.strategies}: ONNX Runtime computes something else; use 'pt2'")
    return inputs, tuple(one.name for one in session.get_outputs())


def _are_close(one: Tensor, two: Tensor) -> bool:
    one, two = one.double(), two.double()
    size = float(two.abs().nan_to_num().max()) if two.numel() else 0.0
    return torch.allclose(one, two, rtol=_TOLERANCE, atol=_TOLERANCE * size, equal_nan=True)


def _runtime_errors(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """ONNX Runtime's errors have no base class of their own; ``ValueError``: inputs that the graph does not have."""
    state = runtime.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "NotImplemented", "RuntimeException")
    return ValueError, *(getattr(state, name) for name in names)


def _packages() -> ModuleType:
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError(
            f"exports to ONNX need onnx, onnxscript and onnxruntime ({error}): pip install embcomp[serve]"
        ) from error
