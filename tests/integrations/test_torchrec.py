"""TorchRec's collections after compress_: same keys, order and values, in one lookup per group."""

import copy

import pytest
import torch
from torch import nn

import embcomp
from embcomp import EmbeddingTables, FullConfig, HashConfig
from embcomp.errors import InputError, NoMatchingTableError, SpecError
from embcomp.views import EmbeddingBagView

torchrec = pytest.importorskip("torchrec", reason="needs torchrec")

from torchrec import (  # noqa: E402
    EmbeddingBagCollection,
    KeyedJaggedTensor,
)

from embcomp.integrations.export import export_onnx, export_pt2  # noqa: E402
from embcomp.integrations.torchrec import (  # noqa: E402
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from tests.integrations.jagged_models import (  # noqa: E402
    MODELS,
    SIZES,
    Net,
    assert_same,
    bags,
    batch,
    compressed,
    sequences,
)

pytestmark = pytest.mark.torchrec


@pytest.mark.parametrize("name", MODELS)
class TestEveryCollection:
    @pytest.mark.parametrize("keys", ["abc", "cab", "xcaby"])
    def test_keys_order_and_values_are_the_same(self, name, keys):
        model = MODELS[name]()
        features = batch(keys, weighted="weighted" in name)
        wanted, new = model(features), compressed(model)
        assert isinstance(new, CompressedEmbeddingBagCollection | CompressedEmbeddingCollection)
        assert_same(new(features), wanted)
        assert new.device == torch.device("cpu")

    @pytest.mark.parametrize("options", [{"longest": 0}, {"size": 1}, {"dtype": torch.int32}, {"longest": 40}])
    def test_empty_and_long_bags_and_int32(self, name, options):
        model = MODELS[name]()
        features = batch(weighted="weighted" in name, **options)
        assert_same(compressed(model)(features), model(features))

    def test_training_goes_the_same_way(self, name):
        losses = []
        for model in (MODELS[name](), compressed(MODELS[name]())):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            own = []
            for step in range(5):
                out = model(batch(weighted="weighted" in name, seed=step))
                vectors = [value.values() for value in out.values()] if isinstance(out, dict) else [out.values()]
                loss = sum((vector - 1).square().sum() for vector in vectors) / 50
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                own.append(loss.item())
            losses.append(own)
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert losses[0][-1] < losses[0][0]

    def test_there_is_one_lookup_per_group(self, name, monkeypatch):
        new = compressed(MODELS[name]())
        calls = []
        method = "bag" if "bags" in name else "forward"
        looked_up = getattr(EmbeddingTables, method)
        monkeypatch.setattr(
            EmbeddingTables, method, lambda self, *given, **more: calls.append(self) or looked_up(self, *given, **more)
        )
        new(batch(weighted="weighted" in name))
        assert len(calls) == (2 if "bags" in name else 1)

    def test_it_can_lie_anywhere(self, name):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.ModuleDict({"inner": MODELS[name]()})
                self.again = self.first["inner"]

            def forward(self, features):
                return self.first["inner"](features), self.again(features)

        model, features = Model(), batch(weighted="weighted" in name)
        wanted = model(features)
        handle = embcomp.compress_(model, "full", init="trained", verbose=False)
        assert handle.model is model
        assert model.again is model.first["inner"]
        for one, other in zip(model(features), wanted, strict=True):
            assert_same(one, other)
        sequential = nn.Sequential(MODELS[name]())
        embcomp.compress_(sequential, "full", init="trained", verbose=False)
        assert_same(sequential(features), wanted[0])

    def test_it_is_saved_and_loaded_into_the_plain_model(self, name, tmp_path):
        model = nn.ModuleDict({"inner": MODELS[name]()})
        new = compressed(model, HashConfig(unseen="hash"), budget="50%")
        embcomp.finalize_(new)
        embcomp.save_pretrained(new, tmp_path)
        loaded = embcomp.load_pretrained_(nn.ModuleDict({"inner": MODELS[name]()}), tmp_path)
        again = loaded if isinstance(loaded, nn.Module) else loaded.model
        features = batch(weighted="weighted" in name)
        assert type(again["inner"]) is type(new["inner"])
        assert_same(again["inner"](features), new["inner"](features), 0, 0)

    def test_copies_and_devices(self, name):
        new, features = compressed(MODELS[name]()), batch(weighted="weighted" in name)
        wanted = new(features)
        other = copy.deepcopy(new)
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
        assert_same(other(features), wanted, 0, 0)
        other.to("meta")
        assert other.device == torch.device("meta")


def test_batches_without_duplicates():
    model = bags()
    values, lengths = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 1, 2, 0, 2])
    inverse = (["a", "b", "c"], torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]))
    features = KeyedJaggedTensor(
        ["a", "b", "c"], values, lengths=lengths, stride_per_key_per_rank=[[2], [2], [1]], inverse_indices=inverse
    )
    assert_same(compressed(model)(features), model(features))


