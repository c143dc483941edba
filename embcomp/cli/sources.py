"""Files that say which tables there are: lists of tables, vocabularies, weights, and checkpoints."""

from __future__ import annotations

import csv
import importlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from embcomp._checkpoint import CONFIG, get, read_config
from embcomp.cli.weights import SUFFIXES, table_shapes
from embcomp.errors import EmbcompError, MissingDependencyError, SpecError, did_you_mean
from embcomp.specs import TableSpec

_SIZE = ("num_embeddings", "size", "vocab_size", "rows")
_DIM = ("embedding_dim", "dim")
_NAME = ("table", "name", "field")
_OPTIONS = (*_SIZE, *_DIM, "padding_idx")

HELP = (
    ".yaml or .json: {dim: 16, tables: {user: 1000000, item: {size: 5000, dim: 8}}}, where a vocabulary (a mapping or "
    "list of values) may stand for its size: the number of values, or where they have distinct indices that begin with "
    "0, 1 or 2, the rows up to the last index; a list of values alone, or a .txt with one in each line, is the "
    "vocabulary of one table, called as the file; .csv or .tsv with columns table, size and, if you like, dim; "
    ".safetensors, .npy or .pt with weights; or a folder that save_pretrained has written"
)


def read_specs(path: Path, dim: int | None = None, patterns: Sequence[str] = ()) -> list[TableSpec]:
    """Read which tables there are.

    Args:
        path: a file or a folder, see `HELP`.
        dim: D of tables of which the file does not say it.
        patterns: which matrices of a file of weights are tables, see `embcomp.cli.weights.RULE`.

    Raises:
        SpecError: if the file can't be read, or does not describe tables; the message says what it may look like.
        IncompatibleStateError: if the config of a checkpoint is corrupt, foreign or from the future.
        MissingDependencyError: for YAML without PyYAML.
    """
    if not path.exists():
        raise SpecError(f"{path} does not exist; tables come from {HELP}")
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return [TableSpec(name, *shape) for name, shape in table_shapes(path, patterns).items()]
    if patterns:
        raise SpecError(f"--table chooses among the matrices of a file of weights, and {path} is none: leave it out")
    reader = _of_checkpoint if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise SpecError(f"{path}: files that end with {path.suffix!r} are not known; tables come from {HELP}")
    try:
        specs = reader(path, dim)
    except EmbcompError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecError(f"{path} can't be read: {error}; tables come from {HELP}") from error
    if not specs:
        raise SpecError(f"{path} describes no table; tables come from {HELP}")
    twice = _twice([spec.name for spec in specs])
    if twice is not None:
        raise SpecError(f"{path}: table {twice!r} is there twice: leave one of them out, or rename it")
    return specs


def _of_checkpoint(folder: Path, dim: int | None) -> list[TableSpec]:
    if not (folder / CONFIG).is_file():
        raise SpecError(f"{folder} is no checkpoint: it has no {CONFIG}; tables come from {HELP}")
    file = folder / CONFIG
    groups = get(read_config(file), "groups", list, file)
    return [TableSpec(**spec) for group in groups for spec in get(group, "specs", list, file)]


def _of_json(path: Path, dim: int | None) -> list[TableSpec]:
    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_keys([key for key, _ in pairs], path)
        return dict(pairs)

    return _of_mapping(json.loads(_text(path), object_pairs_hook=whole), path, dim)


def _of_yaml(path: Path, dim: int | None) -> list[TableSpec]:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise MissingDependencyError(f"{path}: to read YAML, pip install pyyaml; or write it as JSON") from error

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_document(self, node: Any) -> Any:
            self.deep_construct = True  # refuses what holds itself
            return super().construct_document(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _check_keys([key.value for key, _ in node.value if isinstance(key.value, str)], path)
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(_text(path), Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is no YAML: {error}") from error
    return _of_mapping(content, path, dim)


def _text(path: Path) -> str:
    """UTF-8, before which some editors write a mark."""
    return path.read_text(encoding="utf-8-sig")


def _check_keys(keys: Sequence[str], path: Path) -> None:
    twice = _twice(keys)
    if twice is not None:
        raise SpecError(f"{path}: {twice!r} is there twice in one mapping: leave one of them out")


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name, number in Counter(names).items() if number > 1), None)


def _of_lines(path: Path, dim: int | None) -> list[TableSpec]:
    values = [line for line in _text(path).splitlines() if line.strip()]
    if not values:
        raise SpecError(f"{path} has no line, and so no value of a vocabulary")
    twice = _twice(values)
    if twice is not None:
        raise SpecError(f"{path}: value {twice!r} is there twice: a vocabulary has each value once")
    return [_spec(path.stem, values, dim, path)]


