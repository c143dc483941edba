"""Checkpoints: bit-exact, of the reported size, whole at every moment, and refused with a reason when they are not."""

import copy
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import embcomp
from embcomp import _checkpoint
from embcomp._checkpoint import CONFIG
from embcomp.integrations.export.files import whole_file
from embcomp.storage import RowStore

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.tensor([1, 5, 0, 19])


class Model(nn.Module):
    def __init__(self, items=300, hidden=5):
        super().__init__()
        torch.manual_seed(0)
        self.user = nn.Embedding(200, 8, padding_idx=0)
        self.item = nn.Embedding(items, 8)
        self.wide = nn.EmbeddingBag(100, 1, mode="sum")
        self.fused = nn.Embedding(30, 8)
        self.hidden = nn.Linear(8, hidden)
        self.out = nn.Linear(8, items)
        self.out.weight = self.item.weight
        self.again = self.hidden
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids):
        vectors = self.user(ids) + self.item(ids) + self.fused(ids) + self.wide(ids[:, None])
        return self.out(vectors).sum(1, keepdim=True) + self.again(vectors)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


FUSED = {"fused": {"a": 10, "b": 20}}


def compressed(strategy="hash", budget="50%", **options):
    model = Model(**options)
    return embcomp.compress_(model, strategy, budget, fused=FUSED, verbose=False)


def of_rows(rows, is_rounding):
    """A compressed model, trained as far as its spans are of odd sizes."""
    torch.manual_seed(1)
    model = compressed(embcomp.HashConfig(rows=rows)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 0.1 * torch.rand_like(parameter))
    return set_rounding_(model, is_rounding)


def set_rounding_(model, enabled):
    for group in model.embcomp_tables:
        group.set_rounding_(enabled)
    return model


def unrounded(model):
    return [name for name, module in model.named_modules() if isinstance(module, RowStore) and module.is_unrounded]


def tables(strategy="hash", budget="50%", *sizes):
    return embcomp.build_tables(
        [embcomp.TableSpec(f"t{i}", n, 8) for i, n in enumerate(sizes or (500, 3))], strategy, budget
    )


def weights_file(folder):
    (file,) = folder.glob("model-*.safetensors")
    return file


def edit(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(_checkpoint.sealed(json.loads(file.read_text()) | changes)))


def own_name(content):
    """The name that weights of such content have."""
    return f"model-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"


def grow_old(path, age=2 * _checkpoint.LEFT_OVER):
    os.utime(path, (time.time() - age,) * 2)


def made(path, content, age=2 * _checkpoint.LEFT_OVER):
    """A file that was last touched so many seconds ago, as was its folder if that was made for it."""
    is_new = not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    grow_old(path, age)
    if is_new:
        grow_old(path.parent, age)
    return path