def test_what_cannot_be_fused_is_looked_up_one_by_one(capsys):
    features = batch()
    model = bags()
    some = embcomp.compress_(copy.deepcopy(model), {"*t1": FullConfig(), "*": None}, init="trained")
    assert "one by one, since not all of its tables are compressed" in capsys.readouterr().out
    assert type(some.model) is EmbeddingBagCollection
    assert_same(some.model(features), model(features))
    hooked = copy.deepcopy(model)
    calls = []
    hooked.register_forward_hook(lambda *given: calls.append(1))
    handle = embcomp.compress_(hooked, "full", init="trained", verbose=False)
    assert_same(handle.model(features), model(features))
    assert calls
    assert "hooks" in handle.report()


def test_a_table_alone_can_take_the_place_of_one_of_theirs():
    model, features = bags(), batch()
    wanted = model(features)
    tables = embcomp.build_tables([embcomp.TableSpec("t1", 50, 4)])
    tables.load_dense_({"t1": model.embedding_bags["t1"].weight.detach()})
    model.embedding_bags["t1"] = EmbeddingBagView(tables, ["t1"], "sum", include_last_offset=True, owns=True)
    assert_same(model(features), wanted)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = tables.rows.weight.detach().clone()
    model(features).values().sum().backward()
    optimizer.step()
    assert (tables.rows.weight != before).any()
    assert "embedding_bags.t1.group.rows.weight" in model.state_dict()
    copied = copy.deepcopy(model).eval()
    assert copied.embedding_bags["t1"].tables is copied.embedding_bags["t1"].group is not tables
    assert not copied.embedding_bags["t1"].tables.training
    with torch.no_grad():
        copied.embedding_bags["t1"].tables.rows.weight.zero_()
    assert_same(model(features), model(features))
    assert (copied(features)["a@t1"] == 0).all()


@pytest.mark.parametrize("keys", ["abc", "cab", "xcaby", "acb"])
@pytest.mark.parametrize("dims", [(4, 4, 4), (4, 6, 8)])
def test_bug_gradients_of_weights_are_those_of_the_plain_collection(keys, dims):
    """FBGEMM's gradient of permuted weights wrote anywhere in memory where features were left out or came twice."""
    model = bags(True, dims, poolings=("SUM",) * 3)
    found = []
    for own in (model, compressed(model)):
        features = batch(keys, weighted=True)
        weights = features.weights().requires_grad_()
        values = own(features).values()
        (values * torch.arange(values.shape[1])).square().sum().backward()
        found.append(weights.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0])


