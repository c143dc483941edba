"""The bugs of OptEmbed's public code, one test each, which fails where the bug is put back.

Those of the search are in ``tests/training/test_evolution.py`` and ``test_searching.py``, the test split's in
``tests/recsys_models/test_phases.py``.
"""

import itertools

import pytest
import torch

from embcomp import OptEmbedConfig, save_pretrained
from tests.recsys_models.tiny import tiny_log, tiny_model
from tests.strategies.test_optembed import make_tables, searching, some_ids, supernet
from tests.strategies.test_optembed_forms import WIDE, file_bytes, serve_bytes, wide_tables


def test_bug_aliased_mutation_the_value_that_is_reported_is_that_of_the_widths_that_are_adopted():
    tables = wide_tables("25%", generations=8, mutation_probability=0.6)
    phases, told = searching(tables, [0.5, 0.4, 0.3]), {}
    ids = some_ids(tables, 100)

    def evaluate():
        value = float(tables.eval()(ids).detach().sin().sum())
        told[tuple(tables._shown[0][0].tolist())] = value
        return value

    result = phases.search_(evaluate)
    phases.leave_(phases.phase)
    assert told[result.candidate] == result.value == max(told.values())
    assert tables.config.dims == dict(zip(WIDE, result.candidate, strict=True))
    assert evaluate_again(tables, ids) == pytest.approx(result.value, rel=1e-5)


def evaluate_again(tables, ids):
    return float(tables.eval()(ids).detach().sin().sum())


def test_bug_cut_point_over_dimensions_candidates_have_a_gene_for_every_field_and_children_are_no_copies():
    tables = make_tables({f"t{field}": 9 for field in range(3)}, dim=64)
    searching(tables)
    search = tables.make_search()
    assert (search.low, search.high) == ((1, 1, 1), (64, 64, 64))
    parents = [(1, 2, 3), (61, 62, 63)]
    children = {search._cross(parents) for _ in range(200)}
    assert children == {(1, 62, 63), (1, 2, 63), (61, 2, 3), (61, 62, 3)}


@pytest.mark.parametrize("unseen", ["error", "oov_row"])
@pytest.mark.parametrize("pruned", ["zero", "oov"])
@pytest.mark.parametrize("per_id", [False, True])
def test_bug_drifting_field_offsets_every_row_is_compared_with_the_threshold_of_its_own_field(unseen, pruned, per_id):
    sizes = {"five": 5, "one": 1, "seven": 7, "two": 2, "last": 3}
    tables = make_tables(sizes, unseen=unseen, pruned=pruned, search_dims=False, threshold_per_id=per_id)
    with torch.no_grad():
        tables.rows.weight.copy_(torch.where(tables.rows.weight < 0, -0.125, 0.125))  # all norms are 0.5
    own = torch.tensor([0.1, 1.0, 0.1, 1.0, 0.1])  # which keeps all of a table, or nothing
    owner = torch.repeat_interleave(torch.arange(5), torch.tensor(tables.rows.segments))
    phases = supernet(tables, own[owner] if per_id else own)
    ids = {name: torch.arange(size) for name, size in sizes.items()}
    shown = {name: tables.eval()(ids[name], name).detach() for name in sizes}
    phases.leave_(phases.phase)
    served = tables.finalize()
    for field, (name, size) in enumerate(sizes.items()):
        start, stays = tables.rows.starts()[field], own[field] < 0.5
        assert bool((tables.kept[start : start + size] == stays).all())
        otherwise = torch.zeros(4) if pruned == "zero" else tables.rows.weight[start + size]
        wanted = tables.rows.weight[start : start + size] if stays else otherwise.expand(size, 4)
        for vectors in (shown[name], tables(ids[name], name), served(ids[name], name)):
            assert torch.equal(vectors, wanted)