def same(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def is_saved_until(step, group, folder, monkeypatch):
    """Save in a process that dies at a step of all that it does to files; whether it came to the end before."""
    steps = iter(range(100))

    def dying(act):
        def run(*args, **kwargs):
            if next(steps) == step:
                raise KeyboardInterrupt
            return act(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for module, name in [
            (_checkpoint.safetensors.torch, "save_file"),
            (_checkpoint.os, "replace"),
            (_checkpoint.os, "fsync"),
            (_checkpoint, "_digest"),
            (_checkpoint.Path, "write_text"),
            (_checkpoint.Path, "unlink"),
            (_checkpoint, "_remove_older"),
        ]:
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            embcomp.save_pretrained(group, folder)
        except KeyboardInterrupt:
            return False
    return True


def before(name, act, monkeypatch):
    """Do something before every step of loading that has such a name."""
    module = _checkpoint if hasattr(_checkpoint, name) else _checkpoint.safetensors.torch
    load = getattr(module, name)

    def run(*args):
        act()
        return load(*args)

    monkeypatch.setattr(module, name, run)


class TestTables:
    @pytest.mark.parametrize("final", [False, True])
    @pytest.mark.parametrize("strategy", embcomp.list_strategies())
    def test_come_back_bit_for_bit_and_final_ones_take_the_bytes_reported(self, strategy, final, tmp_path):
        group = tables(strategy, "50%" if strategy != "full" else None)
        group = group.finalize() if final else group
        embcomp.save_pretrained(group, tmp_path / "new" / "folder")
        loaded = embcomp.from_pretrained(tmp_path / "new" / "folder")
        assert (type(loaded), loaded.config, loaded.specs) == (type(group), group.config, group.specs)
        assert (loaded.is_final, loaded.training) == (final, not final)
        assert same(loaded, group)
        ids = torch.stack([torch.arange(3), torch.arange(3)], 1)
        assert torch.equal(loaded(ids), group(ids))
        if final:
            file = weights_file(tmp_path / "new" / "folder")
            (header,) = struct.unpack("<Q", file.read_bytes()[:8])
            assert file.stat().st_size - 8 - header == group.memory().serve_bytes
        else:
            loaded(ids).sum().backward()
            with torch.no_grad():
                next(loaded.parameters()).add_(1.0)  # its memory is its own, not the file's
            assert same(embcomp.from_pretrained(tmp_path / "new" / "folder"), group)

    @pytest.mark.parametrize("final", [False, True])
    @pytest.mark.parametrize(
        "rows", ["float16", "bfloat16:pure", "int8", "int4:row:after", "int3:table", "int1:group7"]
    )
    def test_every_row_format_comes_back(self, rows, final, tmp_path):
        group = tables(embcomp.make_config("full", rows=rows), None)
        group = group.finalize() if final else group
        embcomp.save_pretrained(group, tmp_path)
        loaded = embcomp.from_pretrained(tmp_path)
        assert same(loaded, group)
        assert torch.equal(loaded(IDS, "t0"), group(IDS, "t0"))

    def test_several_groups(self, tmp_path):
        handle = compressed()
        embcomp.save_pretrained(handle, tmp_path)
        loaded = embcomp.load_tables(tmp_path)
        assert [group.names for group in loaded] == [group.names for group in handle.tables]
        assert all(same(mine, theirs) for mine, theirs in zip(loaded, handle.tables, strict=True))
        with pytest.raises(embcomp.IncompatibleStateError, match=r"2 groups.*load_tables"):
            embcomp.from_pretrained(tmp_path)

    def test_frozen_ones_stay_frozen(self, tmp_path):
        embcomp.save_pretrained(tables().requires_grad_(False), tmp_path)
        assert not any(p.requires_grad for p in embcomp.from_pretrained(tmp_path).parameters())


class TestModels:
    @pytest.mark.parametrize("final", [False, True])
    @pytest.mark.parametrize("strategy", ["hash", "reduced_dim"])
    def test_a_plain_model_becomes_the_saved_one(self, strategy, final, tmp_path, capsys):
        handle = compressed(strategy)
        model = handle.finalize_().model if final else handle.model
        nn.init.normal_(model.hidden.weight)
        model.steps += 1
        embcomp.save_pretrained(model, tmp_path)
        assert capsys.readouterr().out == ""
        fresh = Model()
        loaded = embcomp.load_pretrained_(fresh, tmp_path)
        assert loaded.model is fresh
        assert "fused.a" in capsys.readouterr().out
        assert same(fresh, model)
        assert torch.equal(fresh(IDS), model(IDS))
        assert [group.is_final for group in loaded.tables] == [final] * 2
        assert fresh.again is fresh.hidden

    @pytest.mark.parametrize("final", [False, True])
    def test_a_compressed_model_takes_the_weights(self, final, tmp_path):
        model = compressed().model
        nn.init.normal_(model.hidden.weight)
        embcomp.save_pretrained(embcomp.finalize_(model) if final else model, tmp_path)
        other = compressed().model
        embcomp.load_pretrained_(other, tmp_path, verbose=False)
        assert same(other, model)
        assert torch.equal(other(IDS), model(IDS))

    def test_a_model_on_meta_is_filled(self, tmp_path):
        model = compressed().model
        embcomp.save_pretrained(model, tmp_path)
        with torch.device("meta"):
            fresh = Model()
        embcomp.load_pretrained_(fresh, tmp_path, verbose=False)
        assert torch.equal(fresh(IDS), model(IDS))

    @pytest.mark.parametrize("rows", ["int4:column", "int4:row", "float16", "int4:column:after"])
    @pytest.mark.parametrize("target", ["plain", "compressed", "switched off"])
    @pytest.mark.parametrize("is_rounding", [False, True])
    def test_bug_rounding_that_was_switched_off_stays_off(self, is_rounding, target, rows, tmp_path):
        """It was on again after loading, so that training went on otherwise, without a word."""
        model = of_rows(rows, is_rounding)
        embcomp.save_pretrained(model, tmp_path)
        other = Model() if target == "plain" else of_rows(rows, target != "switched off")
        embcomp.load_pretrained_(other, tmp_path, verbose=False)
        assert unrounded(other) == unrounded(model)
        assert bool(unrounded(model)) == (not is_rounding and not rows.endswith("after"))
        assert torch.equal(other(IDS), model(IDS))
        assert same(set_rounding_(other, True), set_rounding_(model, True))  # scales too, which are fitted now
        assert torch.equal(other(IDS), model(IDS))

    @pytest.mark.parametrize("is_rounding", [False, True])
    def test_checkpoints_that_do_not_tell_of_rounding_leave_it_as_it_is(self, is_rounding, tmp_path):
        embcomp.save_pretrained(of_rows("int4:column", False), tmp_path)
        groups = json.loads((tmp_path / CONFIG).read_text())["groups"]
        edit(tmp_path, groups=[{key: value for key, value in group.items() if key != "unrounded"} for group in groups])
        other, expected = of_rows("int4:column", is_rounding), unrounded(of_rows("int4:column", is_rounding))
        assert unrounded(embcomp.load_pretrained_(other, tmp_path, verbose=False).model) == expected
        assert not unrounded(embcomp.load_pretrained_(Model(), tmp_path, verbose=False).model)

    @pytest.mark.parametrize(
        "make", [lambda: nn.Embedding(50, 4), lambda: nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 1))]
    )
    def test_roots_that_are_tables_or_containers(self, make, tmp_path):
        model = embcomp.compress_(make(), "hash", "50%", verbose=False).model
        embcomp.save_pretrained(model, tmp_path)
        fresh = embcomp.load_pretrained_(make(), tmp_path, verbose=False).model
        assert torch.equal(fresh(IDS), model(IDS))

    def test_memory_that_is_shared_is_saved_once(self, tmp_path):
        embcomp.save_pretrained(compressed().model, tmp_path)
        saved = safetensors.torch.load_file(weights_file(tmp_path))
        assert "hidden.weight" in saved
        assert "again.weight" not in saved

    @pytest.mark.parametrize("what", ["meta", "object"])
    def test_what_cannot_be_saved_is_named(self, what, tmp_path):
        model = compressed().model
        if what == "meta":
            model.steps = torch.empty(3, device="meta")
        else:
            model.hidden = Extra(8, 5)
        with pytest.raises(
            embcomp.IncompatibleStateError, match=r"steps" if what == "meta" else r"hidden\._extra_state"
        ):
            embcomp.save_pretrained(model, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_model_without_tables_is_not_saved(self, tmp_path):
        with pytest.raises(embcomp.NoMatchingTableError, match="compress_ first"):
            embcomp.save_pretrained(Model(), tmp_path)


class TestFolder:
    def test_holds_three_files_and_the_card_says_the_bytes(self, tmp_path):
        handle = compressed()
        embcomp.save_pretrained(handle.finalize_(), tmp_path)
        names = sorted(file.name for file in tmp_path.iterdir())
        assert names == ["README.md", CONFIG, weights_file(tmp_path).name]
        card = (tmp_path / "README.md").read_text()
        assert f"{handle.memory().serve_bytes} B" in card
        assert "| user | 200 | 8 | hash |" in card

    def test_saving_again_replaces_ones_own_files_and_touches_no_others(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "README.md").write_text("my own text")
        old, new = tables(), tables(budget="20%")
        embcomp.save_pretrained(old, tmp_path)
        embcomp.save_pretrained(new, tmp_path)
        assert same(embcomp.from_pretrained(tmp_path), new)
        assert {file.name for file in tmp_path.iterdir()} == {
            "notes.txt",
            "README.md",
            CONFIG,
            weights_file(tmp_path).name,
        }
        assert (tmp_path / "README.md").read_text() == "my own text"

    def test_what_killed_saves_and_exports_left_is_removed_once_it_is_old(self, tmp_path):
        with whole_file(tmp_path / "x.pt2", ".pt2", overwrite=False) as file:
            file.touch()
        names = [".embcomp-1-0123abcd", own_name("old"), f"{file.parent.name}/x.pt2"]
        left = [made(tmp_path / name, "old") for name in names]
        young = [made(tmp_path / name, "young", age=0) for name in (own_name("young"), ".embcomp-2-0123abcd")]
        running = made(tmp_path / ".embcomp-export-12345678" / "x.pt2", "young", age=0)
        grow_old(running.parent)
        embcomp.save_pretrained(tables(), tmp_path)
        assert not any(path.exists() or (path.parent != tmp_path and path.parent.exists()) for path in left)
        assert all(path.exists() for path in [*young, running])

    @pytest.mark.parametrize(
        "name",
        [
            "model-checkpoint-00001.safetensors",
            "model-final_2024-01-02.safetensors",
            f"model-{'0' * 16}.safetensors",
            own_name("foreign").upper().replace("MODEL", "model").replace("SAFETENSORS", "safetensors"),
            ".embcomp-notes",
            ".embcomp-settings/notes",
            ".embcomp-export-notes/notes",
        ],
    )
    def test_bug_files_of_other_origin_are_never_removed(self, name, tmp_path):
        """Weights whose names have 16 other characters where ours have a digest were removed when they were old."""
        foreign = made(tmp_path / name, "foreign")
        grow_old(foreign.parent)
        for budget in ("50%", "20%"):
            embcomp.save_pretrained(tables(budget=budget), tmp_path)
        assert foreign.read_text() == "foreign"

    @pytest.mark.parametrize("name", ["unlink", "iterdir"])
    def test_bug_what_cannot_be_cleaned_fails_no_save(self, name, tmp_path, monkeypatch, caplog):
        """The folder that a killed export left failed every save: it was taken for a file, and there was no room."""
        embcomp.save_pretrained(tables(), tmp_path)
        made(tmp_path / ".embcomp-abcd1234" / "x.pt2", "half")
        grow_old(tmp_path / ".embcomp-abcd1234")
        new, act = tables(budget="20%"), getattr(Path, name)

        def failing(path, *args, **kwargs):
            if path == tmp_path or path.name.startswith("model-"):
                raise PermissionError("not yours")
            return act(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, failing)
        embcomp.save_pretrained(new, tmp_path)
        monkeypatch.undo()
        assert "not yours" in caplog.text
        assert same(embcomp.from_pretrained(tmp_path), new)

    @pytest.mark.parametrize("step", range(20))
    def test_a_save_that_dies_at_any_step_leaves_the_old_or_the_new(self, step, tmp_path, monkeypatch):
        old, new = tables(), tables(budget="20%")
        embcomp.save_pretrained(old, tmp_path)
        done = is_saved_until(step, new, tmp_path, monkeypatch)
        loaded = embcomp.from_pretrained(tmp_path)
        assert same(loaded, new) or (same(loaded, old) and not done)
        assert not list(tmp_path.glob(f"{_checkpoint.TEMPORARY}*"))
        assert done == (step >= 18)

    @pytest.mark.parametrize("step", range(18))
    def test_bug_no_card_speaks_of_another_checkpoint(self, step, tmp_path, monkeypatch):
        """One that died between the config and the card left the new checkpoint with the bytes of the old one."""
        cards = {}
        for budget in ("50%", "20%"):
            folder = embcomp.save_pretrained(tables(budget=budget), tmp_path / budget)
            cards[(folder / CONFIG).read_text()] = (folder / "README.md").read_text()
        is_saved_until(step, tables(budget="20%"), tmp_path / "50%", monkeypatch)
        card = tmp_path / "50%" / "README.md"
        assert not card.exists() or card.read_text() == cards[(tmp_path / "50%" / CONFIG).read_text()]
        embcomp.save_pretrained(tables(budget="20%"), tmp_path / "50%")
        assert card.read_text() == (tmp_path / "20%" / "README.md").read_text()

    @pytest.mark.parametrize("what", ["folder", "link"])
    def test_bug_a_readme_that_is_no_file_is_left_alone(self, what, tmp_path):
        """A folder of that name was an error after the checkpoint was written, and a link was written over."""
        file = tmp_path / "README.md"
        if what == "folder":
            file.mkdir()
        else:
            file.symlink_to("nowhere")
        embcomp.save_pretrained(tables(), tmp_path)
        assert file.is_dir() if what == "folder" else file.is_symlink()
        assert same(embcomp.from_pretrained(tmp_path), tables())

    @pytest.mark.parametrize("where", ["_check_weights", "load_file"])
    @pytest.mark.parametrize("saves", [["new"], ["new old"], ["new", "old"]])
    def test_bug_one_can_load_while_another_saves(self, saves, where, tmp_path, monkeypatch):
        """Weights that a save removed between config and weights were told to be missing, or no safetensors file."""
        made = {"old": tables(), "new": tables(budget="20%")}
        embcomp.save_pretrained(made["old"], tmp_path)
        left = saves.copy()

        def saving():
            for name in left.pop(0).split() if left else ():
                embcomp.save_pretrained(made[name], tmp_path)

        before(where, saving, monkeypatch)
        assert same(embcomp.from_pretrained(tmp_path), made[saves[-1].split()[-1]])
        assert not left

    def test_loading_gives_up_where_weights_are_never_there(self, tmp_path, monkeypatch):
        made, calls = [tables(), tables(budget="20%")], []
        embcomp.save_pretrained(made[0], tmp_path)

        def saving():
            calls.append(1)
            embcomp.save_pretrained(made[len(calls) % 2], tmp_path)

        before("_check_weights", saving, monkeypatch)
        with pytest.raises(embcomp.IncompatibleStateError, match=r"model-\w+\.safetensors is missing"):
            embcomp.from_pretrained(tmp_path)
        assert len(calls) == _checkpoint._READS

    def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_the_old(self, tmp_path, full_disk):
        old = tables()
        embcomp.save_pretrained(old, tmp_path)
        with full_disk(), pytest.raises(embcomp.WriteError, match=r"can't be written .*make room") as raised:
            embcomp.save_pretrained(tables(budget="20%"), tmp_path)
        assert str(tmp_path) in str(raised.value)
        assert isinstance(raised.value, OSError)
        assert same(embcomp.from_pretrained(tmp_path), old)
        assert not list(tmp_path.glob(f"{_checkpoint.TEMPORARY}*"))
        (tmp_path / "file").touch()
        with pytest.raises(embcomp.WriteError, match="can't be written"):
            embcomp.save_pretrained(old, tmp_path / "file" / "folder")

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
    def test_a_killed_process_leaves_a_whole_checkpoint(self, tmp_path):
        code = """
            import sys, embcomp
            made = [embcomp.build_tables([embcomp.TableSpec("t", n, 64)], "full") for n in (20_000, 30_000)]
            while True:
                for tables in made:
                    embcomp.save_pretrained(tables, sys.argv[1])
                    print("saved", flush=True)
        """
        for wait in (0.0, 0.013, 0.05):
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout.readline() == "saved\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
            assert embcomp.from_pretrained(tmp_path).specs[0].num_embeddings in (20_000, 30_000)


def truncate(folder):
    file = weights_file(folder)
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(folder):
    file = weights_file(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def replace_weights(folder, content):
    file = weights_file(folder)
    file.write_bytes(content)
    named = {"file": file.name, "bytes": len(content), "sha256": _checkpoint._digest(file)}
    edit(folder, weights=named)


def change_weights(folder, **tensors):
    saved = safetensors.torch.load_file(weights_file(folder)) | tensors
    replace_weights(folder, safetensors.torch.save({name: t for name, t in saved.items() if t is not None}))


def change_group(folder, **changes):
    groups = json.loads((folder / CONFIG).read_text())["groups"]
    edit(folder, groups=[groups[0] | changes])


DAMAGES = {
    "config missing": (lambda f: (f / CONFIG).unlink(), rf"{CONFIG} does not exist.*save_pretrained"),
    "config not JSON": (lambda f: (f / CONFIG).write_text("{'a'"), "is not JSON"),
    "config binary": (lambda f: (f / CONFIG).write_bytes(b"\x80\x81"), "is not JSON"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), "is foreign"),
    "config foreign": (lambda f: (f / CONFIG).write_text('{"model_type": "bert"}'), "is foreign"),
    "from the future": (lambda f: edit(f, format_version=3), "version 3, written by embcomp .*upgrade"),
    "no version": (lambda f: edit(f, format_version="1"), "'format_version' must be a int, found '1'"),
    "no groups": (lambda f: edit(f, groups=None), "'groups' must be a list, found None"),
    "empty groups": (lambda f: edit(f, groups=[]), "no group"),
    "weights missing": (lambda f: weights_file(f).unlink(), r"model-\w+\.safetensors is missing"),
    "weights elsewhere": (lambda f: edit(f, weights={"file": "../x.safetensors"}), "of the folder"),
    "truncated": (truncate, r"truncated.*expected \d+ B"),
    "bit flipped": (flip_a_bit, "is corrupt: its SHA-256"),
    "not safetensors": (lambda f: replace_weights(f, b"pickle"), "is not a safetensors file"),
    "unknown strategy": (
        lambda f: change_group(f, config={"strategy": "hsh", "version": 1}),
        "no strategy 'hsh'; did you mean 'hash'",
    ),
    "config field unknown": (
        lambda f: change_group(f, config={"strategy": "full", "version": 1, "x": 1}),
        "no field 'x'",
    ),
    "spec impossible": (
        lambda f: change_group(f, specs=[{"name": "t0", "num_embeddings": 0, "embedding_dim": 8}]),
        "num_embeddings=0",
    ),
    "spec field unknown": (lambda f: change_group(f, specs=[{"name": "t0", "x": 1}]), "can't be built"),
    "rounding of no store": (
        lambda f: change_group(f, unrounded=["row"]),
        r"must be some of \['rows'\], found \['row'\]",
    ),
    "rounding of odd type": (lambda f: change_group(f, unrounded=False), "'unrounded' must be a list, found False"),
    "rounding of an object": (lambda f: change_group(f, unrounded=[{}]), r"must be some of"),
    "tensor missing": (lambda f: change_weights(f, **{"rows.weight": None}), r"lacks 'rows\.weight'"),
    "tensor too much": (lambda f: change_weights(f, x=torch.ones(1)), "has besides 'x'"),
    "tensor of another shape": (
        lambda f: change_weights(f, **{"rows.weight": torch.ones(2, 8)}),
        r"'rows\.weight' is torch\.float32 \(2, 8\), expected torch\.float32 \(503, 8\)",
    ),
    "tensor of another dtype": (
        lambda f: change_weights(f, **{"rows.weight": torch.ones(503, 8, dtype=torch.float16)}),
        r"is torch\.float16 .*expected torch\.float32",
    ),
}


class TestRefuses:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damage(self, damage, tmp_path):
        act, message = DAMAGES[damage]
        embcomp.save_pretrained(tables("full", None), tmp_path)
        act(tmp_path)
        with pytest.raises(embcomp.IncompatibleStateError, match=message) as caught:
            embcomp.from_pretrained(tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_no_folder(self, tmp_path):
        for folder in (tmp_path / "none", Path(__file__)):
            with pytest.raises(embcomp.IncompatibleStateError, match="does not exist"):
                embcomp.load_tables(folder)

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (lambda: Model(items=301), r"table 'item' is 300 x 8, in the model 301 x 8"),
            (lambda: Model(hidden=6), r"'hidden\.weight' is torch\.float32 \(5, 8\), expected torch\.float32 \(6, 8\)"),
            (lambda: nn.Linear(2, 2), "does not fit the model"),
            (lambda: nn.Module(), "does not fit the model"),
            (lambda: compressed("reduced_dim").model, r"another strategy.*strategy 'hash', in the model 'reduced_dim'"),
            (lambda: compressed(budget="40%").model, r"other sizes"),
            (lambda: compressed(items=301).model, r"other sizes|301"),
            (lambda: compressed().finalize_().model, "training form"),
            (lambda: nn.Sequential(compressed().model), "has groups"),
        ],
    )
    def test_models_that_do_not_fit_and_leaves_them_as_they_were(self, target, message, tmp_path):
        embcomp.save_pretrained(compressed().model, tmp_path)
        model = target()
        before = copy.deepcopy(model)
        with pytest.raises(embcomp.IncompatibleStateError, match=message) as caught:
            embcomp.load_pretrained_(model, tmp_path, verbose=False)
        assert str(tmp_path) in str(caught.value)
        assert same(model, before)
        assert repr(model) == repr(before)

    def test_a_model_with_weights_of_its_own_beside_the_tables(self, tmp_path):
        embcomp.save_pretrained(compressed().model, tmp_path)
        model = Model()
        model.extra, model.steps = nn.Linear(1, 1), None
        with pytest.raises(
            embcomp.IncompatibleStateError, match=r"lacks 'extra\.bias', 'extra\.weight' and has besides"
        ):
            embcomp.load_pretrained_(model, tmp_path, verbose=False)
        assert isinstance(model.user, nn.Embedding)

    def test_tables_saved_alone_are_no_model(self, tmp_path):
        embcomp.save_pretrained(embcomp.build_tables([embcomp.TableSpec("user", 200, 8, 0)], "full"), tmp_path)
        with pytest.raises(embcomp.IncompatibleStateError, match="load_tables"):
            embcomp.load_pretrained_(Model(), tmp_path, verbose=False)
