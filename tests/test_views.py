"""Views against the plain modules that they stand for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import embcomp
from embcomp.views import TableView

SIZES = {"user": 50, "item": 30, "one": 1}


@pytest.fixture
def tables():
    torch.manual_seed(0)
    specs = [
        embcomp.TableSpec(name, size, 6, padding_idx=2 if name == "item" else None, init_std=1.0)
        for name, size in SIZES.items()
    ]
    return embcomp.build_tables(specs, "full")


@pytest.fixture
def view(tables):
    return embcomp.EmbeddingView(tables, ["user"])


def plain_bag(tables, name, **options):
    return nn.EmbeddingBag.from_pretrained(tables.materialize(name).detach(), freeze=False, **options)


def model_of(tables, *views):
    model = nn.Module()
    model.views, model.tables = nn.ModuleList(views), tables
    return model


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding_view_looks_up_what_the_plain_table_does(tables, shape, dtype):
    view = embcomp.EmbeddingView(tables, ["item"], padding_idx=2)
    ids = torch.randint(0, 30, shape, dtype=dtype)
    assert torch.equal(view(ids), F.embedding(ids, tables.materialize("item")))
    assert (view.num_embeddings, view.embedding_dim, view.padding_idx) == (30, 6, 2)
    assert (view(torch.tensor([2])) == 0).all()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_bag_view_pools_as_the_plain_bag_does(tables, mode, last):
    view = embcomp.EmbeddingBagView(tables, ["item"], mode, last, padding_idx=2)
    plain = plain_bag(tables, "item", mode=mode, include_last_offset=last, padding_idx=2)
    ids = torch.tensor([0, 1, 2, 2, 5, 29, 2])
    offsets = torch.tensor([0, 2, 2, 4, 6, *([7] if last else [])])  # one bag empty, one of padding alone
    torch.testing.assert_close(view(ids, offsets), plain(ids, offsets))
    torch.testing.assert_close(view(input=ids, offsets=offsets, per_sample_weights=None), plain(ids, offsets))
    assert (view.mode, view.include_last_offset) == (mode, last)


def test_bag_view_takes_bags_of_one_length_and_weights(tables):
    view, plain = embcomp.EmbeddingBagView(tables, ["user"], "sum"), plain_bag(tables, "user", mode="sum")
    ids, weights = torch.randint(0, 50, (4, 3)), torch.rand(4, 3)
    torch.testing.assert_close(view(ids), plain(ids))
    torch.testing.assert_close(view(ids, None, weights), plain(ids, None, weights))
    flat, offsets = ids.flatten(), torch.tensor([0, 5, 5])
    torch.testing.assert_close(view(flat, offsets, weights.flatten()), plain(flat, offsets, weights.flatten()))


def test_fused_view_splits_offset_ids(tables):
    view = TableView(tables, ["item", "one", "user"], table="all", padding_idx=2)
    ids, table = view.locate(torch.tensor([[0, 29, 30, 31, 80]]))
    assert ids.tolist() == [[0, 29, 0, 0, 49]]
    assert [tables.names[t] for t in table.tolist()[0]] == ["item", "item", "one", "user", "user"]
    fused = embcomp.EmbeddingView(tables, ["item", "one", "user"], table="all")
    every = torch.arange(81)
    assert torch.equal(fused(every), fused.dense())
    assert torch.equal(fused.scores(torch.ones(2, 6)), torch.ones(2, 6) @ fused.dense().T)
    bags = embcomp.EmbeddingBagView(tables, ["item", "one", "user"], "sum", table="all")
    torch.testing.assert_close(
        bags(every, torch.tensor([0, 40])), torch.stack([fused(every[:40]).sum(0), fused(every[40:]).sum(0)])
    )


@pytest.mark.parametrize("wrong", [-1, 81])
def test_fused_view_keeps_the_unseen_policy(tables, wrong):
    fused = embcomp.EmbeddingView(tables, list(SIZES), table="all")
    with pytest.raises(embcomp.UnseenIdError, match=r"user|one"):
        fused(torch.tensor([0, wrong]))


def test_views_own_no_parameters_and_the_dtype_follows_to(tables):
    view = embcomp.EmbeddingView(tables, ["user"], dtype=torch.bfloat16)
    model = model_of(tables, view)
    assert set(model.state_dict()) == {f"tables.{name}" for name in tables.state_dict()}
    assert view(torch.tensor([1])).dtype == view.weight.dtype == view.scores(torch.ones(1, 6)).dtype == torch.bfloat16
    assert model.to(torch.float16).views[0](torch.tensor([1])).dtype == torch.float16


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_keep_views_and_tables_together(tables, view, duplicate):
    model = model_of(tables, view, embcomp.EmbeddingView(tables, ["item"]))
    other = duplicate(model)
    assert all(copied.tables is other.tables and copied.tables is not tables for copied in other.views)
    with torch.no_grad():
        other.tables.rows.weight.zero_()
    assert (other.views[0](torch.tensor([3])) == 0).all()
    assert (view(torch.tensor([3])) != 0).any()


class TestWeight:
    def test_answers_about_itself_without_composing(self, view, monkeypatch):
        monkeypatch.setattr(TableView, "dense", lambda self: pytest.fail("composed the table"))
        weight = view.weight
        assert (weight.shape, len(weight), weight.size(1), weight.numel()) == ((50, 6), 50, 6, 300)
        assert (weight.device, weight.dtype, weight.requires_grad) == (torch.device("cpu"), torch.float32, True)
        assert isinstance(weight, torch.Tensor)

    def test_is_differentiable_wherever_it_is_used(self, tables, view):
        query = torch.randn(3, 6)
        for use in (lambda w: F.linear(query, w), lambda w: query @ w.T, lambda w: w**2, lambda w: w[3:5], torch.norm):
            tables.zero_grad()
            found = use(view.weight)
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, use(tables.materialize("user")))
            found.sum().backward()
            assert tables.rows.weight.grad.abs().sum() > 0
        assert torch.zeros(50, 6).copy_(view.weight).sum() == tables.materialize("user").sum()

    def test_detached_and_no_grad_give_no_gradients(self, view):
        assert not view.weight.detach().sum().requires_grad
        assert not view.weight.data.clone().requires_grad
        with torch.no_grad():
            assert not view.weight.requires_grad

    @pytest.mark.parametrize(
        "write",
        [
            lambda view: view.weight.data.copy_(torch.zeros(50, 6)),
            lambda view: nn.init.xavier_uniform_(view.weight),
            lambda view: nn.init.zeros_(view.weight),
            lambda view: view.weight.detach().normal_(),
            lambda view: view.weight.data.__setitem__(0, 0.0),
            lambda view: view.weight.requires_grad_(False),
            lambda view: setattr(view.weight, "requires_grad", False),
            lambda view: setattr(view.weight, "data", torch.zeros(50, 6)),
            lambda view: setattr(view, "weight", nn.Parameter(torch.zeros(50, 6))),
            lambda view: torch.add(torch.ones(50, 6), 1, out=view.weight),
        ],
    )
    def test_writing_says_what_to_do_instead(self, view, write):
        with pytest.raises(embcomp.InputError, match=r"'user' can't be written.*load_dense_"):
            write(view)

    def test_optimizers_refuse_it(self, view):
        with pytest.raises(ValueError, match="non-leaf"):
            torch.optim.SGD([view.weight], lr=1.0)


def test_tied_linear_scores_like_linear_layer(tables):
    bias = nn.Parameter(torch.randn(50))
    layer = embcomp.TiedLinear(tables, ["user"], bias)
    hidden = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(hidden), F.linear(hidden, tables.materialize("user"), bias))
    assert (layer.in_features, layer.out_features, set(layer.state_dict())) == (6, 50, {"bias"})
    assert embcomp.TiedLinear(tables, ["user"]).bias is None


class Net(nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.user = embcomp.EmbeddingView(tables, ["user"])
        self.all = embcomp.EmbeddingView(tables, list(SIZES), table="all")
        self.bag = embcomp.EmbeddingBagView(tables, ["item"], "sum", padding_idx=2)
        self.tables = tables

    def forward(self, ids):
        hidden = self.user(ids).sum(1) + self.bag(ids) + self.all(ids).sum(1)
        return hidden @ self.user.weight.T


def test_compiles_into_one_graph_and_exports(tables):
    model, ids = Net(tables).eval(), torch.randint(0, 30, (5, 4))
    expected = model(ids)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(ids), expected)
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: rows},))
    more = torch.randint(0, 30, (9, 4))
    torch.testing.assert_close(program.module()(more), model(more))
