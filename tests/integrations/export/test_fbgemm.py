"""Rows for FBGEMM, and TorchRec's quantized collection on them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import embcomp
from embcomp._checkpoint import sealed
from embcomp.errors import ExportError, IncompatibleStateError, InputError, UnseenIdError
from embcomp.integrations.export import export_fbgemm, load_fbgemm
from embcomp.testing._cases import UNSEEN_IDS, build, every_id, make_specs, make_weights

pytestmark = pytest.mark.torchrec
jagged_tensor = pytest.importorskip("torchrec.sparse.jagged_tensor")

FORMATS = ("int8:row", "int4:row", "int2:row", "float16", "float32")


def kjt(keys, bags, weights=None):
    """Keys and, for each, bags of ids."""
    ids = [identity for own in bags for bag in own for identity in bag]
    lengths = [len(bag) for own in bags for bag in own]
    return jagged_tensor.KeyedJaggedTensor(
        list(keys), torch.tensor(ids, dtype=torch.int64), weights=weights, lengths=torch.tensor(lengths)
    )


def columns(tables, ids):
    return kjt(tables.names, [[[value] for value in column] for column in ids.t().tolist()])


def fitted(config, dim, scale=1.0, **options):
    tables = build(config, dim=dim, **options)
    weights = {name: weight * scale for name, weight in make_weights(make_specs(dim)).items()}
    return tables.load_dense_(weights).finalize()


def require_close(got, wanted, rows, scale=1.0):
    """Exact but for int8, whose scales FBGEMM has in float16: 2⁻⁹ of the row's largest value."""
    if rows != "int8:row":
        assert torch.equal(got, wanted)
        return
    allowed = (2**-9 * wanted.abs().amax(-1, keepdim=True)).clamp_min(1e-5)
    assert ((got - wanted).abs() <= allowed).all()
    assert not torch.equal(got, wanted) or scale == 0


@pytest.mark.parametrize("dim", [4, 8, 12, 16, 20])
@pytest.mark.parametrize("rows", FORMATS)
def test_vectors(rows, dim, tmp_path):
    tables = fitted(embcomp.FullConfig(rows=rows), dim)
    collection = load_fbgemm(export_fbgemm(tables, tmp_path / "t.safetensors").path)
    ids = every_id(tables)
    got = collection(columns(tables, ids)).values().view(len(ids), tables.num_tables, dim)
    require_close(got, tables(ids), rows)


@pytest.mark.parametrize(("rows", "dim"), [("int8:row", 1), ("int8:row", 3), ("int4:row", 2), ("int4:row", 6)])
def test_small_and_odd_dimensions(rows, dim, tmp_path):
    specs = [embcomp.TableSpec("item", 40, dim)]
    tables = embcomp.build_tables(specs, embcomp.FullConfig(rows=rows)).finalize_()
    collection = load_fbgemm(export_fbgemm(tables, tmp_path / "t.safetensors").path)
    got = collection(kjt(["item"], [[[identity] for identity in range(40)]])).values()
    require_close(got, tables.materialize("item"), rows)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e3])
def test_tolerance_at_other_sizes_of_values(scale, tmp_path):
    tables = fitted(embcomp.FullConfig(rows="int8:row"), 16, scale)
    collection = load_fbgemm(export_fbgemm(tables, tmp_path / "t.safetensors").path)
    ids = every_id(tables)
    got = collection(columns(tables, ids)).values().view(len(ids), tables.num_tables, 16)
    require_close(got, tables(ids), "int8:row")


@pytest.mark.parametrize("unseen", ["zero", "oov_row", "hash"])
@pytest.mark.parametrize("rows", FORMATS)
def test_unseen_ids_follow_the_policy(rows, unseen, tmp_path):
    tables = fitted(embcomp.FullConfig(rows=rows), 8, unseen=unseen)
    collection = load_fbgemm(export_fbgemm(tables, tmp_path / "t.safetensors").path)
    ids = torch.tensor(UNSEEN_IDS)[:, None].expand(-1, tables.num_tables)
    got = collection(columns(tables, ids)).values().view(len(ids), tables.num_tables, 8)
    require_close(got, tables(ids), rows, scale=0 if unseen == "zero" else 1)


def test_unseen_ids_raise(tmp_path):
    """FBGEMM alone would look row 0 up."""
    tables = fitted("full", 8)
    collection = load_fbgemm(export_fbgemm(tables, tmp_path / "t.safetensors").path)
    with pytest.raises(UnseenIdError, match="id 50 is outside table 'item'"):
        collection(kjt(["user", "flag", "item", "genre"], [[[299]], [[1]], [[50]], [[0]]]))


