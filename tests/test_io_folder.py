"""The folder of a checkpoint: whole at every moment, its files its own, its card true, while others save and load."""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import embcomp
from embcomp import _checkpoint
from embcomp._checkpoint import CONFIG
from embcomp.integrations.export import export_fbgemm
from embcomp.integrations.export.files import whole_file
from tests.checkpoints import ROOT, compressed, same, tables, weights_file


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


class TestFolder:
    def test_holds_three_files_and_the_card_says_the_bytes(self, tmp_path):
        handle = compressed()
        embcomp.save_pretrained(handle.finalize_(), tmp_path)
        names = sorted(file.name for file in tmp_path.iterdir())
        assert names == ["README.md", CONFIG, weights_file(tmp_path).name]
        card = (tmp_path / "README.md").read_text()
        assert f"{handle.memory().serve_bytes} B" in card
        assert "| user | 200 | 8 | hash |" in card

    @pytest.mark.skipif(os.name != "posix", reason="needs modes of files as on Linux and macOS")
    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_bug_whoever_can_read_the_config_can_read_the_weights(self, mask, tmp_path):
        """safetensors lets the owner alone read what it writes: one user could not serve what another had trained."""
        before = os.umask(mask)
        try:
            embcomp.save_pretrained(tables(), tmp_path)
            final = embcomp.build_tables(
                [embcomp.TableSpec("a", 20, 8)], embcomp.QuantizeConfig(bits=8, granularity="row")
            )
            if importlib.util.find_spec("fbgemm_gpu"):
                export_fbgemm(final.finalize(), tmp_path / "a.safetensors")
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~mask}

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
