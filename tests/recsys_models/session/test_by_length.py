"""Sessions of like length are encoded together, with the same result as all at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_models.data import NO_TARGET
from recsys_models.session.by_length import encode_by_length
from recsys_models.session.encoders import Sessions
from tests.recsys_models.session.tiny import NAMES, tiny_log, tiny_model

LOG = tiny_log()
PREFIXES_ALONE = ("sr_gnn", "positions")


@pytest.mark.parametrize(
    ("name", "targets"),
    [(name, targets) for name in NAMES for targets in ("prefixes", "positions") if (name, targets) != PREFIXES_ALONE],
)
def test_losses_and_gradients_are_those_of_all_at_once(name, targets):
    options = {"causal": True} if name == "m2trec" and targets == "positions" else {}
    model = tiny_model(LOG, name, items="id", **options)
    model.eval()  # without dropout, whose draws are others
    batch = next(iter(LOG.train.batches(64, 8, mode=targets)))
    assert len(batch.lengths.unique()) > 3
    examples, found = model.prepare(batch), []
    for learn in (model.learn, lambda own: model.encoder.learn(model.embed(own), own.targets)):
        model.zero_grad()
        vectors = learn(examples)
        model.loss(examples, vectors).backward()
        found.append([vectors.detach(), *(parameter.grad for parameter in model.parameters())])
    for grouped, whole in zip(*found, strict=True):
        torch.testing.assert_close(grouped, whole, rtol=1e-4, atol=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.booleans(), st.integers(0, 100))
def test_most_of_what_is_encoded_is_of_sessions_and_order_stays(lengths, of_positions, seed):
    generator = torch.Generator().manual_seed(seed)
    places, lengths = torch.arange(max(lengths)), torch.tensor(lengths)
    items = torch.arange(len(lengths) * len(places)).view(len(lengths), -1)
    targets = items if of_positions else items[:, 0]
    if of_positions:
        is_asked = (places < lengths[:, None]) & (torch.rand(items.shape, generator=generator) < 0.5)
        targets = torch.where(is_asked, items, NO_TARGET)
    seen = []

    def encode(sessions, own):
        seen.append(sessions)
        rows = sessions.vectors if own.dim() == 2 else sessions.vectors[:, 0]
        return rows[own != NO_TARGET]

    found = encode_by_length(encode, Sessions(items[..., None].float(), items, lengths), targets)
    assert torch.equal(found[:, 0].long(), targets[targets != NO_TARGET])
    assert sum(group.items.numel() for group in seen) < 2 * lengths.sum()
    assert sum(len(group.lengths) for group in seen) == len(lengths)
    for group in seen:
        assert torch.equal(group.vectors[..., 0].long(), group.items)
        assert group.items.shape[1] == group.lengths.max()
