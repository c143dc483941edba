"""The mathematics of ``unified``: hashing against Python integers, collisions and gradients against the paper."""

import math

import pytest
import torch

import embcomp
from embcomp import InputError, TableSpec
from embcomp.hashing import hash_seed
from embcomp.io import write_pretrained
from tests.strategies.unified_tables import make_specs, make_tables

# Kept vocabularies of the paper's protocol.
CRITEO = [676, 533, 17447, 19995, 180, 13, 9693, 337, 3, 14637, 4378, 17795, 3067, 26, 6504, 18679, 10, 3102, 1557, 3]
CRITEO += [18230, 10, 14, 13079, 56, 10581]
AVAZU = [24, 8, 8, 3317, 3887, 24, 4438, 277, 29, 67767, 163804, 6217, 6, 5, 2309, 9, 10, 405, 5, 66, 167, 56]


def to_signed(value):
    return (value + 2**63) % 2**64 - 2**63


def python_mix(value, seed):
    mixed = to_signed(value ^ seed)
    mixed = (mixed + (mixed >> 32)) * 0x9E3779B97F4A7C15 % 2**64
    return (mixed ^ mixed >> 32) * 0xBF58476D1CE4E5B9 % 2**64


def python_hash(value, seed):
    mixed = python_mix(value, seed)
    return mixed ^ mixed >> 32


def python_range(value, seed, size):
    return (python_mix(value, seed) >> 32) * size >> 32


def python_vector(tables, name, value):
    """One vector, as the paper and the docstrings say it, without a tensor operation but reading rows."""
    config, dim = tables.config, tables.embedding_dim
    weight, chunk, parts = tables.rows.weight.detach().tolist(), config.chunk_dim, config.sub_tables
    bounds = [config.pool_rows * part // parts for part in range(parts + 1)]
    vector = []
    for lookup in range(config.lookups[name]):
        if config.exempt[name]:
            first = config.pool_rows + sum(
                spec.num_embeddings * (dim // chunk)
                for spec in tables.specs[: tables.names.index(name)]
                if config.exempt[spec.name]
            )
            size = tables.specs[tables.names.index(name)].num_embeddings
            known = value if 0 <= value < size else python_range(value, hash_seed(config.seed, name, "unseen"), size)
            row = first + known * (dim // chunk) + lookup
        else:
            part = (hash_seed(name, "part") + lookup) % parts if parts > 1 else 0
            seed = hash_seed(config.seed, name, lookup)
            row = bounds[part] + python_range(value, seed, bounds[part + 1] - bounds[part])
        for column in range(chunk):
            plus = python_hash(column, hash_seed(config.seed, name, "sign", lookup)) < 2**63
            flip = config.reader == "sign" and not config.exempt[name] and not plus
            vector.append(-weight[row][column] if flip else weight[row][column])
    return vector + [0.0] * (dim - len(vector))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk_dim": 2},
        {"chunk_dim": 2, "lookups": {"t0": 3, "t1": 1, "t2": 2}, "reader": "sign"},
        {"chunk_dim": 2, "lookups": {"t0": 2, "t1": 1, "t2": 2}},
        {"chunk_dim": 3, "sub_tables": 3, "exempt": {"t0": True, "t2": True}, "reader": "sign", "seed": 5},
        {"exempt": {"t0": True, "t1": True, "t2": True}},
    ],
    ids=str,
)
def test_lookups_equal_those_of_a_reference_in_python_integers(options):
    options = {"exempt": "none", **options}
    tables = make_tables(make_specs(3, 50, 400, dim=6), 41, unseen="hash", **options)
    values = [0, 1, 2, 3, 49, 399, 400, -1, -7, 2**31, -(2**31), 2**63 - 1, -(2**63)]
    expected = torch.tensor([[python_vector(tables, name, value) for name in tables.names] for value in values])
    ids = torch.tensor(values)
    torch.testing.assert_close(tables(ids.unsqueeze(1).expand(-1, 3)), expected, rtol=0, atol=0)
    for index in range(3):
        torch.testing.assert_close(tables(ids, index), expected[:, index], rtol=0, atol=0)
        torch.testing.assert_close(tables(ids, torch.tensor(index)), expected[:, index], rtol=0, atol=0)


@pytest.mark.parametrize("lookups", [1, 2, 4])
def test_a_lookup_is_one_gather_for_all_tables_and_chunks(lookups):
    tables = make_tables(make_specs(30, 40, 50), 64, lookups=lookups)
    calls = []
    tables.rows.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    tables(torch.zeros(7, 3, dtype=torch.int64))
    assert calls == [(7, 3, lookups)]


def test_lookups_that_a_table_does_not_do_touch_no_row():
    tables = make_tables(make_specs(50, 50), 1000, chunk_dim=2, lookups={"t0": 1, "t1": 2})
    ids = torch.arange(50)
    vectors = tables(ids, 0)
    assert (vectors[:, 2:] == 0).all()
    vectors.sum().backward()
    touched = tables.rows.weight.grad.abs().sum(1).nonzero().squeeze(1)
    assert touched.tolist() == tables.rows_of(ids, 0)[:, 0].unique().tolist()


def test_adding_or_reordering_tables_reshuffles_nobody():
    first = make_specs(100, 9, 300)
    more = [TableSpec("new", 77, 4), *reversed(first), TableSpec("also new", 5, 4)]
    before = make_tables(first, 90, {"t1": True}, lookups=2, sub_tables=3, reader="sign")
    after = make_tables(more, 90, {"t1": True, "also new": True}, lookups=2, sub_tables=3, reader="sign")
    readers_before, readers_after = before.readers(), after.readers()
    for name in before.names:
        here, there = before.index_of(name), after.index_of(name)
        ids = torch.arange(before.num_ids[here])
        assert torch.equal(before.rows_of(ids, here), after.rows_of(ids, there))
        assert torch.equal(readers_before[here], readers_after[there])


def test_sub_tables_are_equal_parts_and_a_table_goes_round_them():
    tables = make_tables(make_specs(*[500] * 12, dim=8), 100, lookups=4, sub_tables=4)
    rows = torch.stack([tables.rows_of(torch.arange(500), index) for index in range(12)])
    parts = rows // 25
    assert (parts == parts[:, :1]).all(), "all ids of a table use the same part for a lookup"
    assert (parts.sort(dim=2)[0] == torch.arange(4)).all(), "its lookups go through all parts"
    assert parts[:, 0, 0].unique().numel() > 1, "tables start at different parts"


# ---- collisions, as the paper counts them ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "share", "split", "multiplexed", "anybody"),
    [
        (CRITEO, 1.0, 0.632, 0.088, 0.632),
        (CRITEO, 0.5, 0.865, 0.167, 0.865),
        (CRITEO, 0.1, 1.000, 0.579, 1.000),
        (AVAZU, 1.0, 0.632, 0.373, 0.632),
        (AVAZU, 0.1, 1.000, 0.909, 1.000),
    ],
)
def test_sharing_a_pool_turns_collisions_within_tables_into_collisions_between_them(
    sizes, share, split, multiplexed, anybody
):
    specs = make_specs(*sizes, dim=1)
    rates = make_tables(specs, round(share * sum(sizes))).diagnostics().overall
    assert rates.same_table == pytest.approx(multiplexed, abs=0.006)
    assert rates.any_table == pytest.approx(anybody, abs=0.006)
    assert rates.twins == rates.same_table, "with one lookup, sharing a row is sharing all"
    alone = [make_tables([spec], math.ceil(share * spec.num_embeddings)).diagnostics().overall for spec in specs]
    collided = sum(rate.same_table * size for rate, size in zip(alone, sizes, strict=True))
    assert collided / sum(sizes) == pytest.approx(split, abs=0.006)
    assert all(rate.cross_table == 0 for rate in alone)


