"""Checkpoints that were damaged or forged: an error of ours, or exactly the right values, whatever was done to them."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import embcomp
from embcomp._checkpoint import CONFIG, SEAL, sealed

STRATEGIES = ("compact", "compositional", "frequency_cut", "hash", "magnitude", "nested", "optembed", "unified")
VERSION_1 = Path(__file__).parent / "data" / "checkpoint_version_1"
ODD = (
    *(None, True, -1, 0, 3, 2**31, 10**15, 10**30, 1.5, "x", "", [], {}, [1], {"a": 1}, [[]]),
    *({"t0": None}, {"t0": 10**15}, {"t0": "x"}, {"t0": -1}),
)


def build(strategy, seed=0, final=True):
    specs = [embcomp.TableSpec("t0", 300, 8), embcomp.TableSpec("t1", 3, 8)]
    counts = {"t0": torch.arange(300) % 17, "t1": torch.arange(3)}
    config = embcomp.make_config(strategy, seed=seed)
    tables = embcomp.build_tables(specs, config, None if strategy == "full" else "50%", counts)
    return tables.finalize_() if final else tables


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with intact checkpoints by strategy, and the tables that they hold."""
    found = {}
    for strategy in STRATEGIES:
        tables = build(strategy)
        found[strategy] = embcomp.save_pretrained(tables, tmp_path_factory.mktemp(strategy)), tables
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def copy(folder, scratch):
    shutil.rmtree(scratch, ignore_errors=True)
    return shutil.copytree(folder, scratch)


def weights_file(folder):
    (file,) = folder.glob("model-*.safetensors")
    return file


def is_right_or_refused(folder, tables):
    """Load, and say whether it was refused; what is loaded must be what was saved."""
    try:
        loaded = embcomp.from_pretrained(folder)
    except embcomp.IncompatibleStateError:
        return False
    mine, others = loaded.state_dict(), tables.state_dict()
    assert (type(loaded), loaded.config, loaded.specs) == (type(tables), tables.config, tables.specs)
    assert loaded.is_final == tables.is_final
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    return True


# ---- chance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bit_flipped_anywhere_in_the_config_is_noticed(strategy, saved, scratch):
    folder, tables = saved[strategy]
    damaged = copy(folder, scratch)
    content = (folder / CONFIG).read_bytes()
    step = 1 if strategy == "hash" else 7
    refused = 0
    for place in range(0, len(content), step):
        changed = bytearray(content)
        changed[place] ^= 1 << (place * 5 % 8)
        (damaged / CONFIG).write_bytes(changed)
        refused += not is_right_or_refused(damaged, tables)
    assert refused > 0.5 * len(content) / step  # blanks between values may change


@pytest.mark.parametrize("strategy", ["hash", "magnitude"])
def test_a_bit_flipped_anywhere_in_the_weights_is_refused(strategy, saved, scratch):
    folder, tables = saved[strategy]
    damaged = copy(folder, scratch)
    file = weights_file(damaged)
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(0, header, 3), *range(header, len(content), 97), len(content) - 1]:
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        assert not is_right_or_refused(damaged, tables)


@pytest.mark.parametrize("which", ["config", "weights"])
def test_files_that_are_cut_or_longer_are_refused(which, saved, scratch):
    folder, tables = saved["hash"]
    damaged = copy(folder, scratch)
    file = damaged / CONFIG if which == "config" else weights_file(damaged)
    content = file.read_bytes()
    for size in [0, 1, 7, 8, 9, *range(10, len(content) - 1, 101), len(content) - 2]:
        file.write_bytes(content[:size])
        assert not is_right_or_refused(damaged, tables)
    file.write_bytes(content + b"x")
    assert not is_right_or_refused(damaged, tables)


def test_files_of_another_checkpoint_are_refused(saved, scratch, tmp_path):
    folder, tables = saved["hash"]
    other = embcomp.save_pretrained(build("hash", seed=1), tmp_path)
    damaged = copy(folder, scratch)
    shutil.copy(weights_file(other), weights_file(damaged))
    assert not is_right_or_refused(damaged, tables)
    damaged = copy(folder, scratch)
    shutil.copy(other / CONFIG, damaged / CONFIG)
    assert not is_right_or_refused(damaged, tables)


def test_a_config_that_is_no_readable_file_is_refused(saved, scratch):
    folder, tables = saved["hash"]
    damaged = copy(folder, scratch)
    (damaged / CONFIG).unlink()
    (damaged / CONFIG).mkdir()
    assert not is_right_or_refused(damaged, tables)
    weights = copy(folder, scratch)
    file = weights_file(weights)
    file.unlink()
    file.mkdir()
    assert not is_right_or_refused(weights, tables)


