"""The sweep by memory budget: ``embcomp-bench -m strategy=hash,unified budget=50%,10%,1% seed=1,2,3``.

Every combination is a cell, every cell one JSON file in ``results/<name>/``. A cell that is there is not run again, so
a sweep that was killed is started again with the same command, and several may share a folder. ``-m experiment=<name>``
runs a whole table. Hydra launchers run cells in parallel: ``hydra/launcher=joblib hydra.launcher.n_jobs=8 threads=1``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from benchmarks.callbacks import summary
from benchmarks.cells import Cell
from benchmarks.errors import OverrideError
from benchmarks.finished import recall
from benchmarks.overrides import check_overrides
from benchmarks.progress import note_of, write_note
from benchmarks.runner import run_or_reuse


@hydra.main(config_path="pkg://configs", config_name="config", version_base="1.3")
def run(config: DictConfig) -> None:
    """Run one cell, and leave a note on it in the job's folder."""
    job = HydraConfig.get()
    values = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    if job.mode == RunMode.MULTIRUN:
        values["training"]["progress"] = False
    cell = Cell(values, tuple(job.overrides.task))
    outcome = run_or_reuse(cell, overwrite=bool(config.overwrite) and not _is_new(cell.path, job))
    write_note(Path(job.runtime.output_dir), note_of(cell.name, cell.path, outcome))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a sweep or, without ``-m``, one cell; the process ends with status 1 if a cell failed, 2 on wrong arguments.

    Args:
        arguments: of the command line; None for the process's own.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        check_overrides(given)
    except OverrideError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    given.sort(
        key=lambda argument: argument not in ("-m", "--multirun")
    )  # Hydra takes it before or after all overrides
    if given[:1] in (["-m"], ["--multirun"]) and (notes := recall(given)):
        print(summary([(note.cell, note) for note in notes])[0])
        return
    before, sys.argv = sys.argv, ["embcomp-bench", *given]
    try:
        run()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        sys.argv = before


def _is_new(path: Path, job: Any) -> bool:
    """Whether a result was written by this very sweep: cells without a budget come once per budget."""
    mark = Path(job.sweep.dir) / "multirun.yaml"
    return job.mode == RunMode.MULTIRUN and path.exists() and path.stat().st_mtime >= mark.stat().st_mtime


if __name__ == "__main__":
    from benchmarks.sweep import main as imported_main  # so that launchers can send `run` to their workers by name

    imported_main()
