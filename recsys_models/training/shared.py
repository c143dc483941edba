"""Phases that are the same for every budget: done once, and taken over by runs that differ in the budget alone."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embcomp.training import Phases
from recsys_models.training import checkpoint
from recsys_models.training.result import PhaseResult

logger = logging.getLogger(__name__)


class SharedPhases:
    """Ends of phases in a folder, one file each.

    Args:
        folder: of runs of the same options but for the budget; made when there is something to write.
        identity: what such runs have in common.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)

    def take_(self, phases: Phases, device: torch.device) -> PhaseResult | None:
        """Bring the model to the end of the phase that it is in, if another run has been there.

        Raises:
            IncompatibleStateError: if the file is damaged.
        """
        path = self._path(phases)
        if not path.is_file():
            return None
        tensors, info = checkpoint.read_checkpoint(path)
        weights = checkpoint.without_prefix("model.", tensors)
        if info["identity"] != self.identity or _shapes(weights) != _shapes(phases.weights()):
            logger.info("%s is of other options: the phase is done anew", path)
            return None
        phases.load_weights_(weights)
        checkpoint.set_random_state(checkpoint.without_prefix("random.", tensors), device)
        return dataclasses.replace(PhaseResult.from_dict(info["result"]), shared=True)

    def write(self, phases: Phases, device: torch.device, result: PhaseResult) -> None:
        """Leave the end of the phase for other runs."""
        tensors = checkpoint.with_prefix("model.", phases.weights())
        tensors |= checkpoint.with_prefix("random.", checkpoint.random_state(device))
        info = {"identity": self.identity, "result": dataclasses.asdict(result)}
        checkpoint.write_checkpoint(self._path(phases), tensors, info)

    def _path(self, phases: Phases) -> Path:
        return self.folder / f"{phases.phase.name}.safetensors"


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}