@pytest.mark.parametrize(("sizes", "expected"), [(CRITEO, 1.4e-5), (AVAZU, 4.9e-5)])
def test_two_chunks_of_half_the_width_tell_nearly_all_ids_of_a_table_apart(sizes, expected):
    tables = make_tables(make_specs(*sizes, dim=2), round(2 * 0.1 * sum(sizes)), lookups=2)
    twins = tables.diagnostics().overall.twins * sum(sizes)
    mean = expected * sum(sizes)  # of a Poisson variable: twins come in pairs, hence the factor 2 in the spread
    assert abs(twins - mean) <= 5 * math.sqrt(2 * mean)


def test_diagnostics_count_what_brute_force_counts():
    tables = make_tables(make_specs(40, 60, 5), 64, {"t2": True}, lookups=2)
    counts = {"t0": torch.arange(40), "t1": torch.ones(60)}
    users = {}
    for index, name in enumerate(tables.names):
        for identity, rows in enumerate(tables.rows_of(torch.arange(tables.num_ids[index]), index).tolist()):
            for row in rows:
                users.setdefault(row, []).append((name, identity))
    found = tables.diagnostics(counts)
    rows = tables.rows_of(torch.arange(40), 0).tolist()
    same = [sum(sum(name == "t0" for name, _ in users[row]) > 1 for row in own) / 2 for own in rows]
    cross = [sum(any(name != "t0" for name, _ in users[row]) for row in own) / 2 for own in rows]
    twins = [sum(own == other for other in rows) > 1 for own in rows]
    weights = range(40)
    by_id, weighted = found.by_table["t0"], found.by_table_weighted["t0"]
    assert by_id.same_table == pytest.approx(sum(same) / 40)
    assert by_id.cross_table == pytest.approx(sum(cross) / 40)
    assert by_id.twins == pytest.approx(sum(twins) / 40)
    assert weighted.same_table == pytest.approx(sum(w * s for w, s in zip(weights, same, strict=True)) / sum(weights))
    assert weighted.cross_table == pytest.approx(sum(w * c for w, c in zip(weights, cross, strict=True)) / sum(weights))
    assert found.by_table["t2"].any_table == 0
    usage = [len(users.get(row, [])) for row in range(64)]
    assert found.occupancy.tolist() == [usage.count(k) for k in range(max(usage) + 1)]
    assert found.mean_row_norm == pytest.approx(float(tables.rows.weight[:64].detach().norm(dim=1).mean()))


