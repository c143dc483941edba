"""ONNX files give the vectors of eager tables in ONNX Runtime, by the same policy for unseen ids."""

import sys

import pytest
import torch
from torch import nn

import embcomp
from embcomp.errors import ExportError, InputError, MissingDependencyError
from embcomp.integrations.export import export_onnx
from embcomp.integrations.export.onnx import rewritten
from embcomp.testing._cases import UNSEEN_IDS, build, every_id, make_counts, make_specs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FORMATS = {"float32": "hash", "int8:row": "oov_row", "int8:column": "zero", "int4:row": "hash", "int2": "zero"}
"""Row format -> the policy that it is tested with."""
EDGES = torch.tensor([0, 1, -1, 2**31 - 1, 2**31, -(2**31), 2**32, -(2**32), 2**63 - 1, -(2**63), 2**62 + 12345])


def running(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, that is enough
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs):
        found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return [torch.from_numpy(one) for one in found]

    return run


def mixed_ids(tables):
    return torch.cat([every_id(tables)[:60], torch.tensor(UNSEEN_IDS)[:, None].expand(-1, tables.num_tables)])


class SideBySide(nn.Module):
    """Several groups in one model, so that one export tests them all."""

    def __init__(self, groups):
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def forward(self, ids):
        return [tables(ids) for tables in self.groups]


@pytest.mark.slow
@pytest.mark.parametrize("name", embcomp.list_strategies())
def test_every_strategy_in_every_kind_of_rows(name, tmp_path):
    formats = FORMATS if _takes_rows(name) else {"float32": "hash"}
    groups = [build(name, dim=8, rows=rows, unseen=unseen).finalize() for rows, unseen in formats.items()]
    model = SideBySide(groups)
    export_onnx(model, tmp_path / "m.onnx", example=(every_id(groups[0])[:5],))
    ids = mixed_ids(groups[0])
    for rows, got, wanted in zip(formats, running(tmp_path / "m.onnx")(ids), model(ids), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6, msg=lambda text, rows=rows: f"{rows}: {text}")


def build_counted(names, unseen):
    """Groups of small tables, built with counts, by which strategies may choose ids."""
    specs = make_specs(dim=8, sizes={"user": 300, "genre": 7}, padded=())
    configs = [embcomp.make_config(name, unseen=unseen) for name in names]
    return [embcomp.build_tables(specs, config, "60%", make_counts(specs)).finalize_() for config in configs]


def check_side_by_side(groups, ids, path):
    model = SideBySide(groups)
    export_onnx(model, path, example=(ids[:5],))
    for tables, got, wanted in zip(groups, running(path)(ids), model(ids), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6, msg=lambda text, own=tables: f"{own}: {text}")


def test_bug_tables_with_a_remap_were_refused(tmp_path):
    """Ids that counts choose were told from others by a choice between bools, which ONNX Runtime lacks."""
    groups = build_counted(["frequency_cut"], "error")
    assert groups[0].remap.is_remapped
    check_side_by_side(groups, every_id(groups[0]), tmp_path / "m.onnx")


@pytest.mark.slow
def test_every_strategy_with_counts_by_the_default_policy(tmp_path):
    groups = build_counted([name for name in embcomp.list_strategies() if name != "full"], "error")
    check_side_by_side(groups, every_id(groups[0]), tmp_path / "m.onnx")


def _takes_rows(name):
    try:
        embcomp.make_config(name, rows="int8:row")
    except embcomp.ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", ["full", "hash", "unified"])
