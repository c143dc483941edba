"""Checkpoints that are damaged, foreign, of another version, or do not fit: refused with the reason."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import embcomp
from embcomp import _checkpoint
from embcomp._checkpoint import CONFIG
from tests.checkpoints import Model, compressed, edit, same, tables, weights_file


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
    "from the future": (lambda f: edit(f, format_version=4), "version 4, written by embcomp .*upgrade"),
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