TEXTS = {
    "nothing": lambda text: "",
    "a number that is none": lambda text: text.replace('"seed": 0', '"seed": NaN'),
    "infinity": lambda text: text.replace('"seed": 0', '"seed": -Infinity'),
    "a seed in other words": lambda text: text.replace('"seed": 0', '"seed": 0.0'),
    "another seed behind the first": lambda text: text.replace('"seed": 0', '"seed": 0, "seed": 1'),
    "two groups lists": lambda text: text.rstrip()[:-1] + ', "groups": []}',
    "deep nesting": lambda text: text.replace('"seed": 0', '"seed": ' + "[" * 100_000 + "]" * 100_000),
    "a deep key": lambda text: text.rstrip()[:-1] + ', "deep": ' + '{"a":' * 100_000 + "1" + "}" * 100_001,
    "a huge number": lambda text: text.replace('"seed": 0', '"seed": ' + "9" * 10_000),
    "half a character": lambda text: text.replace('"seed": 0', '"seed": "\\ud800"'),
    "a mark in front": lambda text: "\ufeff" + text,
    "two values": lambda text: text + text,
    "tables in another order": lambda text: text.replace('"name": "t0"', '"name": "t1"', 1),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_odd_texts_are_refused(text, saved, scratch):
    folder, tables = saved["hash"]
    damaged = copy(folder, scratch)
    changed = text((folder / CONFIG).read_text())
    assert changed != (folder / CONFIG).read_text()
    (damaged / CONFIG).write_text(changed)
    assert not is_right_or_refused(damaged, tables)


def test_the_same_content_in_other_blanks_is_right(saved, scratch):
    folder, tables = saved["hash"]
    damaged = copy(folder, scratch)
    (damaged / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text())))
    assert is_right_or_refused(damaged, tables)


@pytest.mark.parametrize("how", ["another version", "no seal", "an older version", "an older version without one"])
def test_seals_that_are_broken(how, saved, scratch):
    """Only whoever takes the version back and the seal off gets through: to what format 1 has always read."""
    folder, tables = saved["hash"]
    damaged = copy(folder, scratch)
    content = json.loads((folder / CONFIG).read_text())
    if "seal" in how or "without" in how:
        del content[SEAL]
    if "version" in how:
        content["format_version"] = 3 if how == "another version" else 1
    (damaged / CONFIG).write_text(json.dumps(content))
    assert is_right_or_refused(damaged, tables) == (how == "an older version without one")


# ---- intent: the seal is made anew ----------------------------------------------------------------------------------


def places(value, path=()):
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def put(content, path, new):
    changed = json.loads(json.dumps(content))
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if new == "delete":
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return changed


@settings(deadline=2000, max_examples=400)
@given(data=st.data())
def test_values_of_other_types_and_sizes_are_told(data, saved, scratch):
    folder, _ = saved[data.draw(st.sampled_from(STRATEGIES))]
    content = json.loads((folder / CONFIG).read_text())
    del content[SEAL]
    path = data.draw(st.sampled_from(sorted(places(content), key=repr)))
    changed = put(content, path, data.draw(st.sampled_from(("delete", *ODD))))
    damaged = copy(folder, scratch)
    (damaged / CONFIG).write_text(json.dumps(sealed(changed)))
    with contextlib.suppress(embcomp.EmbcompError):  # and nothing else
        embcomp.load_tables(damaged)


