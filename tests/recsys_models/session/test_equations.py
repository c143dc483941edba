"""Session models against slow ones, written from their equations."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from recsys_models.data import NO_TARGET
from recsys_models.session.encoders import Examples
from recsys_models.session.prefix_encoders import first_places, transitions
from tests.recsys_models.session.tiny import (
    NUM_ITEMS,
    SESSIONS,
    padded,
    tiny_log,
    tiny_model,
)

LOG = tiny_log()


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
