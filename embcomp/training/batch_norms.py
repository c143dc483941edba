"""Statistics of batch norms, in a model that has other forms while it is trained than the one that is evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Run = Callable[[], None]


def recalibrate_(model: nn.Module, run: Run) -> None:
    """Take the statistics of the model as it is now, not of all the forms it had while it was trained.

    Args:
        model: its modes are left as they are. Where ``run`` raises, so are the statistics.
        run: runs the model on some training batches.
    """
    norms = _norms(model)
    if not norms:
        return
    with recalibrated(model, run):
        found = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    for norm, statistics in zip(norms, found, strict=True):
        for name, buffer in norm.named_buffers():
            buffer.copy_(statistics[name])


@contextlib.contextmanager
def recalibrated(model: nn.Module, run: Run) -> Iterator[None]:
    """Inside, the model is in evaluation mode, with statistics as of `recalibrate_`; afterwards it is as it was."""
    norms = _norms(model)
    kept = [(norm, norm.momentum, {name: b.clone() for name, b in norm.named_buffers()}) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        if norms:
            with torch.no_grad():
                run()
        for norm in norms:
            norm.eval()
        yield
    finally:
        for norm, momentum, buffers in kept:
            norm.momentum = momentum
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        for module, mode in modes:  # parents come first, so that parts of another mode have the last word
            if module.training != mode:
                module.train(mode)


@contextlib.contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Inside, training passes normalize by their batch, and leave the running statistics alone."""
    norms = _norms(model)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms with statistics, but for those in evaluation mode in a model in training: they are frozen."""
    found = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    return [norm for norm in found if norm.training or not model.training]
