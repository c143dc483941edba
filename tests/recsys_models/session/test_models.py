"""What holds for every session model, and slow references of those that have mathematics of their own."""

import copy
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embcomp.errors import ConfigError, InputError
from embcomp.scoring import cross_entropy, sampled_cross_entropy, softmax
from recsys_models.data import NO_TARGET, SessionBatch
from recsys_models.session import ENCODERS, build_session_model, used_attributes
from recsys_models.session.encoders import Examples
from recsys_models.session.prefix_encoders import first_places, transitions
from tests.recsys_models.session.tiny import (
    NAMES,
    NUM_ITEMS,
    attribute,
    log_with_unseen_items,
    sequences,
    tiny_log,
    tiny_model,
)

LOG = tiny_log()
SESSIONS = [[3, 4, 3, 5], [7], [1, 2, 3, 4, 5, 6, 7], [9, 9, 9]]


def padded(sessions, width=None, filler=0):
    width = width or max(map(len, sessions))
    items = torch.full((len(sessions), width), filler)
    for row, session in enumerate(sessions):
        items[row, : len(session)] = torch.tensor(session)
    return items, torch.tensor([len(session) for session in sessions])


def test_all_models_are_here():
    assert sorted(NAMES) == sorted(ENCODERS)


@pytest.mark.parametrize("items", ["id", "metadata", "hybrid"])
@pytest.mark.parametrize("name", NAMES)
class TestEveryModel:
    def test_scores_have_a_column_per_item_and_each_session_stands_alone(self, name, items):
        model = tiny_model(LOG, name, items=items).eval()
        scores = model(*padded(SESSIONS))
        assert scores.shape == (4, NUM_ITEMS)
        assert scores.isfinite().all()
        for row, session in enumerate(SESSIONS):
            alone = model(*padded([session]))
            torch.testing.assert_close(alone[0], scores[row], rtol=1e-4, atol=1e-5)

    def test_what_lies_behind_the_end_does_not_matter(self, name, items):
        model = tiny_model(LOG, name, items=items).eval()
        wanted = model(*padded(SESSIONS))
        for filler in (11, -7, NUM_ITEMS):
            torch.testing.assert_close(model(*padded(SESSIONS, 8, filler)), wanted, rtol=1e-4, atol=1e-5)

    def test_of_long_sessions_the_last_items_count(self, name, items):
        model = tiny_model(LOG, name, items=items).eval()
        long = [[(5 * step) % NUM_ITEMS for step in range(20)], [4, 5]]
        wanted = model(*padded([long[0][-8:], long[1]]))
        torch.testing.assert_close(model(*padded(long)), wanted, rtol=1e-4, atol=1e-5)

    def test_empty_sessions_have_finite_scores(self, name, items):
        model = tiny_model(LOG, name, items=items).eval()
        scores = model(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 3]))
        assert scores.isfinite().all()
        other = model(torch.full((2, 3), 9), torch.tensor([0, 3]))
        torch.testing.assert_close(scores[0], other[0])
        alone = model(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]))
        torch.testing.assert_close(alone[0], scores[0], rtol=1e-4, atol=1e-5)

    def test_scores_are_inner_products_of_queries_and_items(self, name, items):
        model = tiny_model(LOG, name, items=items).eval()
        queries = model.queries(*padded(SESSIONS))
        vectors = model.items(torch.arange(NUM_ITEMS))
        torch.testing.assert_close(model(*padded(SESSIONS)), queries @ vectors.T, rtol=1e-4, atol=1e-5)

    def test_every_parameter_learns(self, name, items):
        model = tiny_model(LOG, name, items=items)
        examples = model.prepare(next(iter(LOG.train.batches(64, 8, mode=model.encoder.targets))))
        model.loss(examples, model.learn(examples)).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]

    def test_a_copy_gives_the_same(self, name, items):
        model = tiny_model(LOG, name, items=items).eval()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.tables.parameters():
                parameter.zero_()
        assert not torch.equal(other(*padded(SESSIONS)), model(*padded(SESSIONS)))


def counted(model, log=LOG, seed=0):
    """What a step counts, as table and id, and the examples."""
    found = []

    def note(ids, table, blank):
        table = torch.as_tensor(table).expand_as(ids).flatten()
        found.extend(zip([model.tables.names[index] for index in table], ids.flatten().tolist(), strict=True))

    model.tables.seen_ = note
    examples = model.prepare(next(iter(log.train.batches(16, 8, mode=model.encoder.targets, seed=seed))))
    model.loss(examples, model.learn(examples)).backward()
    return sorted(found), examples