def test_hashes_are_the_same_bit_for_bit(name, tmp_path):
    """Products that wrap, shifts of negative numbers, and a range reduction by 64-bit integers."""
    tables = build(name, dim=8, unseen="hash").finalize()
    export_onnx(tables, tmp_path / "t.onnx")
    drawn = torch.randint(-(2**63), 2**63 - 1, (4000, tables.num_tables), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([drawn, EDGES[:, None].expand(-1, tables.num_tables)])
    (got,) = running(tmp_path / "t.onnx")(ids)
    assert torch.equal(got, tables(ids))


@pytest.mark.parametrize("strategy", [embcomp.FullConfig(), embcomp.HashConfig(rows="int8:row"), "magnitude"])
def test_unseen_ids_raise(strategy, tmp_path):
    tables = build(strategy, dim=8, unseen="error").finalize()
    export_onnx(tables, tmp_path / "t.onnx")
    run, ids = running(tmp_path / "t.onnx"), every_id(tables)[:40]
    assert torch.equal(run(ids)[0], tables(ids))
    for unseen in (*UNSEEN_IDS, tables.specs[2].num_embeddings):
        wrong = ids.clone()
        wrong[7, 2] = unseen
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data bounds"):
            run(wrong)


def test_unseen_ids_are_nan_where_indices_are_not_checked():
    """What a provider without checks computes: the guard's index clipped, and the vector NaN all the same."""
    tables = build("full", dim=8, unseen="error").finalize()
    guarded = rewritten(tables)
    guarded._nothing = torch.zeros(2)  # so that the index is in range
    ids = every_id(tables)[:5].clone()
    ids[1, 2] = 50
    vectors = guarded(ids)
    assert vectors[1, 2].isnan().all()
    assert torch.equal(vectors[0], tables(ids[:1])[0])
    assert tables.lookup(ids[:1], None).isfinite().all()  # the tables themselves are as they were
    with pytest.raises(embcomp.UnseenIdError):
        tables(ids)


def test_rewriting_shares_tensors_and_keeps_vectors():
    for strategy in (embcomp.FullConfig(rows="int4:row"), embcomp.HashConfig(), embcomp.make_config("magnitude")):
        tables = build(strategy, dim=8, unseen="zero").finalize()
        before = {name: tensor.clone() for name, tensor in tables.state_dict().items()}
        twin = rewritten(tables)
        ids = mixed_ids(tables)
        assert torch.equal(twin(ids), tables(ids))
        assert all(torch.equal(tensor, before[name]) for name, tensor in tables.state_dict().items())
    assert tables.rows.values.data_ptr() == twin.rows.values.data_ptr()


def test_files_take_little_more_than_the_tables(tmp_path):
    specs = [embcomp.TableSpec(name, 20_000, 16) for name in ("user", "item")]
    for config in (embcomp.FullConfig(rows="int4:row", unseen="zero"), embcomp.FullConfig(rows="int8:column")):
        exported = export_onnx(embcomp.build_tables(specs, config).finalize_(), tmp_path / "t.onnx", overwrite=True)
        assert exported.serve_bytes < exported.file_bytes < exported.serve_bytes + 20_000
        assert exported.file_bytes == (tmp_path / "t.onnx").stat().st_size


@pytest.mark.parametrize("name", ["dynamic", "low_rank", "nested", "reduced_dim"])
@pytest.mark.parametrize("table", [None, "t1"])
def test_bug_lookups_that_were_refused(name, table, tmp_path):
    """`dynamic` searched in a way that ONNX has not, the others fixed that a batch is not of one."""
    specs = [embcomp.TableSpec(f"t{n}", 600 // (n + 1), 16) for n in range(5)]
    tables = embcomp.build_tables(specs, embcomp.make_config(name, unseen="hash"), "60%").finalize_()
    run = running(export_onnx(tables, tmp_path / "t.onnx", table=table).path)
    ids = torch.randint(-50, 900, (7, 5), generator=torch.Generator().manual_seed(0))
    for batch in (ids, ids[:1]):
        batch = batch if table is None else batch[:, 1]
        torch.testing.assert_close(run(batch)[0], tables(batch, table), rtol=0, atol=2e-6)


def test_lookups_of_one_table_and_bags(tmp_path):
    tables = build("hash", dim=8, unseen="hash").finalize()
    told = export_onnx(tables, tmp_path / "t.onnx", table="item")
    assert (told.inputs, told.outputs, told.unseen) == (("ids",), ("vectors",), "hash")
    run = running(tmp_path / "t.onnx")
    for ids in (EDGES, EDGES[:1], EDGES[:0]):
        assert torch.equal(run(ids)[0], tables(ids, "item"))
    ids = torch.tensor([0, 3, 0, 7, 2**40, 49, 0])
    for mode in ("sum", "mean"):
        export_onnx(tables, tmp_path / "b.onnx", table="item", bag=mode, overwrite=True)
        run = running(tmp_path / "b.onnx")
        for offsets in ([0, 0, 2, 3, 3, 7, 7], [0], [0, 1, 2, 3, 4, 5, 6]):
            wanted = tables.bag(ids, torch.tensor(offsets), "item", mode=mode)
            torch.testing.assert_close(run(ids, torch.tensor(offsets))[0], wanted, rtol=0, atol=1e-6)


class Unknown(nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = tables

    def forward(self, ids):
        return torch.special.bessel_j1(self.tables(ids, 0))


def test_operations_that_onnx_lacks_are_named(tmp_path):
    model = Unknown(build("hash").finalize())
    with pytest.raises(ExportError, match=r"'hash' \(rows='float32'\).*lacks prims.bessel_j1.*use 'pt2'"):
        export_onnx(model, tmp_path / "m.onnx", example=(torch.arange(5),))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_told(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install embcomp\[serve\]"):
        export_onnx(build("hash").finalize(), tmp_path / "t.onnx")


def test_no_such_table(tmp_path):
    with pytest.raises(InputError, match="did you mean 'item'"):
        export_onnx(build("hash").finalize(), tmp_path / "t.onnx", table="itme")
