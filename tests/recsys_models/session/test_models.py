"""What holds for every session model, and input that none of them takes."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embcomp import FullConfig, build_tables, resize_
from embcomp.errors import ConfigError, InputError
from embcomp.scoring import cross_entropy, softmax
from recsys_models.data import NO_TARGET, SessionBatch
from recsys_models.session import ENCODERS, build_session_model, session_specs
from tests.recsys_models.session.tiny import (
    NAMES,
    NUM_ITEMS,
    SESSIONS,
    padded,
    tiny_log,
    tiny_model,
)

LOG = tiny_log()


def test_all_models_are_here():
    assert sorted(NAMES) == sorted(ENCODERS)


@pytest.mark.parametrize("name", NAMES)
def test_initial_vectors_are_the_encoders_own_or_as_asked(name):
    of = {"items": "hybrid", "head": "free"}
    own, asked = (session_specs(name, LOG.catalogue, 16, *std, **of) for std in ((), (0.3,)))
    assert {spec.init_std for spec in own} == {ENCODERS[name].init_std}
    assert {spec.init_std for spec in asked} == {0.3}


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
        ("sasrec", {"blocks": 2.0}, r"SASRec\(blocks=2.0\): must be int, not float"),
        ("sasrec", {"dropout": "0.1"}, r"SASRec\(dropout='0.1'\): must be float, not str"),
        ("bert4rec", {"mask_share": None}, r"BERT4Rec\(mask_share=None\)"),
        ("m2trec", {"causal": "no"}, r"M2TRec\(causal='no'\): must be bool, not str"),
        ("item_knn", {}, "recsys_models.session.ItemKNN"),
        ("popularity", {}, "no tables to compress.*benchmarks.floors"),
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
        ("sr_gnn", {"targets": "positions"}, "sr_gnn learns from prefixes alone: leave it out$"),
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
    hint = {"narm": ", set targets='positions', or", "m2trec": ", set causal=True, or"}.get(name, ", or")
    with pytest.raises(ConfigError, match=f"windows='all', but {name} learns from prefixes.*leave windows out{hint}"):
        tiny_model(LOG, name, windows="all")


@pytest.mark.parametrize(
    ("name", "options"), [("bert4rec", {}), ("narm", {"targets": "positions"}), ("m2trec", {"causal": True})]
)
def test_windows_of_what_learns_from_positions_are_taken(name, options):
    assert tiny_model(LOG, name, windows="all", **options).windows == "all"


@pytest.mark.parametrize("batch_of", ["positions", "prefixes"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [-1, NUM_ITEMS, 999])
def test_bug_targets_that_are_no_items_are_named(wrong, name, batch_of):
    """BERT4Rec learned item 0 in the place of -1, and other losses ignored what is outside, or failed anywhere."""
    if batch_of == "positions":
        items, lengths, targets = torch.tensor([[4, 7, 9]]), torch.tensor([3]), torch.tensor([[7, 9, wrong]])
    else:
        items, lengths, targets = torch.tensor([[4, 7, 9]] * 2), torch.tensor([3, 2]), torch.tensor([1, wrong])
    with pytest.raises(InputError, match=rf"target {wrong} at \[.*no item: there are items in \[0, {NUM_ITEMS}\)"):
        tiny_model(LOG, name).prepare(SessionBatch(items, lengths, targets))


def test_targets_are_integers():
    with pytest.raises(InputError, match=r"targets torch.float32 must be int64"):
        tiny_model(LOG).prepare(SessionBatch(torch.tensor([[4, 7]]), torch.tensor([2]), torch.tensor([3.0])))


@pytest.mark.parametrize(
    ("name", "options", "table"),
    [("sasrec", {}, "item"), ("m2trec", {}, "kind"), ("m2trec", {"items": "hybrid"}, "item")],
)
@pytest.mark.parametrize("extra", [-1, 1])
def test_bug_tables_of_another_catalogue_are_refused(name, options, table, extra):
    """Rankings were among the ids of a table that was too large, and one too small failed at the first lookup."""
    specs = session_specs(name, LOG.catalogue, 16, **options)
    other = [dataclasses.replace(s, num_embeddings=s.num_embeddings + extra * (s.name == table)) for s in specs]
    with pytest.raises(ConfigError, match=f"table '{table}' has .* ids, and the catalogue .*resize_"):
        build_session_model(name, build_tables(other), LOG.catalogue, **options)


def test_new_items_of_a_residual_need_a_policy_or_rows():
    named = [dataclasses.replace(a, names=np.arange(a.num_values - 1)) for a in LOG.catalogue.attributes]
    catalogue = dataclasses.replace(LOG.catalogue, attributes=tuple(named)).with_items([100, 101], {})
    specs = session_specs("m2trec", LOG.catalogue, 16, items="hybrid")
    zeros = build_tables(specs, FullConfig(unseen="zero"))
    model = build_session_model("m2trec", zeros, catalogue, items="hybrid").eval()
    plain = build_session_model("m2trec", zeros, catalogue).eval()
    plain.load_state_dict(model.state_dict())
    new = torch.tensor([NUM_ITEMS, NUM_ITEMS + 1])
    assert torch.equal(model.items(new), plain.items(new))
    grown = build_tables(specs)
    with pytest.raises(ConfigError, match=r"resize_\(tables, {'item': 32}\)"):
        build_session_model("m2trec", grown, catalogue, items="hybrid")
    resize_(grown, {"item": 32})
    assert build_session_model("m2trec", grown, catalogue, items="hybrid").items(new).shape == (2, 16)


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