def _of_mapping(content: Any, path: Path, dim: int | None) -> list[TableSpec]:
    if isinstance(content, list) and content and not isinstance(content[0], dict | list):
        return [_spec(path.stem, content, dim, path)]
    if not isinstance(content, dict):
        raise SpecError(f"{path} must be a mapping of tables, not a {type(content).__name__}; tables come from {HELP}")
    of_all = [name for name in _DIM if isinstance(content.get(name), int | float | str)]
    if of_all or isinstance(content.get("tables"), dict):
        strange = [str(key) for key in content if key not in ("tables", *of_all)]
        if strange or not isinstance(content.get("tables"), dict):
            raise SpecError(
                f"{path}: beside 'tables', a mapping of them, there is the dimension of all and nothing else; found "
                f"{', '.join(map(str, content))}; tables come from {HELP}"
            )
        dim, content = _first(content, _DIM, dim), content["tables"]
    elif len(content) > 1 and _counts_up(content):
        raise SpecError(
            f"{path} is a mapping to {', '.join(map(str, list(content.values())[:3]))}, …: if those are indices of one "
            f"table's values, write {{{path.stem}: {{…}}}} around it; if they are sizes of tables, {{tables: {{…}}}}"
        )
    return [_spec(name, value, dim, path) for name, value in content.items()]


def _spec(name: Any, value: Any, dim: int | None, path: Path) -> TableSpec:
    if not isinstance(name, str):
        raise SpecError(
            f"{path}: {name!r} is no name of a table, which is a string: write it in quotes, as YAML has it"
        )
    if isinstance(value, Mapping) and not _is_vocabulary(value, name, path):
        padding = value.get("padding_idx")
        return TableSpec(name, _first(value, _SIZE), _dim(_first(value, _DIM, dim), name, path), padding)
    size = _rows_of(value) if isinstance(value, Mapping | list) else value
    return TableSpec(name, size, _dim(dim, name, path))


def _is_vocabulary(value: Mapping[str, Any], name: str, path: Path) -> bool:
    """Whether a mapping is of values, some of which may be called like options, and not of options."""
    strange = [str(key) for key in value if key not in _OPTIONS]
    if _first(value, _SIZE) is None or (strange and _counts_up(value)):
        return True
    if strange:
        raise SpecError(f"{path}: table {name!r} has the option {strange[0]!r}; {did_you_mean(strange[0], _OPTIONS)}")
    return False


def _counts_up(vocabulary: Mapping[str, Any]) -> bool:
    """Whether values have indices without a gap."""
    return _has_indices(vocabulary) and max(vocabulary.values()) - min(vocabulary.values()) + 1 == len(vocabulary)


def _has_indices(vocabulary: Mapping[str, Any]) -> bool:
    """Whether values have indices, before which there may be those of padding and of unseen values; no counts."""
    numbers = list(vocabulary.values())
    if not numbers or not all(type(number) is int for number in numbers):
        return False
    return 0 <= min(numbers) <= 2 and len(set(numbers)) == len(numbers)


def _rows_of(vocabulary: Mapping[str, Any] | list[Any]) -> int:
    """V: up to the last index, where values have indices, as an index is a row though others have gone."""
    if isinstance(vocabulary, Mapping) and _has_indices(vocabulary):
        return max(vocabulary.values()) + 1
    return len(vocabulary)


def _of_columns(path: Path, dim: int | None) -> list[TableSpec]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        known = rows.fieldnames or []
        if not any(name in known for name in _NAME) or not any(name in known for name in _SIZE):
            raise SpecError(f"{path} has columns {', '.join(known) or 'none'}; it needs table and size")
        specs = []
        for row in rows:
            name, own = _first(row, _NAME), _first(row, _DIM) or dim
            if name is None:
                raise SpecError(f"{path}: line {rows.line_num} does not name its table")
            specs.append(TableSpec(name, _int(_first(row, _SIZE), "size", name, path), _dim(own, name, path)))
        return specs


def _dim(dim: Any, name: str, path: Path) -> int:
    if dim is None:
        raise SpecError(f"{path} does not say the dimension of table {name!r}: give --dim, or write it there")
    return _int(dim, "dimension", name, path)


def _int(value: Any, what: str, name: str, path: Path) -> int:
    try:
        if isinstance(value, int | str) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise SpecError(f"{path}: the {what} of table {name!r} is {value!r}, and must be a whole number")


def _first(values: Mapping[str, Any], names: tuple[str, ...], default: Any = None) -> Any:
    return next((values[name] for name in names if values.get(name) not in (None, "")), default)


_READERS: dict[str, Callable[[Path, int | None], list[TableSpec]]] = {
    ".json": _of_json,
    ".yaml": _of_yaml,
    ".yml": _of_yaml,
    ".csv": _of_columns,
    ".tsv": _of_columns,
    ".txt": _of_lines,
}
