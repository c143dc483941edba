"""Exports by ``torch.export``: the graph with its weights, or compiled ahead of time for the CPU.

Both compute what the tables compute, operation by operation, and give the same vectors bit for bit but where products
with a matrix are summed in another order, or a compiler sums so; ids that ``unseen="error"`` refuses raise
``RuntimeError``.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch.export import ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from embcomp.errors import ExportError
from embcomp.integrations.export.files import Exported, whole_file
from embcomp.integrations.export.subjects import Subject, check_on_cpu, make_subject
from embcomp.swap import Compression


def export_pt2(
    model: nn.Module | Compression,
    path: str | Path,
    *,
    table: str | int | None = None,
    bag: str | None = None,
    example: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Export the graph and its weights by `torch.export.save`; ``torch.export.load(path).module()`` is called like it.

    Of a group of tables this exports a lookup: without ``table``, ids int64 ``(B, T)`` to float32 ``(B, T, D)``, a
    column per table; with it, or where there is one table alone, ids ``(N,)`` to ``(N, D)``; with ``bag``, ids
    ``(N,)`` and offsets int64 ``(B,)``, where bags begin, to ``(B, D)``. B and N may be anything.

    Args:
        model: finalized tables, or a model with such, or what `embcomp.compress_` returned.
        path: ends with ``.pt2``.
        table: whose vectors; None for those of all tables of the group.
        bag: ``"sum"`` or ``"mean"``: pool them; padding counts for nothing, and empty bags give zeros.
        example: arguments of a whole model.
        dynamic_shapes: which of their dimensions may change, as `torch.export.export` takes it; None for the first of
            each tensor.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ExportError: if the tables are not finalized or have no values, `torch.export` can't follow the model, or the
            file can't be written.
        InputError: if there is no such table.
    """
    subject = make_subject(model, table, bag, example, dynamic_shapes)
    with whole_file(path, ".pt2", overwrite) as unfinished:
        program = capture(subject)
        program.example_inputs = None  # they would be in the file, and a KeyedJaggedTensor as a pickle
        with _PatientFile(unfinished, "wb") as file:
            torch.export.save(program, file)
            if file.error is not None:
                raise file.error
    return told("pt2", path, subject)


def export_aoti(
    model: nn.Module | Compression,
    path: str | Path,
    *,
    table: str | int | None = None,
    bag: str | None = None,
    example: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Compile ahead of time for this kind of CPU, by AOTInductor; ``torch._inductor.aoti_load_package(path)`` runs it.

    It takes a C++ compiler and some ten seconds. The package also runs from C++, without Python.

    Args:
        model: as `export_pt2`; on the CPU.
        path: as `export_pt2`.
        table: as `export_pt2`.
        bag: as `export_pt2`.
        example: as `export_pt2`.
        dynamic_shapes: as `export_pt2`.
        overwrite: as `export_pt2`.

    Raises:
        ExportError: as `export_pt2`, and if there is no C++ compiler, or something is not on the CPU.
        InputError: if there is no such table.
    """
    subject = make_subject(model, table, bag, example, dynamic_shapes)
    check_on_cpu(subject, "AOTInductor")
    _check_compiler()
    with whole_file(path, ".pt2", overwrite) as unfinished, quiet():
        program = capture(subject)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))
        except (InductorError, CppCompileError) as error:
            raise ExportError(
                f"AOTInductor can't compile strategy {subject.strategies} ({str(error)[:500]}): check the C++ "
                "compiler, or use 'pt2', which needs none"
            ) from error
    return told("aoti", path, subject)


class _PatientFile(io.FileIO):
    """Takes whatever is written, and keeps the first error: torch's writer of archives ends the process at one."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        whole = rest = memoryview(content).cast("B")
        while rest and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return len(whole)


def capture(subject: Subject) -> ExportedProgram:
    """Trace a subject.

    Raises:
        ExportError: if `torch.export` can't follow it.
    """
    try:
        # or else a batch of one would be another graph wherever an operation asks whether a size is one
        with torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            return torch.export.export(subject.module, subject.example, dynamic_shapes=subject.dynamic_shapes)
    except (RuntimeError, ValueError, TypeError, torch._dynamo.exc.TorchDynamoException) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"torch.export can't follow {type(subject.module).__name__} ({first}): give example= that fits, and "
            "dynamic_shapes= if a dimension is fixed; or export the tables alone"
        ) from error


def told(kind: str, path: str | Path, subject: Subject) -> Exported:
    """What is told of a file that was written."""
    path = Path(path)
    size = path.stat().st_size
    return Exported(kind, path, size, subject.serve_bytes, subject.inputs, subject.outputs, subject.unseen)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporters from telling what they have no translations for, and warning of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_compiler() -> None:
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ExportError(
            "AOTInductor needs a C++ compiler and found none: install g++, or name one in the environment variable "
            "CXX; 'pt2' files need none"
        ) from error