# ---- gradients and readers -------------------------------------------------------------------------------------------


def test_a_shared_rows_gradient_is_the_true_one_plus_those_of_colliding_ids_of_both_tables():
    """The paper's decomposition for a logistic model on two tables, term by term."""
    tables = make_tables(make_specs(12, 9, init_std=1.0), 5).double()
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    counts = torch.randint(0, 4, (2, 12, 9), generator=generator).double()  # of (label, id of t0, id of t1)
    rows = [tables.rows_of(torch.arange(size), index).squeeze(1) for index, size in enumerate((12, 9))]
    vectors = [tables.rows.weight[own] for own in rows]
    logits = (vectors[0] @ theta[0])[:, None] + (vectors[1] @ theta[1])[None, :]
    losses = counts.sum(0) * torch.nn.functional.softplus(logits) - counts[1] * logits
    losses.sum().backward()

    residual = (counts.sum(0) * torch.sigmoid(logits) - counts[1]).detach()
    brackets = [residual.sum(1), residual.sum(0)]
    for identity in range(12):
        row = rows[0][identity]
        own = brackets[0][identity] * theta[0]
        intra = brackets[0][(rows[0] == row) & (torch.arange(12) != identity)].sum() * theta[0]
        inter = brackets[1][rows[1] == row].sum() * theta[1]
        torch.testing.assert_close(tables.rows.weight.grad[row], own + intra + inter)
    assert rows[0].unique().numel() < 12, "this test needs collisions"


@pytest.mark.parametrize(("reader", "expected"), [("none", 1.0), ("sign", 0.0)])
def test_signs_make_collisions_between_tables_zero_mean_in_dot_products(reader, expected):
    num_tables, dim = 48, 16
    tables = make_tables(make_specs(*[3] * num_tables, dim=dim), 1, reader=reader)  # everybody shares the one row
    vectors = tables(torch.zeros(num_tables, dtype=torch.int64)).detach()
    cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2)
    between = cosines[~torch.eye(num_tables, dtype=torch.bool)]
    assert float(between.mean()) == pytest.approx(expected, abs=0.05)
    if reader == "sign":
        powers = tables.rows.weight.detach().squeeze().square()
        spread = powers.square().sum().sqrt() / powers.sum()
        assert float(between.std()) == pytest.approx(float(spread), rel=0.15)


def test_states_from_before_scales_were_in_them_still_load(tmp_path):
    def made(*std):
        specs = [TableSpec(f"t{i}", 50, 4, init_std=own) for i, own in enumerate(std)]
        return make_tables(specs, 20)

    tables, ids = made(0.1, 0.9), torch.stack([torch.arange(9), torch.arange(9)], 1)
    assert tables.memory().serve_bytes == 20 * 16 + 2 * 4
    state = {name: tensor for name, tensor in tables.state_dict().items() if name != "scales"}
    again = made(0.1, 0.9)
    again.load_state_dict(state)
    assert torch.equal(again(ids), tables(ids))
    write_pretrained(tables, tmp_path, state)
    assert torch.equal(embcomp.from_pretrained(tmp_path)(ids), tables(ids))
    other = made(0.9, 0.1)
    embcomp.load_pretrained_(
        torch.nn.ModuleDict({"tables": other}), _saved_as_model(tables, state, tmp_path), verbose=False
    )
    assert torch.equal(other(ids), tables(ids))


def _saved_as_model(tables, state, folder):
    model = torch.nn.ModuleDict({"tables": tables})
    return write_pretrained(model, folder / "model", {f"tables.{name}": tensor for name, tensor in state.items()})