class Fused(nn.Module):
    """Two fields in one table, and a weight that two modules share."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(300, 8)
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)
        self.second.weight = self.first.weight


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    torch.manual_seed(0)
    handle = embcomp.compress_(Fused(), "hash", "50%", fused={"table": {"a": 100, "b": 200}}, verbose=False)
    return embcomp.save_pretrained(handle, tmp_path_factory.mktemp("model"))


@settings(deadline=2000, max_examples=200)
@given(data=st.data())
def test_models_take_nothing_that_is_odd(data, saved_model, scratch):
    content = json.loads((saved_model / CONFIG).read_text())
    del content[SEAL]
    found = sorted((p for p in places(content) if p[0] in ("fused", "aliases", "weights") or "prefix" in p), key=repr)
    changed = put(content, data.draw(st.sampled_from(found)), data.draw(st.sampled_from(("delete", *ODD))))
    damaged, model = copy(saved_model, scratch), Fused()
    (damaged / CONFIG).write_text(json.dumps(sealed(changed)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        embcomp.load_pretrained_(model, damaged, verbose=False)
    except embcomp.EmbcompError:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def forged(saved, scratch, strategy, **changes):
    """A checkpoint whose first group's parts are changed, sealed anew."""
    folder, _ = saved[strategy]
    content = json.loads((folder / CONFIG).read_text())
    group = content["groups"][0]
    parts = {"spec": group["specs"][0], "config": group["config"], "weights": content["weights"]}
    for part, values in changes.items():
        parts[part] |= values
    damaged = copy(folder, scratch)
    (damaged / CONFIG).write_text(json.dumps(sealed(content)))
    return damaged


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("hash", {"spec": {"num_embeddings": 10**15}}),
        ("hash", {"spec": {"embedding_dim": 10**15}}),
        ("hash", {"config": {"num_rows": {"t0": 10**15, "t1": 3}}}),
        ("hash", {"config": {"num_hashes": 10**15}}),
        ("unified", {"config": {"sub_tables": 10**9}}),
        ("unified", {"config": {"pool_rows": 10**15}}),
        ("compositional", {"config": {"num_parts": 10**9}}),
        ("nested", {"config": {"tiers": 10**9}}),
        ("nested", {"spec": {"embedding_dim": 10**9}}),
        ("optembed", {"spec": {"num_embeddings": 10**15}}),
        ("magnitude", {"config": {"num_values": 10**15}}),
        ("frequency_cut", {"spec": {"num_embeddings": 10**12}}),
        ("compact", {"spec": {"num_embeddings": 10**15}}),
    ],
)
def test_sizes_that_are_claimed_are_not_allocated(strategy, changes, saved, scratch):
    resource = pytest.importorskip("resource")
    damaged = forged(saved, scratch, strategy, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        embcomp.load_tables(damaged)
        is_loaded = True
    except embcomp.IncompatibleStateError:
        is_loaded = False
    assert is_loaded == (changes == {"spec": {"num_embeddings": 10**15}} and strategy == "hash")  # as many as you like
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB on Linux, B on macOS


@pytest.mark.parametrize(
    "name",
    ["../w.safetensors", "/etc/passwd", "a/../../w.safetensors", "..", "", "w.pt", "x\x00.safetensors", "a\\..\\w.pt"],
)
def test_weights_lie_in_the_folder(name, saved, scratch):
    damaged = forged(saved, scratch, "hash", weights={"file": name})
    with pytest.raises(embcomp.IncompatibleStateError):
        embcomp.load_tables(damaged)


@pytest.mark.parametrize("name", ["pickle", "os.system", "embcomp.io", "Hash", "hash ", "", "__class__"])
def test_only_registered_strategies_are_built(name, saved, scratch):
    damaged = forged(saved, scratch, "hash", config={"strategy": name})
    with pytest.raises(embcomp.IncompatibleStateError, match="can't be built: no strategy"):
        embcomp.load_tables(damaged)


def test_options_that_are_not_known_are_named(saved, scratch):
    with pytest.raises(embcomp.IncompatibleStateError, match="no field 'num_hashs'; did you mean 'num_hashes'"):
        embcomp.load_tables(forged(saved, scratch, "hash", config={"num_hashs": 2}))


# ---- versions -------------------------------------------------------------------------------------------------------


def test_version_1_loads():
    expected = safetensors.torch.load_file(VERSION_1 / "expected_rows.safetensors")
    found = {name: (own, own.materialize(name)) for own in embcomp.load_tables(VERSION_1) for name in own.names}
    assert found.keys() == expected.keys() == {"user", "item", "day"}
    for name, (_, rows) in found.items():
        assert torch.equal(rows, expected[name])
    assert torch.isfinite(found["user"][0](torch.tensor([-5, 2**40]), "user")).all()  # its unseen="hash"


def test_version_1_is_saved_as_the_present_one(tmp_path):
    model = torch.nn.Module()
    model.groups = torch.nn.ModuleList(embcomp.load_tables(VERSION_1))
    embcomp.save_pretrained(model, tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    assert (content["format_version"], content[SEAL]) == (2, sealed(content)[SEAL])
    for old, new in zip(embcomp.load_tables(VERSION_1), embcomp.load_tables(tmp_path), strict=True):
        assert all(torch.equal(old.materialize(name), new.materialize(name)) for name in old.names)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_named(saved, scratch):
    damaged = copy(saved["hash"][0], scratch)
    (damaged / CONFIG).chmod(0)
    with pytest.raises(embcomp.IncompatibleStateError, match="can't be read"):
        embcomp.load_tables(damaged)