@pytest.mark.parametrize("loss", ["softmax", "sampled", "binary"])
class TestWhatIsCounted:
    @pytest.mark.parametrize("head", ["tied", "free"])
    @pytest.mark.parametrize("name", NAMES)
    def test_is_what_sessions_have_and_a_free_head_should_find(self, name, head, loss):
        found, examples = counted(tiny_model(LOG, name, items="id", head=head, loss=loss, num_negatives=4))
        sessions = [row[:length] for row, length in zip(examples.items, examples.lengths, strict=True)]
        wanted = [("item", int(item)) for session in sessions for item in session]
        if head == "free":
            wanted += [("item_output", int(item)) for item in examples.targets.flatten() if item != NO_TARGET]
        assert found == sorted(wanted)

    @pytest.mark.parametrize("options", [{}, {"ssl_weight": 0.1}, {"items": "hybrid"}])
    def test_are_values_of_distinct_items_where_these_are_composed(self, options, loss):
        model = tiny_model(LOG, "m2trec", loss=loss, **options)
        found, examples = counted(model)
        wanted = []
        for item in {int(i) for row, n in zip(examples.items, examples.lengths, strict=True) for i in row[:n]}:
            for own in LOG.catalogue.attributes:
                wanted += [(own.name, int(value)) for value in own.values[own.offsets[item] : own.offsets[item + 1]]]
            wanted += [("item", item)] * ("item" in model.tables.names)
        assert found == sorted(wanted)


def test_scoring_a_catalogue_of_metadata_in_pieces_counts_nothing(monkeypatch):
    monkeypatch.setattr(softmax, "_PIECE", 10)
    monkeypatch.setattr("embcomp.tables.EmbeddingTables.gradient_rows", 0)
    model, found = tiny_model(LOG, "m2trec"), []
    model.tables.seen_ = lambda *arguments: found.append(arguments)
    queries = torch.randn(5, 16, requires_grad=True)
    cross_entropy(model.items.scorer(), queries, torch.arange(5), 7).backward()
    assert queries.grad.any()
    assert not found
    model.items(torch.arange(3))
    assert found


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_no_position_sees_what_comes_after_it(name):
    model = tiny_model(LOG, name).eval()
    batch = SessionBatch(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([5]), torch.tensor([[2, 3, 4, 5, 6]]))
    queries = model.learn(model.prepare(batch))
    for length in range(1, 6):
        alone = model.queries(batch.items[:, :length], torch.tensor([length]))
        torch.testing.assert_close(queries[length - 1], alone[0], rtol=1e-4, atol=1e-5)


def test_only_positions_with_a_target_are_learned():
    model = tiny_model(LOG, "sasrec").eval()
    batch = next(iter(LOG.train.batches(16, 8)))
    examples = model.prepare(batch)
    queries = model.learn(examples)
    assert len(queries) == int((batch.targets != NO_TARGET).sum()) == int(batch.lengths.sum())
    scores = queries @ model.items(torch.arange(NUM_ITEMS)).T
    wanted = F.cross_entropy(scores, batch.targets[batch.targets != NO_TARGET])
    torch.testing.assert_close(model.loss(examples, queries), wanted)


# ---- BERT4Rec ------------------------------------------------------------------------------------------------------


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


# ---- Transformers, from their equations ----------------------------------------------------------------------------


def slow_norm(vector, layer):
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias


def slow_attention(vectors, layer, heads, causal):
    """Each position asks those that it sees, head by head, in float64."""
    asking, known, values = (
        [weight @ vector + bias for vector in vectors]
        for weight, bias in zip(layer.project.weight.chunk(3), layer.project.bias.chunk(3), strict=True)
    )
    size, found = len(vectors[0]) // heads, []
    for place, query in enumerate(asking):
        parts, seen = [], range(place + 1) if causal else range(len(vectors))
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            weights = [math.exp(float(query[own] @ known[other][own]) / math.sqrt(size)) for other in seen]
            parts.append(sum(w / sum(weights) * values[o][own] for w, o in zip(weights, seen, strict=True)))
        found.append(layer.out.weight @ torch.cat(parts) + layer.out.bias)
    return found


def slow_transformer(vectors, layer, heads, causal, activation):
    hidden = [vector + position for vector, position in zip(vectors, layer.positions, strict=False)]
    for block in layer.blocks:
        normed = [slow_norm(vector, block.attention_norm) for vector in hidden]
        attended = slow_attention(normed, block.attention, heads, causal)
        hidden = [vector + more for vector, more in zip(hidden, attended, strict=True)]
        into, out = block.feedforward[0], block.feedforward[-1]
        for place, vector in enumerate(hidden):
            units = activation(into.weight @ slow_norm(vector, block.feedforward_norm) + into.bias)
            hidden[place] = vector + out.weight @ units + out.bias
    return torch.stack([slow_norm(vector, layer.norm) for vector in hidden])


def slow_relu(values):
    return values * (values > 0)


def slow_gelu(values):
    return values * (1 + torch.erf(values / math.sqrt(2))) / 2


def perturbed(name, **options):
    """A model none of whose weights are zeros or ones, and its encoder in float64."""
    model = tiny_model(LOG, name, items="id", init_std=1.0, **options).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model, copy.deepcopy(model.encoder).double()


def vectors_of(model, session):
    return list(model.items(torch.tensor(session)).detach().double())


def slow_sasrec(model, encoder, session, heads):
    vectors = [math.sqrt(16) * vector for vector in vectors_of(model, session)]
    return slow_transformer(vectors, encoder.transformer, heads, True, slow_relu)


