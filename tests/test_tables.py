"""The interface itself: descriptions of tables, and what becomes of bad input. Lookups proper: the contract suite."""

import numpy as np
import pytest
import torch

from embcomp import (
    CompositionalConfig,
    ConfigError,
    FullConfig,
    IncompatibleStateError,
    InputError,
    Knowledge,
    ReducedDimConfig,
    SpecError,
    TableSpec,
    UnseenIdError,
    build_tables,
)

SPECS = (TableSpec("user", 5, 3), TableSpec("item", 4, 3, padding_idx=0, init_std=2.0), TableSpec("one", 1, 3))


def full(unseen: str = "error", **options):
    return build_tables(SPECS, FullConfig(unseen=unseen, **options))


class TestTableSpec:
    @pytest.mark.parametrize("what", ["num_embeddings", "embedding_dim"])
    @pytest.mark.parametrize("value", [0, -3, 2.0, "7", None, True])
    def test_sizes_are_positive_ints(self, what, value):
        sizes = {"num_embeddings": 5, "embedding_dim": 3, what: value}
        with pytest.raises(SpecError, match=rf"'user'.*{what}={value!r}"):
            TableSpec("user", **sizes)

    @pytest.mark.parametrize("padding", [-1, 5, 0.5, True, "0"])
    def test_padding_is_an_id_of_the_table(self, padding):
        with pytest.raises(SpecError, match=rf"'user'.*padding_idx={padding!r}"):
            TableSpec("user", 5, 3, padding_idx=padding)

    @pytest.mark.parametrize("std", [-0.1, float("nan"), float("inf"), "0.1", None])
    def test_spread_is_finite(self, std):
        with pytest.raises(SpecError, match=rf"'user'.*init_std={std!r}"):
            TableSpec("user", 5, 3, init_std=std)

    @pytest.mark.parametrize("name", ["", "*", None, 3])
    def test_name_is_a_string_of_its_own(self, name):
        with pytest.raises(SpecError, match="table name"):
            TableSpec(name, 5, 3)

    def test_numpy_ints_are_ints(self):
        """Sizes come from ``DataFrame.nunique()`` and the like."""
        spec = TableSpec("user", np.int64(5), np.int32(3), padding_idx=np.int64(2))
        assert spec == TableSpec("user", 5, 3, padding_idx=2)
        assert type(spec.num_embeddings) is type(spec.padding_idx) is int

    def test_group(self):
        with pytest.raises(SpecError, match="at least one"):
            build_tables([])
        with pytest.raises(SpecError, match="twice there: user"):
            build_tables([TableSpec("user", 5, 3), TableSpec("item", 5, 3), TableSpec("user", 6, 3)])
        with pytest.raises(SpecError, match=r"\[3, 8\].*one group per dimension"):
            build_tables([TableSpec("user", 5, 3), TableSpec("item", 5, 8)])


class TestKnowledge:
    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ([1, 2, 3], r"shape \(3,\).*\(5,\)"),
            (torch.ones(5, 1), r"shape \(5, 1\)"),
            ([1, 2, 3, 4, -1], "at least 0"),
            ([1, 2, 3, 4, float("nan")], "finite"),
            ([1, 2, 3, 4, float("inf")], "finite"),
            (torch.ones(5, dtype=torch.complex64), "are torch.complex64: they must be real numbers"),
        ],
    )
    def test_bad_counts(self, counts, message):
        with pytest.raises(SpecError, match=rf"counts of table 'user'.*{message}"):
            Knowledge.of(SPECS, counts={"user": counts})

    @pytest.mark.parametrize(
        ("weights", "message"),
        [(torch.ones(3, 5), r"\(3, 5\), not \(5, 3\)"), (torch.full((5, 3), float("nan")), "not all finite")],
    )
    def test_bad_weights(self, weights, message):
        with pytest.raises(SpecError, match=rf"weights of table 'user'.*{message}"):
            Knowledge.of(SPECS, weights={"user": weights})

    def test_unknown_table(self):
        with pytest.raises(SpecError, match=r"counts for table 'usr'.*did you mean 'user'"):
            Knowledge.of(SPECS, counts={"usr": [1]})

    def test_numpy_and_lists_become_tensors(self):
        known = Knowledge.of(SPECS, {"user": [1, 2, 3, 4, 5]}, {"one": np.ones((1, 3))})
        assert known.counts["user"].tolist() == [1, 2, 3, 4, 5]
        assert known.weights["one"].shape == (1, 3)