def test_quantized_tables_with_small_ones_left_whole(tmp_path):
    """Tables kept in several ways lie in several stores."""
    config = embcomp.QuantizeConfig(bits=8, granularity="row", unseen="oov_row")
    specs = [embcomp.TableSpec("user", 300, 8), embcomp.TableSpec("flag", 1, 8)]
    tables = embcomp.build_tables(specs, config).finalize_()
    told = export_fbgemm(tables, tmp_path / "t.safetensors")
    collection = load_fbgemm(told.path)
    got = collection(columns(tables, torch.tensor([[7, 0], [10**12, -3]]))).values().view(2, 2, 8)
    require_close(got, tables(torch.tensor([[7, 0], [10**12, -3]])), "int8:row")
    with pytest.raises(ExportError, match="'f' looks tables 'user' and 'flag' up"):
        load_fbgemm(told.path, {"user": ["f"], "flag": ["g", "f"]})


def test_bags_features_and_weights(tmp_path):
    tables = fitted(embcomp.FullConfig(rows="int4:row"), 8, unseen="zero")
    path = export_fbgemm(tables, tmp_path / "t.safetensors", table="item").path
    features = kjt(["b", "other", "a"], [[[3, 0, 999], []], [[-1], [2**50]], [[4], [4, 5]]])
    collection = load_fbgemm(path, {"item": ["a", "b"]})
    found = collection(features)
    bags = {"a": [[4], [4, 5]], "b": [[3, 0, 999], []]}
    for key, own in bags.items():
        flat = torch.tensor([identity for bag in own for identity in bag])
        offsets = torch.tensor([0, len(own[0])])
        torch.testing.assert_close(found[key], tables.bag(flat, offsets, "item"), rtol=0, atol=1e-5)
    weights = torch.tensor([0.5, 2.0, 1.0])
    weighted = load_fbgemm(path, is_weighted=True)(kjt(["item"], [[[3, 4], [5]]], weights))
    wanted = tables.bag(torch.tensor([3, 4, 5]), torch.tensor([0, 2]), "item", weights)
    torch.testing.assert_close(weighted.values(), wanted, rtol=0, atol=1e-5)
    with pytest.raises(ExportError, match="would count the padding of table 'item'"):
        load_fbgemm(path, pooling="mean")
    with pytest.raises(ExportError, match="no table 'itme'; did you mean 'item'"):
        load_fbgemm(path, {"itme": ["a"]})


def test_it_takes_the_place_of_a_models_collection(tmp_path):
    """Each table with the pooling and the features that it had, or a vector per id."""
    modules = pytest.importorskip("torchrec")
    shared = {"embedding_dim": 8, "num_embeddings": 30}
    bags = modules.EmbeddingBagCollection(
        [
            modules.EmbeddingBagConfig(name="a", feature_names=["f", "g"], pooling=modules.PoolingType.MEAN, **shared),
            modules.EmbeddingBagConfig(name="b", feature_names=["h"], **shared),
        ]
    )
    rows = modules.EmbeddingCollection([modules.EmbeddingConfig(name="c", feature_names=["f", "h"], **shared)])
    model = torch.nn.ModuleDict({"bags": bags, "rows": rows})
    handle = embcomp.compress_(model, embcomp.FullConfig(rows="int4:row"), verbose=False).finalize_()
    features = kjt(["h", "f", "g"], [[[1, 2], []], [[3, 4], [29]], [[0], [7, 7, 9]]])
    wanted, vectors = model["bags"](features), model["rows"](features)
    path = export_fbgemm(handle.tables[0], tmp_path / "t.safetensors").path
    configs = bags.embedding_bag_configs()
    names = {f"bags.embedding_bags.{config.name}": config for config in configs}
    served = load_fbgemm(
        path,
        {name: config.feature_names for name, config in names.items()},
        tables=list(names),
        pooling={name: config.pooling.name.lower() for name, config in names.items()},
    )
    found = served(features)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found.values(), wanted.values(), rtol=0, atol=1e-6)
    served = load_fbgemm(path, {"rows.embeddings.c": ["f", "h"]}, tables=["rows.embeddings.c"], pooling="none")
    found = served(features)
    for key, own in vectors.items():
        assert torch.equal(found[key].values(), own.values())
        assert torch.equal(found[key].lengths(), own.lengths())
    for options, message in (
        ({"pooling": {"c": "sum"}}, "pooling says nothing of table"),
        ({"pooling": dict.fromkeys([*names, "rows.embeddings.c", "d"], "sum")}, "pooling has no table 'd'"),
        ({"pooling": "max"}, "pooling of table 'bags.embedding_bags.a': 'max'"),
        ({"tables": ["a"]}, "has no table 'a'"),
        ({"tables": []}, "chooses none of"),
        ({"pooling": "none", "is_weighted": True}, "is_weighted=True needs pooling"),
    ):
        with pytest.raises(ExportError, match=message):
            load_fbgemm(path, **options)