def test_bug_undefined_oov_mask_the_half_that_only_prunes_trains_the_shared_rows():
    tables = make_tables(search_dims=False, pruned="oov")
    phases = supernet(tables, [99.0, 0.0, 99.0])
    tables.train()(some_ids(tables)).square().sum().backward()
    trained = tables.rows.weight.grad[[50, 60, 63]].abs().sum(1) > 0
    assert trained.tolist() == [True, False, True]
    phases.leave_(phases.phase)
    assert tables.config.num_kept == {"user": 0, "movie": 9, "flag": 0}


@pytest.mark.parametrize("pruned", ["zero", "oov"])
def test_bug_uncounted_linear_weights_a_pruned_id_has_no_first_order_weight_beside_its_row(pruned):
    torch.manual_seed(0)
    data = tiny_log(sizes=(53, 29, 11))
    config = OptEmbedConfig(pruned=pruned, projection="none", search_dims=False)
    model = tiny_model(data, "deepfm", config, dim=4, init_std=0.5)
    tables = model.tables
    phases = supernet(tables, [2.0, 2.0, 2.0])
    phases.leave_(phases.phase)
    kept = [part[:size] for part, size in zip(tables.kept.split(tables.rows.segments), (53, 29, 11), strict=True)]
    assert all(0 < part.sum() < len(part) for part in kept)
    beside = [t for name, t in model.state_dict().items() if not name.startswith("tables.")]
    assert not any(size in (53, 29, 11, 93) for tensor in beside for size in tensor.shape)
    tables.finalize_()
    for field, part in enumerate(kept):
        gone = (~part).nonzero().flatten()
        vectors = tables(gone, field)
        assert vectors.shape[1] == 5  # the weight and four dimensions
        assert bool((vectors == (0.0 if pruned == "zero" else vectors[:1])).all())
    stored = sum(tensor.nbytes for tensor in tables.state_dict().values())
    assert stored == serve_bytes(tables) < 93 * 5 * 4


def test_bug_uncounted_remap_the_bits_that_say_which_ids_are_kept_are_in_the_report_and_in_the_file(tmp_path):
    for ordered in (False, True):
        tables = make_tables({"user": 1000, "movie": 300}, pruned="zero", dim=8)
        if ordered:
            with torch.no_grad():
                users, movies = tables.rows.weight.abs().sum(1).split([1000, 300])
                order = torch.cat([users.argsort(descending=True), 1000 + movies.argsort(descending=True)])
                tables.rows.weight.copy_(tables.rows.weight[order])
        phases = searching(tables, [0.5, 0.5])
        tables.adopt_((8, 8))
        tables.leave_phase_(phases.phase)
        remap = 0 if ordered else 12 * (16 + 5)  # a bit per id and an int32 per 64 of them
        kept = int(tables.kept.sum())
        parts = {(part.table, part.name): part.serve_bytes for part in tables.memory().parts}
        assert parts.get(("*", "remap"), 0) == remap
        assert serve_bytes(tables) == kept * 8 * 4 + remap
        served = tables.finalize()
        assert serve_bytes(served) == serve_bytes(tables)
        folder = save_pretrained(served, tmp_path / str(ordered))
        assert file_bytes(folder) == kept * 8 * 4 + remap


@pytest.mark.parametrize("rows", ["float32", "float16", "int8:row", "int4:column"])
def test_bug_stored_at_full_width_every_table_is_stored_at_its_own_width(rows):
    for widths in itertools.product((1, 3, 8), (2, 8), (5,)):
        tables = wide_tables(None, pruned="zero", rows=rows)
        phases = searching(tables, [0.5, 0.4, 0.3])
        tables.adopt_(widths)
        tables.leave_phase_(phases.phase)
        kept = tables.kept.split(tables.rows.segments)
        wanted = sum(int(part.sum()) * width for part, width in zip(kept, widths, strict=True))
        served = tables.finalize()
        stream = served.rows.codes if "int" in rows else served.rows.values
        per_byte = 2 if rows.startswith("int4") else 1
        assert wanted <= stream.numel() * per_byte <= wanted + 8  # spare values behind the last row
        assert serve_bytes(served) == sum(tensor.nbytes for tensor in served.state_dict().values())