def test_weights_by_position_are_learned_as_in_the_plain_model():
    from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
    from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

    weights = PositionWeightedModuleCollection({"a": 5, "b": 5, "c": 5})
    model = FeatureProcessedEmbeddingBagCollection(bags(True, (4, 8, 4), poolings=("SUM",) * 3), weights)
    found = []
    for own in (model, compressed(model)):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        for seed in range(5):
            own(batch(seed=seed)).values().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([own(batch(seed=9)).values().detach(), *own._feature_processors.state_dict().values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_configs_know_how_many_ids_there_are_by_now():
    for make in (bags, sequences):
        handle = embcomp.compress_(make(), "hash", budget="50%", verbose=False)
        handle.resize_({handle.tables[0].names[0]: 70})
        configs = handle.model.embedding_bag_configs() if make is bags else handle.model.embedding_configs()
        assert [config.num_embeddings for config in configs] == [70, 40, 30]
        assert [config.name for config in configs] == list(SIZES)


def test_tracing_says_what_to_do_instead():
    from torchrec.fx.tracer import Tracer, symbolic_trace

    model = nn.Sequential(compressed(bags()))
    with pytest.raises(InputError, match="leaf_modules"):
        symbolic_trace(model)
    graph = Tracer(leaf_modules=["CompressedEmbeddingBagCollection"]).trace(model)
    assert_same(torch.fx.GraphModule(model, graph)(batch()), model(batch()))


@pytest.mark.parametrize(
    "register",
    [
        lambda own: own.register_full_backward_pre_hook(lambda *given: None),
        lambda own: own.register_state_dict_post_hook(lambda *given: None),
        lambda own: own.register_state_dict_pre_hook(lambda *given: None),
        lambda own: own.register_load_state_dict_pre_hook(lambda *given: None),
        lambda own: own.register_load_state_dict_post_hook(lambda *given: None),
    ],
)
def test_bug_no_hook_is_lost_without_a_word(register):
    model = bags()
    register(model)
    handle = embcomp.compress_(model, "full", verbose=False)
    assert "hooks" in handle.report()
    assert type(handle.model) is EmbeddingBagCollection
    plain = nn.Sequential(nn.Embedding(10, 4))
    register(plain[0])
    with pytest.raises(SpecError, match="hooks"):
        embcomp.compress_(plain, "full", verbose=False)


@pytest.mark.parametrize("make", [bags, sequences])
def test_bug_models_that_were_built_on_meta_are_filled(make):
    """Constants were left as garbage by to_empty, and load_state_dict said that all was well."""
    source = embcomp.compress_(make(), HashConfig(unseen="hash"), "50%", verbose=False).model
    with torch.device("meta"):
        model = make()
    filled = embcomp.compress_(model, HashConfig(unseen="hash"), "50%", verbose=False).model
    assert all(tensor.is_meta for tensor in filled.parameters())
    filled = filled.to_empty(device="cpu")
    filled.load_state_dict(source.state_dict())
    assert_same(filled(batch()), source(batch()))


def test_a_quantized_collection_is_compared_with_and_refused():
    from torchrec.inference.modules import quantize_embeddings

    model, features = nn.Sequential(bags(poolings=("SUM",) * 3)), batch()
    theirs = quantize_embeddings(copy.deepcopy(model), torch.qint8, inplace=False)
    ours = compressed(model, "quantize", budget="60%")
    embcomp.finalize_(ours)
    assert_same(ours(features), theirs(features), rtol=0, atol=0.02)
    with pytest.raises(NoMatchingTableError, match="quantized"):
        embcomp.compress_(theirs, "full")


@pytest.mark.parametrize(
    ("name", "config", "keys"),
    [
        *((name, "full", "abc") for name in MODELS),
        *(("bags", strategy, "abc") for strategy in ("hash", "compositional", "low_rank", "optembed", "dynamic")),
        ("bags", HashConfig(rows="int4:row", unseen="hash"), "cab"),
    ],
)
def test_models_that_take_a_jagged_tensor_are_exported_whole(tmp_path, name, config, keys):
    model = Net(MODELS[name](), 16 if "sequences" in name else 18)
    budget = None if config in ("full", "optembed") else "60%"
    handle = embcomp.compress_(model, config, budget, verbose=False).finalize_()
    weighted = "weighted" in name
    example = (torch.randn(5, 2), batch(keys, weighted=weighted))
    model.eval()(*example)  # the example has offsets now, which those below have not
    with pytest.raises(embcomp.ExportError, match="ONNX has no KeyedJaggedTensor"):
        export_onnx(handle, tmp_path / "t.onnx", example=example)
    exported = export_pt2(handle, tmp_path / "t.pt2", example=example)
    program = torch.export.load(exported.path)
    assert "fbgemm" not in str(program.graph)
    served = program.module()
    last = KeyedJaggedTensor(  # the last ids of their tables, beyond the end of others
        list(keys), torch.tensor([dict(a=39, b=39, c=29)[key] for key in keys]), torch.ones(3), torch.ones(3).long()
    )
    none = KeyedJaggedTensor(list(keys), torch.empty(0).long(), torch.empty(0), torch.zeros(6).long())
    for features in (*(batch(keys, size, weighted=weighted, seed=size) for size in (1, 2, 9)), last, none):
        if not weighted:
            features = KeyedJaggedTensor(features.keys(), features.values(), lengths=features.lengths())
        given = (torch.randn(features.stride(), 2), features)
        torch.testing.assert_close(served(*given), model(*given), rtol=1e-6, atol=1e-6)
