"""Files of torch.export and packages of AOTInductor: the vectors of eager tables, and what is refused."""

import itertools

import pytest
import torch
from torch import nn

import embcomp
from embcomp.errors import ExportError, NoMatchingTableError
from embcomp.integrations.export import dump_vectors, export_aoti, export_fbgemm, export_onnx, export_pt2
from embcomp.testing._cases import UNSEEN_IDS, build, every_id


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(200, 8), nn.EmbeddingBag(50, 8, mode="mean")
        self.out = nn.Sequential(nn.Dropout(), nn.Linear(16, 1))

    def forward(self, user, items):
        return self.out(torch.cat([self.user(user), self.item(items)], 1)).squeeze(1)


def mixed_ids(tables):
    return torch.cat([every_id(tables)[:60], torch.tensor(UNSEEN_IDS)[:, None].expand(-1, tables.num_tables)])


def loaded(path):
    return torch.export.load(path).module()


@pytest.mark.parametrize("unseen", ["zero", "oov_row", "hash"])
@pytest.mark.parametrize("rows", ["float32", "int8:row", "int4:column"])
def test_pt2_has_the_same_vectors_for_any_batch(rows, unseen, tmp_path):
    tables = build("hash", rows=rows, unseen=unseen).finalize()
    told = export_pt2(tables, tmp_path / "deep" / "t.pt2")
    assert (told.kind, told.inputs, told.unseen) == ("pt2", ("ids",), unseen)
    assert told.file_bytes == (tmp_path / "deep" / "t.pt2").stat().st_size > told.serve_bytes
    lookup, ids = loaded(told.path), mixed_ids(tables)
    for batch in (ids, ids[:1], ids[:0]):
        assert torch.equal(lookup(batch), tables(batch))


MULTIPLIED = ("compact", "low_rank", "mixed_dim", "nested", "reduced_dim")
"""Strategies whose vectors are products with a matrix: sums, whose order differs at some dimensions and batches."""