class TestBadLookups:
    @pytest.mark.parametrize("ids", [torch.ones(2, 3), [0, 1, 2], torch.zeros(2, 3, dtype=torch.bool), None, 1])
    def test_ids_are_integer_tensors(self, ids):
        with pytest.raises(InputError, match=r"'user'.*must be an int64 tensor"):
            full()(ids)

    def test_ids_on_another_device(self):
        with pytest.raises(InputError, match=r"ids are on meta.*on cpu"):
            full()(torch.zeros(2, 3, dtype=torch.long, device="meta"))

    @pytest.mark.parametrize("shape", [(), (3, 2), (3, 4), (3, 1)])
    def test_columns_of_ids_without_table(self, shape):
        with pytest.raises(InputError, match="one column for each of the 3 tables"):
            full()(torch.zeros(shape, dtype=torch.long))

    @pytest.mark.parametrize("table", ["usr", 3, -1, 1.0, [0, 1], torch.ones(2), torch.zeros(4, dtype=torch.long)])
    def test_table(self, table):
        with pytest.raises(InputError, match="table"):
            full()(torch.zeros(2, dtype=torch.long), table)

    @pytest.mark.parametrize(("table", "told"), [([0, -1], "table has -1"), ([1, 3], r"table has 3, outside \[0, 3\)")])
    def test_bug_a_negative_number_in_a_tensor_was_a_table_from_the_end(self, table, told):
        with pytest.raises(InputError, match=told):
            full()(torch.zeros(2, dtype=torch.long), torch.tensor(table))
        assert full()(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)).shape == (0, 3)

    def test_wrong_table_name_suggests_the_right_one(self):
        with pytest.raises(InputError, match=r"no table 'usr'.*did you mean 'user'"):
            full()(torch.zeros(2, dtype=torch.long), "usr")

    def test_table_does_not_make_more_ids(self):
        """Only ids say how many vectors there are, or half of the policies and strategies would disagree."""
        with pytest.raises(InputError, match=r"table of shape \(3, 1\).*ids of shape \(2,\)"):
            full()(torch.zeros(2, dtype=torch.long), torch.arange(3)[:, None])

    def test_table_on_another_device(self):
        with pytest.raises(InputError, match="table is on meta"):
            full()(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long, device="meta"))


class TestUnseen:
    @pytest.mark.parametrize(
        ("ids", "table", "words"),
        [
            (torch.tensor(5), "user", r"id 5 at position \[\] .*'user'.*\[0, 5\)"),
            (torch.tensor([0, -1]), 0, r"id -1 at position \[1\].*'user'"),
            (torch.tensor([[0, 0, 0], [0, 4, 0]]), None, r"id 4 at position \[1, 1\].*'item'.*\[0, 4\)"),
            (torch.tensor([[4, 4]]), torch.tensor([0, 2]), r"id 4 at position \[0, 1\].*'one'.*\[0, 1\)"),
            (torch.tensor([2**63 - 1]), 2, r"id 9223372036854775807.*'one'"),
        ],
    )
    def test_error_says_which_id_of_which_table(self, ids, table, words):
        with pytest.raises(UnseenIdError, match=words) as caught:
            full()(ids, table)
        assert isinstance(caught.value, IndexError)
        assert "unseen='zero'" in str(caught.value)

    @pytest.mark.parametrize("policy", ["oov_row", "hash"])
    def test_minus_one_is_unseen_not_padding_where_another_table_has_padding(self, policy):
        tables = full(policy)
        ids = torch.tensor([[-1, 1, 0]])
        assert tables(ids)[0, 0].any()
        assert torch.equal(tables.bag(ids[:, :1], table="user")[0], tables(ids)[0, 0])

    def test_oov_row_is_a_row_more_per_table(self):
        assert full("oov_row").memory().serve_bytes == (6 + 5 + 2) * 3 * 4

    def test_hash_can_hit_a_padding_row_without_being_padding(self):
        tables = full("hash")
        vectors = tables(torch.arange(4, 2000), "item")
        assert vectors.any(-1).all()
        assert not tables(torch.tensor([0]), "item").any()