def slow_bert4rec(encoder, vectors, heads):
    vectors = [slow_norm(vector, encoder.transformer.input_norm) for vector in vectors]
    hidden = slow_transformer(vectors, encoder.transformer, heads, False, slow_gelu)
    linear, norm = encoder.head[0], encoder.head[-1]
    return torch.stack([slow_norm(slow_gelu(linear.weight @ h + linear.bias), norm) for h in hidden])


def assert_equal(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_sasrec_is_that_of_its_equations(heads):
    model, encoder = perturbed("sasrec", heads=heads)
    wanted = [slow_sasrec(model, encoder, session, heads) for session in SESSIONS]
    items, lengths = padded(SESSIONS)
    assert_equal(model.queries(items, lengths), torch.stack([hidden[-1] for hidden in wanted]))
    targets = torch.where(torch.arange(items.shape[1]) < lengths[:, None], 1, NO_TARGET)
    assert_equal(model.learn(Examples(items, lengths, targets)), torch.cat(wanted))


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_bert4rec_is_that_of_its_equations(heads):
    model, encoder = perturbed("bert4rec", heads=heads)
    wanted = [slow_bert4rec(encoder, [*vectors_of(model, session), encoder.gap], heads)[-1] for session in SESSIONS]
    items, lengths = padded(SESSIONS)
    assert_equal(model.queries(items, lengths), torch.stack(wanted))
    hidden = torch.tensor([[0, 1, 0, 1, 0, 0, 0], [1] + [0] * 6, [1, 0, 0, 0, 1, 0, 0], [0, 0, 1] + [0] * 4]).bool()
    wanted = []
    for session, gaps in zip(SESSIONS, hidden, strict=True):
        own = gaps[: len(session)]
        vectors = [encoder.gap if gap else v for v, gap in zip(vectors_of(model, session), own, strict=True)]
        wanted.append(slow_bert4rec(encoder, vectors, heads)[own])
    assert_equal(
        model.learn(Examples(items, lengths, items.masked_fill(~hidden, NO_TARGET), hidden)), torch.cat(wanted)
    )


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
@pytest.mark.parametrize(("heads", "causal"), [(1, False), (4, False), (4, True)])
@torch.no_grad()
def test_m2trec_is_that_of_its_equations(heads, causal, pooling):
    model, encoder = perturbed("m2trec", heads=heads, causal=causal, pooling=pooling)
    wanted = []
    for session in SESSIONS:
        vectors = [slow_norm(vector, encoder.transformer.input_norm) for vector in vectors_of(model, session)]
        hidden = slow_transformer(vectors, encoder.transformer, heads, causal, slow_gelu)
        weights = {"mean": [1.0] * len(hidden), "last": [0.0] * (len(hidden) - 1) + [1.0]}.get(pooling)
        if weights is None:
            weights = [math.exp(float(encoder.weight.weight[0] @ h + encoder.weight.bias)) for h in hidden]
        pooled = sum(weight / sum(weights) * h for weight, h in zip(weights, hidden, strict=True))
        wanted.append(encoder.query.weight @ pooled + encoder.query.bias)
    assert_equal(model.queries(*padded(SESSIONS)), torch.stack(wanted))


# ---- NARM and SR-GNN, from their equations -------------------------------------------------------------------------


def test_narm_is_that_of_its_equations():
    model = tiny_model(LOG, "narm").eval()
    encoder = model.encoder
    for session in SESSIONS:
        vectors = model.items(torch.tensor(session))
        states, last = encoder.recurrent(vectors[None])
        states, last = states[0], last[0, 0]
        local = torch.zeros_like(last)
        for state in states:
            first = encoder.of_last.weight @ last + encoder.of_each.weight @ state
            local = local + (encoder.weight.weight[0] @ torch.sigmoid(first)) * state
        wanted = encoder.bilinear.weight @ torch.cat([last, local])
        torch.testing.assert_close(model.queries(*padded([session]))[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gru4rec", "narm"])
def test_recurrent_networks_lose_a_part_of_their_input_in_training_alone(name):
    model, seen = tiny_model(LOG, name, dropout=0.25), []
    model.encoder.recurrent.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    items = torch.arange(NUM_ITEMS).repeat(8, 1)[:, :8]
    vectors = model.items(items)
    for mode in (True, False):
        model.train(mode).queries(items, torch.full((8,), 8))
    learned, served = seen
    assert torch.equal(served, vectors)
    lost = learned == 0
    torch.testing.assert_close(learned, torch.where(lost, 0.0, vectors / 0.75))
    assert 0.2 < lost.float().mean() < 0.3


def graph_of(session):
    """Nodes in the order of their first clicks, and the shares of edges in and out, as in the paper's figure 2."""
    nodes = list(dict.fromkeys(session))
    edges = np.zeros((len(nodes), len(nodes)))
    for before, after in itertools.pairwise(session):
        edges[nodes.index(before), nodes.index(after)] = 1
    into, out = edges.sum(0), edges.sum(1)
    outgoing = np.divide(edges, out[:, None], out=np.zeros_like(edges), where=out[:, None] > 0)
    incoming = np.divide(edges.T, into[:, None], out=np.zeros_like(edges), where=into[:, None] > 0)
    return nodes, torch.tensor(incoming, dtype=torch.float32), torch.tensor(outgoing, dtype=torch.float32)


@pytest.mark.parametrize("steps", [1, 2])
def test_sr_gnn_is_that_of_its_equations(steps):
    model = tiny_model(LOG, "sr_gnn", steps=steps).eval()
    e = model.encoder
    for session in [*SESSIONS, [1, 2, 1, 2, 1, 3]]:
        nodes, incoming, outgoing = graph_of(session)
        states = model.items(torch.tensor(nodes))
        for _ in range(steps):
            message = torch.cat(
                [
                    incoming @ (states @ e.incoming.weight.T + e.incoming.bias) + e.incoming_bias,
                    outgoing @ (states @ e.outgoing.weight.T + e.outgoing.bias) + e.outgoing_bias,
                ],
                dim=1,
            )
            gates, own = message @ e.gates.weight_ih.T + e.gates.bias_ih, states @ e.gates.weight_hh.T + e.gates.bias_hh
            (r_in, z_in, n_in), (r_own, z_own, n_own) = gates.chunk(3, 1), own.chunk(3, 1)
            update = torch.sigmoid(z_in + z_own)
            states = (1 - update) * torch.tanh(n_in + torch.sigmoid(r_in + r_own) * n_own) + update * states
        visited = states[[nodes.index(item) for item in session]]
        last = visited[-1]
        weights = torch.sigmoid(e.of_last(last) + e.of_each(visited)) @ e.weight.weight[0]
        wanted = e.out(torch.cat([(weights[:, None] * visited).sum(0), last]))
        torch.testing.assert_close(model.queries(*padded([session]))[0], wanted, rtol=1e-4, atol=1e-5)


def test_edges_of_a_session_graph_lie_between_first_places():
    items, _ = padded([[5, 6, 5, 7], [8, 8, 0, 0]])
    mask = torch.arange(4) < torch.tensor([4, 2])[:, None]
    node = first_places(items, mask)
    assert node.tolist() == [[0, 1, 0, 3], [0, 0, 0, 0]]
    incoming, outgoing = transitions(node, mask)
    assert outgoing[0].tolist() == [[0, 0.5, 0, 0.5], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert incoming[0].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0] * 4, [1, 0, 0, 0]]
    assert outgoing[1].tolist() == incoming[1].tolist() == [[1, 0, 0, 0], [0] * 4, [0] * 4, [0] * 4]


# ---- M2TRec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
def test_m2trec_pools_as_it_is_told(pooling):
    model = tiny_model(LOG, "m2trec", pooling=pooling).eval()
    encoder, session = model.encoder, [1, 2, 3, 4]
    mask = torch.ones(1, 4, dtype=torch.bool)
    hidden = encoder.transformer(model.items(torch.tensor([session])), mask)[0]
    if pooling == "attention":
        hidden = (encoder.weight(hidden).softmax(0) * hidden).sum(0)
    else:
        hidden = hidden.mean(0) if pooling == "mean" else hidden[-1]
    torch.testing.assert_close(model.queries(*padded([session]))[0], encoder.query(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
def test_a_causal_m2trec_learns_in_one_pass_what_prefixes_would_teach(pooling):
    model = tiny_model(LOG, "m2trec", pooling=pooling, causal=True).eval()
    with torch.no_grad():
        for parameter in model.encoder.transformer.blocks.parameters():
            parameter.mul_(10)  # what positions see is to show in what they say
    examples = model.prepare(next(iter(LOG.train.batches(16, 8))))
    sessions = [row[:length].tolist() for row, length in zip(examples.items, examples.lengths, strict=True)]
    prefixes = [session[: end + 1] for session in sessions for end in range(len(session))]
    learned = model.encoder.to_queries(model.learn(examples))
    torch.testing.assert_close(learned, model.queries(*padded(prefixes)), rtol=1e-4, atol=1e-5)
    both_ways = tiny_model(LOG, "m2trec", pooling=pooling).eval()
    both_ways.load_state_dict(model.state_dict())
    assert not torch.allclose(both_ways.queries(*padded(prefixes)), model.queries(*padded(prefixes)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("sasrec", {"blocks": 1, "heads": 2}), ("sasrec", {}), ("gru4rec", {})])
def test_the_last_position_alone_gives_what_all_positions_do(name, options):
    model = tiny_model(LOG, name, **options).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(3)
    sessions = model.embed(model.prepare(SessionBatch(*padded(SESSIONS), None)))
    rows = torch.arange(len(SESSIONS))
    every = model.encoder.hidden(sessions)[rows, sessions.lengths - 1]
    torch.testing.assert_close(model.encoder(sessions), every, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("sasrec", {}), ("gru4rec", {}), ("m2trec", {"causal": True})])
def test_what_learns_from_every_position_can_learn_from_prefixes_too(name, options):
    model = tiny_model(LOG, name, **options).eval()
    batch = next(iter(LOG.train.batches(16, 8, mode="prefixes")))
    learned = model.encoder.to_queries(model.learn(model.prepare(batch)))
    torch.testing.assert_close(learned, model.queries(batch.items, batch.lengths))


@pytest.mark.parametrize(("name", "options"), [("sasrec", {}), ("gru4rec", {}), ("m2trec", {"causal": True})])
def test_a_prefix_has_the_same_query_whatever_is_learned_from(name, options):
    whole, cut = (tiny_model(LOG, name, targets=targets, **options).eval() for targets in ("positions", "prefixes"))
    assert (whole.encoder.targets, cut.encoder.targets) == ("positions", "prefixes")
    assert tiny_model(LOG, name, **options).encoder.targets == "positions"
    log = dataclasses.replace(LOG, train=sequences(*(session for session in LOG.train if 1 < len(session) <= 8)))
    positions = next(iter(log.train.batches(len(log.train), 8)))
    prefixes = next(iter(log.train.batches(10_000, 8, mode="prefixes")))
    queries, examples = whole.learn(whole.prepare(positions)), cut.prepare(prefixes)
    torch.testing.assert_close(cut.learn(examples), queries, rtol=1e-4, atol=1e-5)
    assert torch.equal(examples.targets, positions.targets[positions.targets != NO_TARGET])
    loss = whole.loss(whole.prepare(positions), queries)
    torch.testing.assert_close(cut.loss(examples, cut.learn(examples)), loss)


def test_categories_are_learned_along():
    plain = tiny_model(LOG, "m2trec").eval()
    model = tiny_model(LOG, "m2trec", categories={"kind": 0.5}).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    examples = model.prepare(next(iter(LOG.train.batches(32, 8, mode="prefixes"))))
    queries = model.learn(examples)
    kinds = F.cross_entropy(model.category_heads[0](queries), examples.targets % 6)
    torch.testing.assert_close(model.loss(examples, queries), plain.loss(examples, queries) + 0.5 * kinds)


@pytest.mark.parametrize("options", [{}, {"pooling": "attention"}, {"causal": True}])
def test_bug_categories_are_predicted_from_sessions_not_from_what_is_compared_with_items(options):
    """PAPERS C1: softmax(U_l h) per level, of the session's vector h, while items are scored by W_q h / tau."""
    kind, words = LOG.catalogue.attributes
    half = attribute("half", *([item // 15] for item in range(NUM_ITEMS)), is_bag=False)
    log = dataclasses.replace(LOG, catalogue=dataclasses.replace(LOG.catalogue, attributes=(kind, half, words)))
    weights, losses = {"kind": 0.5, "half": 2.0}, []
    for temperature in (1.0, 0.05):
        plain = tiny_model(log, "m2trec", temperature=temperature, **options).eval()
        model = tiny_model(log, "m2trec", temperature=temperature, categories=weights, **options).eval()
        plain.load_state_dict(model.state_dict(), strict=False)
        examples = model.prepare(next(iter(log.train.batches(32, 8, mode=model.encoder.targets))))
        seen = []
        model.encoder.query.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        loss = model.loss(examples, model.learn(examples))
        losses.append(float((loss - plain.loss(examples, plain.learn(examples))).detach()))
        targets, wanted = examples.targets[examples.targets != NO_TARGET], 0.0
        for head, weight, values in zip(model.category_heads, weights.values(), (kind, half), strict=True):
            scores = seen[0] @ head.weight.T + head.bias
            right = scores[torch.arange(len(targets)), torch.from_numpy(values.values).long()[targets]]
            wanted += weight * float((scores.exp().sum(1).log() - right).mean().detach())
        assert losses[-1] == pytest.approx(wanted, rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("known", [3, 0])
def test_categories_that_nobody_knows_are_not_learned(known):
    kinds = [[item % 6 if item < known else 6] for item in range(NUM_ITEMS)]
    own = (attribute("kind", *kinds, num_values=7, is_bag=False), LOG.catalogue.attributes[1])
    log = dataclasses.replace(LOG, catalogue=dataclasses.replace(LOG.catalogue, attributes=own))
    plain, model = tiny_model(log, "m2trec").eval(), tiny_model(log, "m2trec", categories={"kind": 0.5}).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    examples = model.prepare(next(iter(LOG.train.batches(64, 8, mode="prefixes"))))
    queries, targets = model.learn(examples), examples.targets
    loss, scores = model.loss(examples, queries), model.category_heads[0](queries)[targets < known]
    wanted = F.cross_entropy(scores, targets[targets < known]) if known else 0.0
    torch.testing.assert_close(loss, plain.loss(examples, queries) + 0.5 * wanted)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert bool(model.category_heads[0].weight.grad.any()) == bool(known)


@pytest.mark.parametrize("name", ["price.bucket", "type", "category_heads"])
def test_attributes_of_any_name_are_predicted(name):
    log = tiny_log()
    kind, words = log.catalogue.attributes
    object.__setattr__(log.catalogue, "attributes", (words, dataclasses.replace(kind, name=name)))
    model, plain = (tiny_model(log, "m2trec", categories=own).eval() for own in ({name: 2.0}, None))
    examples = model.prepare(next(iter(log.train.batches(32, 8, mode="prefixes"))))
    queries = model.learn(examples)
    loss = 2 * F.cross_entropy(model.category_heads[0](queries), examples.targets % 6)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model.loss(examples, queries), plain.loss(examples, queries) + loss)


@pytest.mark.parametrize(("strategy", "budget"), [("full", None), ("unified", "60%")])
def test_a_new_item_scores_like_its_twin_in_a_model_that_was_trained_without_it(strategy, budget):
    named = (dataclasses.replace(a, names=np.arange(a.num_values - 1)) for a in LOG.catalogue.attributes)
    log = dataclasses.replace(LOG, catalogue=dataclasses.replace(LOG.catalogue, attributes=tuple(named)))
    model = tiny_model(log, "m2trec", strategy, budget, categories={"kind": 1.0}).eval()
    model.tables.finalize_()
    kind, words = log.catalogue.attributes
    twin = int(np.flatnonzero(words.lengths == 2)[0])
    own = words.values[words.offsets[twin] : words.offsets[twin + 1]].tolist()
    values = {"kind": [kind.values[twin], 3], "words": [own, None]}
    catalogue = log.catalogue.with_items([100, 101], values)
    options = {"max_length": 8, "categories": {"kind": 1.0}}
    larger = build_session_model("m2trec", model.tables, catalogue, **options).eval()
    larger.load_state_dict(model.state_dict())
    scores = larger(*padded(SESSIONS))
    assert scores.shape == (len(SESSIONS), NUM_ITEMS + 2)
    torch.testing.assert_close(scores[:, :NUM_ITEMS], model(*padded(SESSIONS)))
    torch.testing.assert_close(scores[:, NUM_ITEMS], scores[:, twin])
    assert not torch.allclose(scores[:, NUM_ITEMS + 1], scores[:, twin])


def test_m2trec_has_no_row_per_item_unless_it_is_told_to():
    assert tiny_model(LOG, "m2trec").tables.names == ("kind", "words")
    assert tiny_model(LOG, "m2trec", items="hybrid").tables.names == ("kind", "words", "item")
    assert tiny_model(LOG, "m2trec", items="id").tables.names == ("item",)
    assert tiny_model(LOG, "m2trec", head="free").tables.names == ("kind", "words", "item_output")


def test_the_attributes_that_a_model_uses():
    catalogue = LOG.catalogue
    assert used_attributes("m2trec", catalogue) == catalogue.attributes
    assert used_attributes("m2trec", catalogue, items="hybrid", attributes="words") == catalogue.attributes[1:]
    assert used_attributes("sasrec", catalogue, attributes="words") == ()


def test_a_free_head_scores_by_its_own_table():
    model = tiny_model(LOG, "sasrec", head="free").eval()
    scores = model(*padded(SESSIONS))
    rows = model.tables.materialize("item_output")
    torch.testing.assert_close(scores, model.queries(*padded(SESSIONS)) @ rows.T, rtol=1e-4, atol=1e-5)


# ---- losses --------------------------------------------------------------------------------------------------------


def test_the_binary_loss_is_that_of_a_loop_over_targets(monkeypatch):
    model = tiny_model(LOG, "sasrec", loss="binary").eval()
    examples = model.prepare(next(iter(LOG.train.batches(32, 8))))
    queries = model.learn(examples)
    targets = examples.targets[examples.targets != NO_TARGET]
    drawn = torch.randint(NUM_ITEMS, targets.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("recsys_models.session.objectives.torch.randint", lambda *args, **kwargs: drawn)
    right, wrong, number = [], [], 0
    for row in range(len(examples.items)):
        targets = examples.targets[row, : examples.lengths[row]].tolist()
        session = {*examples.items[row, : examples.lengths[row]].tolist(), *targets}
        for target in targets:
            query, negative = queries[number], int(drawn[number])
            right.append(math.log1p(math.exp(-float(query.detach() @ model.items(torch.tensor(target)).detach()))))
            if negative not in session:
                wrong.append(math.log1p(math.exp(float(query.detach() @ model.items(torch.tensor(negative)).detach()))))
            number += 1
    assert 0 < len(wrong) < len(right)
    wanted = sum(right) / len(right) + sum(wrong) / len(wrong)
    assert float(model.loss(examples, queries).detach()) == pytest.approx(wanted, rel=1e-5)


def test_the_softmax_is_sampled_beyond_a_number_of_items():
    assert tiny_model(LOG).objective.loss == "softmax"
    assert tiny_model(LOG, most_items=NUM_ITEMS - 1).objective.loss == "sampled"


@pytest.mark.parametrize("number", [1, 4, 20])  # targets of a step: fewer than are drawn, and more
@pytest.mark.parametrize("sampling", ["uniform", "counts", "log_uniform"])
def test_the_sampled_softmax_estimates_the_sum_over_all_items(sampling, number, monkeypatch):
    """Within four standard errors, where items are drawn, and are targets, with very different chances."""
    counts = np.array([round(1000 / (item + 1) ** 1.5) for item in range(NUM_ITEMS)])
    log = dataclasses.replace(LOG, catalogue=dataclasses.replace(LOG.catalogue, counts=counts))
    model = tiny_model(log, loss="sampled", sampling=sampling, num_negatives=8, init_std=0.3)
    by_query = functools.partial(sampled_cross_entropy, reduction="none")
    monkeypatch.setattr("recsys_models.session.objectives.sampled_cross_entropy", by_query)
    query, vectors = torch.randn(16), model.items(torch.arange(NUM_ITEMS)).detach()
    scores, own, estimates = vectors @ query, 5, []
    for _ in range(2000):
        targets = torch.multinomial(torch.from_numpy(counts / counts.sum()), number, replacement=True)
        targets[0] = own
        examples = Examples(targets[:, None], torch.ones_like(targets), targets)
        with torch.no_grad():
            losses = model.objective(model.items, query.expand(number, -1), targets, examples)
        estimates.append((losses[0] + scores[own]).exp())
    found = torch.stack(estimates)
    assert abs(found.mean() - scores.exp().sum()) < 4 * found.std() / len(found) ** 0.5


def test_of_many_targets_some_are_negatives():
    model = tiny_model(LOG, loss="sampled", num_negatives=8)
    targets = torch.arange(NUM_ITEMS)
    seen = [model.objective._negatives(targets).ids[:8] for _ in range(40)]
    assert all(len(own.unique()) == 8 for own in seen)
    assert len(torch.cat(seen).unique()) == NUM_ITEMS
    assert model.objective._negatives(targets[:5]).ids[:5].equal(targets[:5])
    assert len(model.objective._negatives(targets).ids) == 16


def row_gradients(model, name, ids):
    """Gradients of rows of a table that has one for each id."""
    store, rows = model.tables.stored_rows(torch.tensor(ids), model.tables.index_of(name))
    return store.weight.grad[rows]


@pytest.mark.parametrize("loss", ["softmax", "sampled", "binary"])
class TestItemsThatTrainingNeverSaw:
    LOG = log_with_unseen_items()
    UNSEEN, SEEN = list(range(25, NUM_ITEMS)), list(range(25))

    @pytest.mark.parametrize("items", ["id", "metadata", "hybrid"])
    @pytest.mark.parametrize("head", ["tied", "free"])
    @pytest.mark.parametrize("name", ["sasrec", "bert4rec", "m2trec"])
    def test_learn_nothing(self, name, head, items, loss):
        model = tiny_model(self.LOG, name, items=items, head=head, loss=loss, num_negatives=200)
        examples = model.prepare(next(iter(self.LOG.train.batches(64, 8, mode=model.encoder.targets))))
        model.loss(examples, model.learn(examples)).backward()
        for table in set(model.tables.names) & {"item", "item_output"}:
            assert not row_gradients(model, table, self.UNSEEN).any()
            assert row_gradients(model, table, self.SEEN).any()
        if items != "id":
            assert not row_gradients(model, "kind", [6]).any()
            assert row_gradients(model, "kind", [0]).any()

    @pytest.mark.parametrize("name", ["sasrec", "m2trec"])
    def test_count_for_nothing_as_targets(self, name, loss):
        model = tiny_model(self.LOG, name, loss=loss).eval()
        sessions = padded([[1, 2], [3], [4, 5], [6]])

        def found(targets, rows):
            torch.manual_seed(0)
            batch = SessionBatch(sessions[0][rows], sessions[1][rows], torch.tensor(targets))
            examples = model.prepare(batch)
            return model.loss(examples, model.learn(examples))

        torch.testing.assert_close(found([26, 7, 29, 8], [0, 1, 2, 3]), found([7, 8], [1, 3]))
        none = found([26, 27], [0, 1])
        none.backward()
        assert none == 0
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_softmax_over_items_of_training_is_that_of_their_scores():
    log = log_with_unseen_items()
    model = tiny_model(log).eval()
    batch = next(iter(log.train.batches(16, 8, mode="prefixes")))
    examples = model.prepare(batch)
    wanted = F.cross_entropy(model(batch.items, batch.lengths)[:, :25], batch.targets)
    torch.testing.assert_close(model.loss(examples, model.learn(examples)), wanted)


def test_a_temperature_divides_scores():
    model, cold = tiny_model(LOG).eval(), tiny_model(LOG, temperature=0.5).eval()
    torch.testing.assert_close(cold(*padded(SESSIONS)), 2 * model(*padded(SESSIONS)))


# ---- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sasrek", {}, "did you mean 'sasrec'"),
        ("sasrec", {"hedas": 2}, "did you mean 'heads'"),
        ("sasrec", {"heads": 3}, "divide the dimension, 16"),
        ("sasrec", {"items": "ids"}, "did you mean|Allowed|must be one of"),
        ("sasrec", {"max_length": 8.0}, "must be int"),
        ("sasrec", {"max_length": 0}, "max_length=0"),
        ("sasrec", {"loss": "hinge"}, "loss"),
        ("sasrec", {"temperature": 0.0}, "above 0"),
        ("sasrec", {"temperature": math.nan}, "temperature=nan"),
        ("sasrec", {"temperature": math.inf}, "temperature=inf.*finite"),
        ("sasrec", {"dropout": 1.0}, "dropout=1.0"),
        ("bert4rec", {"mask_share": 1.0}, "mask_share"),
        ("gru4rec", {"hidden": 0}, "at least 1"),
        ("narm", {"layers": 0}, "layers=0: must be an int of at least 1"),
        ("narm", {"hidden": 0}, "hidden=0"),
        ("sasrec", {"blocks": 2.0}, "blocks=2.0: must be an int"),
        ("sasrec", {"feedforward": 0}, "feedforward=0"),
        ("bert4rec", {"feedforward": -2}, "feedforward=-2"),
        ("sr_gnn", {"steps": 0}, "steps=0"),
        ("sasrec", {"attributes": "kint"}, "did you mean 'kind'"),
        ("sasrec", {"bag_pooling": "sum"}, "bag_pooling='sum'"),
        ("sasrec", {"ssl_masking": "none"}, "ssl_masking='none'"),
        ("m2trec", {"attributes": "words,kint"}, "did you mean 'kind'"),
        ("m2trec", {"categories": {"words": 1.0}}, "several values per item"),
        ("m2trec", {"categories": {"kind": -1.0}}, r"categories=\{'kind': -1.0\}\): must be at least 0"),
        ("m2trec", {"categories": {"kind": math.nan}}, "'kind': nan"),
        ("m2trec", {"categories": {"kind": math.inf}}, "'kind': inf.*finite"),
        ("m2trec", {"bag_pooling": "sum"}, "bag_pooling='sum'"),
        ("m2trec", {"pooling": "max"}, "pooling='max'"),
        ("sasrec", {"targets": "position"}, "targets='position'"),
        ("narm", {"targets": "positions"}, "narm learns from prefixes alone: leave it out$"),
        ("bert4rec", {"targets": "prefixes"}, "bert4rec learns from positions alone"),
        ("m2trec", {"targets": "positions"}, "m2trec learns from prefixes alone: leave it out, or set causal=True"),
        ("sasrec", {"targets": "prefixes", "windows": "all"}, "windows='all'"),
        (
            "m2trec",
            {"categories": {"kind": True}},
            r"categories=\{'kind': True\}\): must be dict\[str, float\] \| None, not dict\[str, bool\]",
        ),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_model(LOG, name, **options)


@pytest.mark.parametrize("name", ["narm", "sr_gnn", "m2trec"])
def test_bug_windows_of_what_learns_from_prefixes_are_refused_before_training(name):
    """They were built, and `fit` failed with a message on a mode that nobody had set."""
    hint = ", set causal=True, or" if name == "m2trec" else ", or"
    with pytest.raises(ConfigError, match=f"windows='all', but {name} learns from prefixes.*leave windows out{hint}"):
        tiny_model(LOG, name, windows="all")


@pytest.mark.parametrize(("name", "options"), [("bert4rec", {}), ("gru4rec", {}), ("m2trec", {"causal": True})])
def test_windows_of_what_learns_from_positions_are_taken(name, options):
    assert tiny_model(LOG, name, windows="all", **options).windows == "all"


def test_metadata_needs_attributes():
    with pytest.raises(ConfigError, match="this catalogue has none: use items='id'"):
        tiny_model(tiny_log(with_attributes=False), "m2trec")


def test_wrong_shapes():
    model = tiny_model(LOG)
    with pytest.raises(InputError, match=r"\(B, L\)"):
        model(torch.tensor([1, 2]), torch.tensor([2]))
    with pytest.raises(InputError, match=r"\(B, L\)"):
        model(torch.tensor([[1, 2]]), torch.tensor([2, 2]))


@pytest.mark.parametrize("width", [3, 12])  # shorter and longer than the 8 items that the model reads
@pytest.mark.parametrize("name", NAMES)
def test_wrong_lengths_and_dtypes(name, width):
    model, items = tiny_model(LOG, name).eval(), torch.ones(2, width, dtype=torch.int64)
    for wrong in (width + 1, 15, -1, -2):
        with pytest.raises(InputError, match=rf"session 1 has length {wrong}, but must have one in \[0, {width}\]"):
            model(items, torch.tensor([1, wrong]))
    with pytest.raises(InputError, match=r"lengths torch.float32 must be int64"):
        model(items, torch.tensor([1.0, 2.0]))
    with pytest.raises(InputError, match=r"items torch.float32"):
        model(items.float(), torch.tensor([1, 2]))
    lengths = torch.tensor([0, width])
    torch.testing.assert_close(model(items.int(), lengths.int()), model(items, lengths))
    assert model(items[:0], lengths[:0]).shape == (0, NUM_ITEMS)


def test_a_catalogue_of_one_item():
    log = tiny_log(num_items=1)
    for name in NAMES:
        model = tiny_model(log, name)
        assert model(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 3])).shape == (2, 1)
        examples = model.prepare(next(iter(log.train.batches(8, 8, mode=model.encoder.targets))))
        assert float(model.loss(examples, model.learn(examples)).detach()) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match="needs a second item"):
        tiny_model(log, "sasrec", loss="binary")
