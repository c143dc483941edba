"""Buffers that are in no state dict, since they follow from configs: nothing that is loaded fills them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def keeping_constants(module: nn.Module) -> Iterator[None]:
    """Within, a module is moved; afterwards its constants say what they said.

    ``to_empty`` would leave garbage in them; and on ``meta``, where they say nothing, a copy of them is kept.
    """
    before = [
        (own, name, own._buffers[name]) for own in module.modules() for name in sorted(own._non_persistent_buffers_set)
    ]
    yield
    for own, name, value in before:
        now = own._buffers[name]
        if value is None or now is None or now is value:
            continue
        kept: dict[str, Tensor] = own.__dict__.setdefault("_constants_on_meta", {})
        if now.is_meta and not value.is_meta:
            kept[name] = value.cpu()
        elif not now.is_meta and (not value.is_meta or name in kept):
            own._buffers[name] = (kept[name] if value.is_meta else value).to(now)