@pytest.mark.parametrize(
    ("name", "dim"), [(name, 16) for name in embcomp.list_strategies()] + [(name, 8) for name in MULTIPLIED]
)
def test_bug_lookups_of_every_strategy_in_batches_of_any_size(name, dim, tmp_path):
    """Strategies with a matrix per table were refused, since torch.export fixed that a batch is not of one."""
    specs = [embcomp.TableSpec(f"t{n}", 600 // (n + 1), dim) for n in range(5)]
    config = embcomp.make_config(name, unseen="hash")
    tables = embcomp.build_tables(specs, config, None if name == "full" else "60%").finalize_()
    together = loaded(export_pt2(tables, tmp_path / "t.pt2").path)
    one = loaded(export_pt2(tables, tmp_path / "one.pt2", table="t1").path)
    ids = torch.randint(-50, 900, (7, 5), generator=torch.Generator().manual_seed(0))
    tolerance = 1e-6 * float(tables.materialize("t1").abs().max()) if name in MULTIPLIED else 0
    for batch in (ids, ids[:1], ids[:0]):
        torch.testing.assert_close(together(batch), tables(batch), rtol=0, atol=tolerance)
        torch.testing.assert_close(one(batch[:, 1]), tables(batch[:, 1], "t1"), rtol=0, atol=tolerance)


def test_bug_tables_from_checkpoints_with_empty_tensors(tmp_path):
    """torch took a size from addresses, of which empty tensors that safetensors loads have two: "numel: overflow"."""
    specs = [embcomp.TableSpec("item", 200, 8), embcomp.TableSpec("user", 101, 8)]
    config = embcomp.DynamicConfig(unseen="oov_row", rows="int8:table")
    embcomp.save_pretrained(embcomp.build_tables(specs, config, "40%"), tmp_path / "saved")
    tables = embcomp.from_pretrained(tmp_path / "saved").finalize_()
    assert not tables.residents.map.ids.numel()
    lookup, ids = loaded(export_pt2(tables, tmp_path / "t.pt2").path), mixed_ids(tables)
    assert torch.equal(lookup(ids), tables(ids))


def test_pt2_raises_for_unseen_ids(tmp_path):
    tables = build("full", unseen="error").finalize()
    lookup = loaded(export_pt2(tables, tmp_path / "t.pt2", table="item").path)
    assert torch.equal(lookup(torch.arange(50)), tables(torch.arange(50), "item"))
    with pytest.raises(RuntimeError, match="an id is outside its table"):
        lookup(torch.tensor([3, 50]))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(mode, tmp_path):
    tables = build("full", unseen="zero").finalize()
    lookup = loaded(export_pt2(tables, tmp_path / "b.pt2", table="item", bag=mode).path)
    ids = torch.tensor([0, 3, 0, 7, 2**40, 49, 0])  # 0 is padding
    for offsets in ([0, 0, 2, 3, 3, 7, 7], [0], [0, 1, 2, 3, 4, 5, 6]):
        wanted = tables.bag(ids, torch.tensor(offsets), "item", mode=mode)
        torch.testing.assert_close(lookup(ids, torch.tensor(offsets)), wanted, rtol=0, atol=1e-6)
    assert lookup(ids[:0], torch.tensor([0, 0])).tolist() == [[0.0] * 6] * 2
    for offsets in ([1, 3], [0, 4, 2], [0, 8], [-1, 2]):  # the second gave other sums
        with pytest.raises(RuntimeError, match="offsets must begin with 0, never fall"):
            lookup(ids, torch.tensor(offsets))


def test_whole_models(tmp_path):
    model = Model()
    handle = embcomp.compress_(model, embcomp.HashConfig(unseen="hash"), "50%", verbose=False)
    with pytest.raises(ExportError, match="call finalize_"):
        export_pt2(handle, tmp_path / "m.pt2", example=(torch.zeros(3, dtype=torch.int64),))
    handle.finalize_()
    example = (torch.arange(6), torch.arange(18).view(6, 3))
    model.train()
    exported = loaded(export_pt2(handle, tmp_path / "m.pt2", example=example).path)
    assert model.training  # it is as it was
    for batch in (1, 2, 13):
        inputs = (torch.randint(-(10**12), 10**12, (batch,)), torch.randint(50, (batch, 3)))
        assert torch.equal(exported(*inputs), model.eval()(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "unseen"),
    [("full", "int8:row", "error"), ("unified", "float32", "hash"), ("hash", "int4:column", "zero")],
)
def test_aoti_has_the_same_vectors(name, rows, unseen, tmp_path):
    tables = build(name, rows=rows, unseen=unseen).finalize()
    told = export_aoti(tables, tmp_path / "t.pt2")
    assert told.file_bytes > told.serve_bytes
    lookup = torch._inductor.aoti_load_package(str(told.path))
    ids = every_id(tables)[:60] if unseen == "error" else mixed_ids(tables)
    for batch in (ids, ids[:1], ids[:0]):
        torch.testing.assert_close(lookup(batch), tables(batch), rtol=0, atol=1e-6)
    if unseen == "error":
        with pytest.raises(RuntimeError, match="an id is outside its table"):
            lookup(mixed_ids(tables))


class Every(nn.Module):
    """A group of every strategy, one policy for unseen ids after the other; vectors ``(B, S, T, D)``."""

    def __init__(self):
        super().__init__()
        policies = itertools.cycle(["oov_row", "zero", "hash"])
        self.groups = nn.ModuleList(
            build(name, unseen=unseen).finalize()
            for name, unseen in zip(embcomp.list_strategies(), policies, strict=False)
        )

    def forward(self, ids):
        return torch.stack([tables(ids) for tables in self.groups], dim=1)


@pytest.mark.slow
def test_aoti_has_the_vectors_of_every_strategy(tmp_path):
    model = Every()
    ids = mixed_ids(model.groups[0])
    lookup = torch._inductor.aoti_load_package(str(export_aoti(model, tmp_path / "t.pt2", example=(ids,)).path))
    for batch in (ids, ids[:1], ids[-7:]):
        torch.testing.assert_close(lookup(batch), model(batch), rtol=0, atol=1e-5)


def test_aoti_without_a_compiler(tmp_path):
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ExportError, match=r"needs a C.. compiler and found none"):
        export_aoti(build("hash").finalize(), tmp_path / "t.pt2")
    assert not any(tmp_path.iterdir())


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [export_pt2, export_aoti, export_onnx])
def test_tables_that_do_not_serve_are_refused(export, tmp_path):
    path = tmp_path / ("t.onnx" if export is export_onnx else "t.pt2")
    with pytest.raises(ExportError, match=r"training form.*finalize_"):
        export(build("hash"), path)
    with torch.device("meta"):
        empty = build("hash").finalize()
    with pytest.raises(ExportError, match="'meta', without values"):
        export(empty, path)
    with pytest.raises(NoMatchingTableError):
        export(Model(), path, example=(torch.arange(3), torch.arange(6).view(3, 2)))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bag": "sum"}, "bags are of one table: give table=, one of user, flag, item, genre"),
        ({"bag": "max", "table": "item"}, "pool by 'sum' or 'mean'"),
        ({"example": torch.arange(3)}, "must be a tuple"),
        ({"example": (torch.arange(3),), "table": "item"}, "a whole model is exported as it is"),
        ({"example": (torch.zeros(3),)}, r"torch.export can't follow HashTables.*int64"),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_pt2(build("hash").finalize(), tmp_path / "t.pt2", **options)
    assert not any(tmp_path.iterdir())