def test_signs_take_no_bytes_and_diagonals_take_theirs():
    specs = make_specs(100, 200)
    size = {r: make_tables(specs, 50, reader=r).memory().serve_bytes for r in ("none", "sign", "diagonal")}
    assert size["sign"] == size["none"] == 50 * 4 * 4
    assert size["diagonal"] == size["none"] + 2 * 4 * 4


def test_a_diagonal_starts_as_no_reader_and_is_trained():
    specs = make_specs(100, 200)
    plain, tables = make_tables(specs, 50), make_tables(specs, 50, reader="diagonal")
    ids = torch.tensor([[1, 2], [3, 4]])
    torch.testing.assert_close(tables(ids), plain(ids), rtol=0, atol=0)
    tables(ids)[:, 1].sum().backward()
    gathered = plain(ids).detach()[:, 1].sum(0)
    torch.testing.assert_close(tables.diagonal.grad, torch.stack([torch.zeros(4), gathered]))


def test_first_layer_overlap_is_the_normalized_product_of_blocks():
    tables = make_tables(make_specs(9, 9, 9), 20, reader="sign")
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    blocks = [weight[:, 4 * t : 4 * t + 4] * tables.readers()[t] for t in range(3)]
    expected = [[(a @ b.T).norm() / (a.norm() * b.norm()) for b in blocks] for a in blocks]
    torch.testing.assert_close(tables.first_layer_overlap(weight), torch.tensor(expected))
    orthogonal = torch.zeros(7, 12)
    orthogonal[0, 0], orthogonal[1, 5], orthogonal[2, 8] = 1.0, 2.0, 3.0
    found = tables.first_layer_overlap(orthogonal)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]]))
    with pytest.raises(InputError, match="12 columns"):
        tables.first_layer_overlap(torch.zeros(7, 11))


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lookups": 2, "reader": "sign"}, {"chunk_dim": 2, "exempt": {"t1": True}}])
def test_fitting_is_the_weighted_least_squares_optimum(options):
    specs = [TableSpec("t0", 40, 4, None, 1.0), TableSpec("t1", 15, 4, None, 0.3), TableSpec("t2", 30, 4, None, 0.5)]
    tables = make_tables(specs, **{"pool_rows": 20, "exempt": "none", **options})
    generator = torch.Generator().manual_seed(3)
    weights = {spec.name: torch.randn(spec.num_embeddings, 4, generator=generator) for spec in specs}
    counts = {spec.name: torch.randint(1, 50, (spec.num_embeddings,), generator=generator) for spec in specs}
    tables.load_dense_(weights, counts)
    frequency = torch.cat([counts[spec.name] for spec in specs]).double()
    target = torch.cat([weights[spec.name] for spec in specs]).double()
    fitted = torch.cat([tables.materialize(spec.name) for spec in specs]).detach().double()
    design = torch.autograd.functional.jacobian(lambda rows: _composed(tables, rows), tables.rows.weight.detach())
    system = design.reshape(target.numel(), -1).double() * frequency.sqrt().repeat_interleave(4)[:, None]
    goal = (target * frequency.sqrt()[:, None]).flatten()
    best = torch.linalg.lstsq(system, goal, driver="gelsd").solution
    optimum = float((system @ best - goal).square().sum())
    error = float(((fitted - target).square().sum(1) * frequency).sum())
    assert error == pytest.approx(optimum, rel=1e-4)


def _composed(tables, rows):
    return torch.func.functional_call(_Materialized(tables), {"tables.rows.weight": rows}, ())


class _Materialized(torch.nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables

    def forward(self):
        return torch.cat([self.tables.materialize(name) for name in self.tables.names])


@pytest.mark.parametrize("reader", ["none", "sign", "diagonal"])
@pytest.mark.parametrize("lookups", [1, 4])
def test_vectors_start_with_the_plain_tables_standard_deviation(reader, lookups):
    stds = {"a": 0.01, "b": 0.2, "c": 0.05}
    specs = [TableSpec(name, 20000, 8, None, std) for name, std in stds.items()]
    tables = make_tables(specs, 4000, reader=reader, lookups=lookups)
    for name, std in stds.items():
        assert float(tables.materialize(name).detach().std()) == pytest.approx(std, rel=0.05)


def test_equal_or_nearly_equal_deviations_cost_no_multiplication():
    alike = [TableSpec("a", 99, 4, None, 0.0100), TableSpec("b", 99, 4, None, 0.0101)]
    assert make_tables(alike, 20)._factors is None


def test_a_table_that_starts_at_zero_can_still_be_trained():
    specs = [TableSpec("a", 99, 4, None, 0.0), TableSpec("b", 99, 4, None, 0.5)]
    tables = make_tables(specs, 20)
    tables(torch.arange(9), "a").sum().backward()
    assert tables.rows.weight.grad.abs().sum() > 0