def test_tables_of_models_have_dots_in_their_names(tmp_path):
    """TorchRec's tables are modules, whose names can't have any."""
    tables = embcomp.build_tables([embcomp.TableSpec("tables.item ü", 9, 4)], "full").finalize_()
    collection = load_fbgemm(export_fbgemm(tables, tmp_path / "t.safetensors").path)
    found = collection(kjt(["tables.item ü"], [[[2], [5]]]))
    assert torch.equal(found["tables.item ü"], tables(torch.tensor([2, 5])))


def test_bytes_of_rows(tmp_path):
    """Rows lie without a gap: TorchRec's own alignment makes 32 bytes of the 20 of 16 int8 values."""
    for rows, row_bytes in (("int8:row", 20), ("int4:row", 12), ("int2:row", 8)):
        tables = embcomp.build_tables([embcomp.TableSpec("item", 1000, 16)], embcomp.FullConfig(rows=rows)).finalize_()
        path = tmp_path / f"{row_bytes}.safetensors"
        told = export_fbgemm(tables, path)
        with safe_open(path, "pt") as file:
            stored = sum(file.get_tensor(name).nbytes for name in ("item.codes", "item.scale_bias"))
        assert stored == 1000 * row_bytes
        assert stored < told.file_bytes < stored + 1000
        (kernel,) = load_fbgemm(path).collection._emb_modules
        assert kernel.weights_host.numel() == -(-1000 * row_bytes // 128) * 128  # tables begin at cache lines


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (embcomp.FullConfig(rows="int8:column"), "rows='int8:column'"),
        (embcomp.FullConfig(rows="int3:row"), "rows='int3:row'"),
        (embcomp.FullConfig(rows="bfloat16"), "rows='bfloat16'"),
        (embcomp.FullConfig(rows="int2:row"), "do not fill whole bytes"),
        (embcomp.HashConfig(), "'hash' shares rows between ids"),
        (embcomp.make_config("low_rank"), "'low_rank' composes the vectors"),
    ],
)
def test_other_formats_are_refused_by_name(config, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_fbgemm(build(config, dim=6).finalize(), tmp_path / "t.safetensors")
    assert not any(tmp_path.iterdir())


def test_values_too_large_for_float16_are_refused(tmp_path):
    tables = fitted(embcomp.FullConfig(rows="int8:row"), 8, 1e6)
    with pytest.raises(ExportError, match="beyond 65504"):
        export_fbgemm(tables, tmp_path / "t.safetensors")


def test_files_that_are_none_of_ours(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(IncompatibleStateError, match="missing or corrupt"):
        load_fbgemm(path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(IncompatibleStateError, match="is foreign"):
        load_fbgemm(path)
    export_fbgemm(fitted("full", 8), path, overwrite=True)
    content, state = read(path)
    for changed, kept, message in (
        ({"format_version": 9}, state, "version 9"),
        ({"tables": [{"name": "user"}]}, state, "a table is described by name, num_embeddings"),
        ({"tables": []}, state, "must be at least one"),
        ({"unseen": 3}, state, "'unseen' must be a str"),
        ({"unseen": "zeros"}, state, "unseen='zeros'; did you mean 'zero'"),
        ({}, {name: state[name] for name in state if name != "item.rows"}, "lacks item.rows"),
    ):
        write(path, content | changed, kept)
        with pytest.raises(IncompatibleStateError, match=message):
            load_fbgemm(path)


def read(path):
    """The description without its digests, as older files have it, and the tensors."""
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["embcomp-fbgemm"])
    return {key: value for key, value in content.items() if not key.endswith("sha256")}, load_file(path)


def write(path, content, state):
    save_file(state, path, metadata={"format": "pt", "embcomp-fbgemm": json.dumps(content)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data_type": 3}, "data_type=3; Allowed: FP16, FP32, INT2, INT4, INT8"),
        ({"data_type": ["INT8"]}, "Allowed: FP16"),
        ({"data_type": "INT7"}, "data_type='INT7'; did you mean"),
        ({"data_type": "FP32"}, "lacks item.rows"),
        ({"data_type": "INT4"}, r"item.codes is torch.uint8 \(50, 8\)"),
        ({"num_embeddings": "x"}, "num_embeddings='x'"),
        ({"num_embeddings": 49}, r"item.codes is torch.uint8 \(50, 8\), and INT8 rows of V=49, D=8"),
        ({"num_embeddings": 10**15}, "V=1000000000000000, D=8"),
        ({"embedding_dim": 7}, "V=50, D=7"),
        ({"padding_idx": 50}, "padding_idx=50"),
        ({"name": 3}, "table name 3"),
    ],
)
def test_descriptions_that_tensors_do_not_have(changed, message, tmp_path):
    path = export_fbgemm(fitted(embcomp.FullConfig(rows="int8:row"), 8), tmp_path / "t.safetensors", table="item").path
    content, state = read(path)
    write(path, content | {"tables": [content["tables"][0] | changed]}, state)
    with pytest.raises(IncompatibleStateError, match=message):
        load_fbgemm(path)


def test_the_row_for_unseen_ids_is_counted(tmp_path):
    tables = fitted(embcomp.FullConfig(rows="int8:row"), 8, unseen="zero")
    path = export_fbgemm(tables, tmp_path / "t.safetensors").path
    content, state = read(path)
    write(path, content | {"unseen": "hash"}, state)
    with pytest.raises(IncompatibleStateError, match="with unseen='hash' need"):
        load_fbgemm(path)


def test_bug_changed_files_are_found_by_their_digests(tmp_path):
    """A flipped bit gave other vectors, and nobody was told."""
    tables = fitted(embcomp.FullConfig(rows="int8:row"), 8, unseen="hash")
    path = export_fbgemm(tables, tmp_path / "t.safetensors").path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content, state = json.loads(metadata["embcomp-fbgemm"]), load_file(path)
    for name in ("item.codes", "user.scale_bias"):
        flipped = {key: tensor.clone() for key, tensor in state.items()}
        flipped[name].view(torch.uint8)[1, 1] ^= 1
        save_file(flipped, path, metadata=metadata)
        with pytest.raises(IncompatibleStateError, match="its tensors_sha256 is that of other tensors"):
            load_fbgemm(path)
    write(path, content | {"seed": content["seed"] ^ 1}, state)
    with pytest.raises(IncompatibleStateError, match="its config_sha256 is that of another content"):
        load_fbgemm(path)
    write(path, sealed(content), state)
    ids = every_id(tables)
    wanted = load_fbgemm(path)(columns(tables, ids)).values()
    write(path, read(path)[0], state)  # as before there were digests
    assert torch.equal(load_fbgemm(path)(columns(tables, ids)).values(), wanted)


def test_bug_features_that_make_no_bags(tmp_path):
    """Float ids were cut off, and a missing weight was read from beyond the end."""
    tables = fitted(embcomp.FullConfig(rows="int8:row"), 8, unseen="zero")
    path = export_fbgemm(tables, tmp_path / "t.safetensors", table="item").path
    plain, weighted = load_fbgemm(path), load_fbgemm(path, is_weighted=True)
    ids, lengths = torch.tensor([3, 4, 5]), torch.tensor([2, 1])

    def features(key="item", ids=ids, **options):
        return jagged_tensor.KeyedJaggedTensor([key], ids, lengths=lengths, **options)

    def of(keys, lengths, **options):
        return jagged_tensor.KeyedJaggedTensor(keys, ids, lengths=torch.tensor(lengths), **options)

    for collection, given, message in (
        (plain, features(ids=ids + 0.5), "must be int64, not torch.float32: call ids.long"),
        (plain, features("itme"), "lacks features 'item'; it has 'itme'"),
        (plain, features(ids=ids[:2]), "has 2 values, and lengths that add up to 3"),
        (weighted, features(), "has no weights: give weights=, one float per value"),
        (weighted, features(weights=torch.ones(2)), "has 3 values and 2 weights"),
        (weighted, features(weights=torch.ones(3, dtype=torch.int64)), "has torch.int64 weights: give floats"),
        (plain, of(["item", "other"], [1, 1, 1]), "has 3 lengths for 2 features"),
        (plain, of(["item"], [4, -1]), "has a negative length"),
        (plain, of(["item", "item"], [2, 1]), "has a feature twice"),
        (plain, of(["item", "other"], [1, 1, 1], stride_per_key_per_rank=[[2], [1]]), r"has \[2, 1\] bags of features"),
    ):
        with pytest.raises(InputError, match=message):
            collection(given)
    assert torch.equal(plain(features(ids=ids.int())).values(), plain(features()).values())