class TestBag:
    ids = torch.tensor([1, 2, 3])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"ids": ids}, r"\(3,\) without offsets"),
            ({"ids": ids[None], "offsets": torch.tensor([0])}, "bags already"),
            ({"ids": ids[None, None]}, r"\(1, 1, 3\)"),
            ({"ids": ids[None], "per_sample_weights": torch.ones(3)}, "differ in shape"),
            ({"ids": ids[None], "per_sample_weights": torch.ones(1, 3), "mode": "mean"}, "per_sample_weights.*'sum'"),
            ({"ids": ids[None], "mode": "avg"}, "mode='avg'.*max, mean, sum"),
            ({"ids": ids, "offsets": torch.tensor([1, 2])}, "offsets must start at 0"),
            ({"ids": ids, "offsets": torch.tensor([0, 4])}, r"never.* pass 3.*\[0, 4, 3\]"),
            ({"ids": ids, "offsets": torch.tensor([0, 3, 2])}, r"never fall.*\[0, 3, 2, 3\]"),
            ({"ids": ids, "offsets": torch.tensor([0, 2]), "include_last_offset": True}, r"with it\).*\[0, 2\]"),
            ({"ids": ids, "offsets": torch.tensor([0.0])}, "offsets must be int64"),
            ({"ids": ids, "offsets": torch.tensor([], dtype=torch.long), "include_last_offset": True}, "offsets"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(InputError, match=message):
            full().bag(**arguments)

    @pytest.mark.parametrize("mode", ["sum", "mean", "max"])
    def test_agrees_with_torch(self, mode):
        tables = full()
        bag = torch.nn.EmbeddingBag.from_pretrained(tables.materialize("item").detach(), mode=mode, padding_idx=0)
        ids, offsets = torch.tensor([0, 1, 3, 0, 2, 2]), torch.tensor([0, 0, 4, 5, 6])
        assert torch.allclose(tables.bag(ids, offsets, "item", mode=mode), bag(ids, offsets))

    def test_gradients_of_weights(self):
        tables, weights = full(), torch.tensor([[0.5, 2.0]], requires_grad=True)
        tables.bag(torch.tensor([[1, 0]]), table="item", per_sample_weights=weights).sum().backward()
        wanted = [[tables(torch.tensor(1), "item").sum().item(), 0.0]]
        assert torch.allclose(weights.grad, torch.tensor(wanted))

    def test_no_bags(self):
        assert full().bag(torch.zeros(0, 4, dtype=torch.long), table=0).shape == (0, 3)
        assert full().bag(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)).shape == (0, 3)
        assert not full().bag(torch.zeros(2, 0, dtype=torch.long)).any()


class TestLoadDense:
    weights = {spec.name: torch.ones(spec.num_embeddings, 3) for spec in SPECS}  # noqa: RUF012

    def test_missing_table(self):
        with pytest.raises(SpecError, match="no weights for tables item, one"):
            full().load_dense_({"user": torch.ones(5, 3)})

    def test_finalized(self):
        with pytest.raises(IncompatibleStateError, match="are finalized"):
            full().finalize().load_dense_(self.weights)

    def test_oov_row_is_the_mean_weighted_by_counts(self):
        tables = full("oov_row")
        weights = self.weights | {"user": torch.eye(5, 3)}
        tables.load_dense_(weights, {"user": [3, 1, 0, 0, 0]})
        assert torch.allclose(tables(torch.tensor(99), "user"), torch.tensor([0.75, 0.25, 0.0]), atol=1e-2)

    def test_all_counts_zero(self):
        tables = build_tables([TableSpec("user", 5, 3)], ReducedDimConfig(dim=3))
        tables.load_dense_({"user": torch.eye(5, 3)}, {"user": torch.zeros(5)})
        assert torch.allclose(tables.materialize("user"), torch.eye(5, 3))


def test_each_table_has_its_own_initial_spread():
    specs = [TableSpec("narrow", 4000, 4, init_std=0.01), TableSpec("wide", 4000, 4, init_std=3.0)]
    tables = build_tables(specs)
    assert tables.materialize("narrow").std().item() == pytest.approx(0.01, rel=0.05)
    assert tables.materialize("wide").std().item() == pytest.approx(3.0, rel=0.05)


def test_a_strategy_without_default_size_says_how_to_choose_one():
    with pytest.raises(ConfigError, match=r"leaves its size \(dim\) open.*budget="):
        build_tables(SPECS, "reduced_dim")


def test_materialize_is_differentiable_and_goes_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr("embcomp.tables.CHUNK", 2)
    tables = full()
    wanted = tables(torch.arange(5), "user")
    assert torch.equal(tables.materialize("user"), wanted)
    assert torch.allclose(tables.scores("user", torch.ones(2, 3)), wanted.sum(1).expand(2, 5))
    tables.materialize("user").sum().backward()
    assert tables.rows.weight.grad[:5].eq(1).all()
    assert tables.rows.weight.grad[5:].eq(0).all()
    assert tables.materialize("user", torch.zeros(0, dtype=torch.long)).shape == (0, 3)


def test_unknown_constants_never_reach_a_file():
    assert list(full().state_dict()) == ["rows.weight"]


def test_bug_rows_that_cannot_be_served_leave_the_training_form_whole():
    """One store of several was in its serving form by then, and could neither be trained nor finalized again."""
    tables = build_tables([TableSpec("item", 500, 8)], CompositionalConfig(rows="int8"), "10%")
    ids, column = torch.arange(500), torch.zeros(500, dtype=torch.int64)
    second, before = tables.rows_1.weight.data, tables(ids, column).detach()
    kept, trained = second[0].clone(), [name for name, _ in tables.named_parameters()]
    second[0] = float("nan")
    with pytest.raises(IncompatibleStateError, match="finite"):
        tables.finalize_()
    assert not tables.is_final
    second[0] = kept
    assert torch.equal(tables(ids, column), before)
    assert [name for name, own in tables.named_parameters() if own.requires_grad] == trained
    assert tables.finalize_().is_final
