"""Finalized models as files that other runtimes serve.

| function | file | read by |
| --- | --- | --- |
| `export_pt2` | ``.pt2``, the graph and its weights | ``torch.export.load(path).module()``, on any device |
| `export_aoti` | ``.pt2``, compiled machine code | ``torch._inductor.aoti_load_package(path)``, or C++ without Python |
| `export_onnx` | ``.onnx`` | ``onnxruntime.InferenceSession(path)`` |
| `export_fbgemm` | ``.safetensors``, rows for FBGEMM's inference kernels | `load_fbgemm`, as a TorchRec collection |
| `dump_vectors` | ``.npy`` or ``.parquet``, the vectors of a table | ANN indexes |

The first three take a group of tables, of which they export a lookup, or a whole compressed model. All write the file
beside its place and rename it then, and refuse what would not serve as the model here does. Each returns `Exported`.
"""

from collections.abc import Callable

from embcomp.integrations.export.fbgemm import export_fbgemm, load_fbgemm
from embcomp.integrations.export.files import Exported
from embcomp.integrations.export.graphs import export_aoti, export_pt2
from embcomp.integrations.export.onnx import export_onnx
from embcomp.integrations.export.vectors import dump_vectors

GRAPHS: dict[str, Callable[..., Exported]] = {"pt2": export_pt2, "aoti": export_aoti, "onnx": export_onnx}
"""Kind of a file with a graph -> what exports lookups, or a whole model, to it."""

SERVED: dict[str, Callable[..., Exported]] = {**GRAPHS, "fbgemm": export_fbgemm}
"""Kind of a file that is served from -> what exports a group of tables to it."""

SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "fbgemm": ".safetensors"}
"""Kind of a file that is served from -> what its name ends with."""

__all__ = [
    "GRAPHS",
    "SERVED",
    "SUFFIXES",
    "Exported",
    "dump_vectors",
    "export_aoti",
    "export_fbgemm",
    "export_onnx",
    "export_pt2",
    "load_fbgemm",
]
