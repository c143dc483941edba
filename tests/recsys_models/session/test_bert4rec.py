"""What BERT4Rec hides, and does not see."""

import torch

from recsys_models.data import NO_TARGET, SessionBatch
from tests.recsys_models.session.tiny import (
    tiny_log,
    tiny_model,
)

LOG = tiny_log()


def test_bert4rec_hides_a_share_of_the_items_and_at_least_one():
    model = tiny_model(LOG, "bert4rec", mask_share=0.3, last_share=0.0)
    hidden = inside = 0
    for batch in LOG.train.batches(64, 8):
        examples = model.prepare(batch)
        torch.testing.assert_close(examples.lengths, batch.lengths + 1)
        place = torch.arange(examples.items.shape[1])
        is_inside = place < examples.lengths[:, None]
        assert not (examples.hidden & ~is_inside).any()
        assert examples.hidden.any(1).all()
        assert torch.equal(examples.targets != NO_TARGET, examples.hidden)
        assert torch.equal(examples.targets[examples.hidden], examples.items[examples.hidden])
        assert torch.equal(examples.items[:, :-1][is_inside[:, 1:]], batch.items[is_inside[:, 1:]])
        hidden, inside = hidden + int(examples.hidden.sum()), inside + int(is_inside.sum())
    assert 0.3 < hidden / inside < 0.45  # sessions are short, and each has one at least


def test_bert4rec_can_hide_the_last_item_alone():
    model = tiny_model(LOG, "bert4rec", last_share=1.0)
    examples = model.prepare(next(iter(LOG.train.batches(64, 8))))
    assert torch.equal(examples.hidden.int().argmax(1), examples.lengths - 1)
    assert (examples.hidden.sum(1) == 1).all()


def test_bert4rec_does_not_see_what_is_hidden_and_asks_for_the_next_item_as_for_a_hidden_last_one():
    model = tiny_model(LOG, "bert4rec", last_share=1.0).eval()
    batch = SessionBatch(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([[2, 3, 4]]))
    learned = model.learn(model.prepare(batch))
    torch.testing.assert_close(learned, model.queries(batch.items, batch.lengths))
    other = SessionBatch(batch.items, batch.lengths, torch.tensor([[2, 3, 29]]))
    torch.testing.assert_close(model.learn(model.prepare(other)), learned)