def test_what_is_no_model(tmp_path):
    with pytest.raises(ExportError, match="not a str"):
        export_pt2("saved", tmp_path / "m.pt2")


def test_a_model_needs_an_example(tmp_path):
    handle = embcomp.compress_(Model(), "hash", "50%", verbose=False)
    handle.finalize_()
    with pytest.raises(ExportError, match="Model is a whole model: give example="):
        export_pt2(handle, tmp_path / "m.pt2")


def test_files_that_are_there_stay_unless_they_may_go(tmp_path):
    path = tmp_path / "t.pt2"
    path.write_text("mine")
    tables = build("hash").finalize()
    with pytest.raises(ExportError, match=r"is there already.*overwrite"):
        export_pt2(tables, path)
    assert path.read_text() == "mine"
    export_pt2(tables, path, overwrite=True)
    assert torch.equal(loaded(path)(every_id(tables)), tables(every_id(tables)))
    assert [file.name for file in tmp_path.iterdir()] == ["t.pt2"]


def test_paths_that_can_not_be(tmp_path):
    tables = build("hash").finalize()
    (tmp_path / "file").write_text("")
    for path, message in (
        ("t.onnx", "must end with '.pt2'"),
        (".", "must end with"),
        ("file/t.pt2", "can't be written"),
    ):
        with pytest.raises(ExportError, match=message):
            export_pt2(tables, tmp_path / path)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        export_pt2(tables, tmp_path / "folder.pt2", overwrite=True)


@pytest.mark.parametrize(
    ("export", "suffix"),
    [(export_pt2, ".pt2"), (export_onnx, ".onnx"), (export_fbgemm, ".safetensors"), (dump_vectors, ".npy")],
)
def test_bug_a_full_disk_is_told_with_the_path_and_leaves_nothing(export, suffix, full_disk, tmp_path):
    if export is export_onnx:
        pytest.importorskip("onnxruntime")
    tables = embcomp.build_tables([embcomp.TableSpec("item", 500, 8)]).finalize_()
    path = tmp_path / f"t{suffix}"
    given = (tables, "item", path) if export is dump_vectors else (tables, path)
    with full_disk(), pytest.raises(ExportError, match=rf"t\{suffix} can't be written .*choose a folder"):
        export(*given)
    assert not any(tmp_path.iterdir())
