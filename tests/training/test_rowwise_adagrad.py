"""Row-wise Adagrad against a reference by loops, and against FBGEMM where it is installed."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from embcomp import FullConfig, TableSpec, build_tables
from embcomp.errors import ConfigError, InputError
from embcomp.training import RowwiseAdagrad, rowwise_adagrad

ROWS, DIM = 12, 4
BATCHES = ([3, 3, 0, 3, 11, 0], [5, 5, 5, 5], [], [11, 0, 1, 2, 3, 1], [7])


def reference_step(weight, total, ids, values, lr, eps=1e-10, weight_decay=0.0):
    """One step on nested lists, number by number, in double precision."""
    for row in sorted(set(ids)):
        gradient = [math.fsum(value[j] for i, value in zip(ids, values, strict=True) if i == row) for j in range(DIM)]
        gradient = [g + weight_decay * w for g, w in zip(gradient, weight[row], strict=True)]
        total[row] += sum(g * g for g in gradient) / DIM
        for j in range(DIM):
            weight[row][j] -= lr * gradient[j] / (math.sqrt(total[row]) + eps)


def sparse_gradient(ids, values, rows=ROWS):
    index = torch.tensor(ids, dtype=torch.int64).unsqueeze(0)
    return torch.sparse_coo_tensor(index, values, (rows, *values.shape[1:]), check_invariants=True)


def random_values(ids, seed, dim=DIM):
    return torch.randn(len(ids), dim, generator=torch.Generator().manual_seed(seed))


def random_weight(rows=ROWS, dim=DIM):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(99))


def train(batches, sparse=True, **options):
    """Take a step per batch on made gradients; return the parameter and its optimizer."""
    parameter = nn.Parameter(random_weight())
    optimizer = RowwiseAdagrad([parameter], **options)
    for seed, ids in enumerate(batches):
        gradient = sparse_gradient(ids, random_values(ids, seed))
        parameter.grad = gradient if sparse else gradient.to_dense()
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize("sparse", [True, False])
def test_equals_the_rule_number_by_number(sparse):
    parameter, optimizer = train(BATCHES, sparse, lr=0.1, initial_accumulator_value=0.5)
    weight, total = random_weight().double().tolist(), [0.5] * ROWS
    for seed, ids in enumerate(BATCHES):
        reference_step(weight, total, ids, random_values(ids, seed).tolist(), lr=0.1)
    torch.testing.assert_close(parameter.detach(), torch.tensor(weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.state[parameter]["sum"], torch.tensor(total), rtol=1e-5, atol=1e-6)


def test_weight_decay_of_sparse_gradients_is_on_the_rows_of_the_batch():
    parameter, _ = train(BATCHES, lr=0.1, weight_decay=0.3)
    weight, total = random_weight().double().tolist(), [0.0] * ROWS
    for seed, ids in enumerate(BATCHES):
        reference_step(weight, total, ids, random_values(ids, seed).tolist(), lr=0.1, weight_decay=0.3)
    torch.testing.assert_close(parameter.detach(), torch.tensor(weight), rtol=1e-5, atol=1e-6)
    assert torch.equal(parameter[8], random_weight()[8])


def test_weight_decay_of_dense_gradients_is_on_all_rows():
    parameter, _ = train([[3]], sparse=False, lr=0.1, weight_decay=0.3)
    every_row = [*range(ROWS)]
    gradient = torch.zeros(ROWS, DIM)
    gradient[3] = random_values([3], 0)[0]
    weight = random_weight().double().tolist()
    reference_step(weight, [0.0] * ROWS, every_row, gradient.tolist(), lr=0.1, weight_decay=0.3)
    torch.testing.assert_close(parameter.detach(), torch.tensor(weight), rtol=1e-5, atol=1e-6)


def test_state_is_one_float_per_row():
    parameter, optimizer = train(BATCHES)
    assert optimizer.state[parameter]["sum"].shape == (ROWS,)
    assert optimizer.state[parameter]["sum"].dtype == torch.float32


@pytest.mark.parametrize("piece_bytes", [1, 3 * 4 * DIM, 1 << 20])
def test_pieces_change_nothing(monkeypatch, piece_bytes):
    whole, _ = train(BATCHES, lr=0.1)
    monkeypatch.setattr(rowwise_adagrad, "_PIECE_BYTES", piece_bytes)
    pieces, _ = train(BATCHES, lr=0.1)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-7)


def test_many_duplicates_among_many_rows():
    ids = (1e4 ** torch.rand(30_000, generator=torch.Generator().manual_seed(1))).long().tolist()
    gradient = sparse_gradient(ids, random_values(ids, 0), rows=10_000)
    weights = []
    for g in (gradient, gradient.coalesce(), gradient.to_dense()):
        parameter = nn.Parameter(random_weight(10_000))
        parameter.grad = g
        RowwiseAdagrad([parameter], lr=0.1).step()
        weights.append(parameter.detach())
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[1], weights[2], rtol=1e-4, atol=1e-5)


def test_an_empty_batch_changes_nothing():
    parameter, _ = train([[]], lr=0.1, weight_decay=0.3)
    assert torch.equal(parameter, random_weight())


def test_an_empty_parameter():
    parameter = nn.Parameter(torch.empty(0, DIM))
    for parameter.grad in (torch.zeros(0, DIM), sparse_gradient([], torch.empty(0, DIM), rows=0)):
        RowwiseAdagrad([parameter]).step()


@pytest.mark.parametrize("sparse", [True, False])
def test_one_dimension_is_plain_adagrad(sparse):
    ours, plain = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizers = [RowwiseAdagrad([ours], lr=0.1), torch.optim.Adagrad([plain], lr=0.1)]
    for seed in range(3):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        ours.grad = gradient.to_sparse() if sparse else gradient.clone()
        plain.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, plain)


def test_a_row_may_have_several_dimensions():
    wide, flat = nn.Parameter(random_weight().view(ROWS, 2, 2).clone()), nn.Parameter(random_weight())
    ids = BATCHES[0]
    wide.grad = sparse_gradient(ids, random_values(ids, 0).view(-1, 2, 2))
    flat.grad = sparse_gradient(ids, random_values(ids, 0))
    RowwiseAdagrad([wide, flat], lr=0.1).step()
    assert torch.equal(wide.flatten(1), flat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_resumed_run_goes_on_as_it_was(dtype):
    parameter = nn.Parameter(random_weight().to(dtype))
    parameter.grad = sparse_gradient(BATCHES[0], random_values(BATCHES[0], 0).to(dtype))
    optimizer = RowwiseAdagrad([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [parameter], "lr": 0.1}])
    optimizer.step()
    twin = copy.deepcopy(parameter)
    resumed = RowwiseAdagrad([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [twin]}])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(resumed.state[twin]["sum"], optimizer.state[parameter]["sum"])
    for p, o in ((parameter, optimizer), (twin, resumed)):
        p.grad = sparse_gradient(BATCHES[3], random_values(BATCHES[3], 3).to(dtype))
        o.step()
    assert torch.equal(twin, parameter)
    assert not torch.equal(resumed.state[twin]["sum"], optimizer.state_dict()["state"][1]["sum"].to(dtype).float())


def test_closure():
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = RowwiseAdagrad([parameter], lr=0.1)

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6.0
    assert bool((parameter < 1).all())


def test_tables_train_alike_with_dense_and_sparse_gradients():
    specs = [TableSpec("a", 50, 8), TableSpec("b", 20, 8)]
    ids = torch.randint(0, 20, (64, 2), generator=torch.Generator().manual_seed(0))
    weights = []
    for sparse in (False, True):
        tables = build_tables(specs, FullConfig(sparse=sparse))
        optimizer = RowwiseAdagrad(tables.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (tables(ids) - 1).square().sum().backward()
            optimizer.step()
        weights.append(tables.rows.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.torchrec
@pytest.mark.parametrize("dim", [4, 16])
def test_same_numbers_as_fbgemm(dim):
    training = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training", exc_type=ImportError)
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common", exc_type=ImportError)
    table = (ROWS, dim, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)
    theirs = training.SplitTableBatchedEmbeddingBagsCodegen(
        [table], optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.1, eps=1e-8
    )
    ours = nn.Parameter(random_weight(ROWS, dim))
    theirs.split_embedding_weights()[0].copy_(ours.detach())
    optimizer = RowwiseAdagrad([ours], lr=0.1, eps=1e-8)
    for seed, batch in enumerate(ids for ids in BATCHES if ids):
        ids, gradient = torch.tensor(batch), random_values(batch, seed, dim)
        theirs(ids, torch.arange(len(batch) + 1)).backward(gradient)
        optimizer.zero_grad()
        F.embedding(ids, ours, sparse=True).backward(gradient)
        optimizer.step()
    torch.testing.assert_close(ours.detach(), theirs.split_embedding_weights()[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lr", "eps", "initial_accumulator_value", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_negative_values_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        RowwiseAdagrad([nn.Parameter(torch.ones(1))], **{name: value})


def test_gradients_sparse_in_columns_are_refused():
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.eye(3)[:, :2].to_sparse()
    with pytest.raises(InputError, match="sparse in 2 dimensions"):
        RowwiseAdagrad([parameter]).step()
