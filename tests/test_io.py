"""Checkpoints of tables and of models: they come back bit for bit, and final ones take the bytes reported."""

import json
import struct

import pytest
import safetensors.torch
import torch
from torch import nn

import embcomp
from embcomp._checkpoint import CONFIG
from tests.checkpoints import (
    IDS,
    Extra,
    Model,
    Tied,
    compressed,
    edit,
    of_rows,
    same,
    set_rounding_,
    tables,
    unrounded,
    weights_file,
)


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

    @pytest.mark.parametrize("target", ["plain", "compressed"])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_bug_tied_weights_of_models_on_meta_stay_tied(self, device, target, tmp_path):
        """Each of their names had a parameter of its own after loading, so that training made them differ."""
        model = embcomp.compress_(Tied(), "hash", "50%", verbose=False).model
        embcomp.save_pretrained(model, tmp_path)
        with torch.device(device):
            fresh = Tied()
            if target == "compressed":
                embcomp.compress_(fresh, "hash", "50%", verbose=False)
        fresh.a.weight.requires_grad_(False)
        embcomp.load_pretrained_(fresh, tmp_path, verbose=False)
        assert same(fresh, model)
        assert fresh.a.weight is fresh.b.weight
        assert not fresh.a.weight.requires_grad
        assert fresh.a.bias is not fresh.b.bias
        assert fresh.scratch is fresh.a.mean is fresh.b.mean
        assert not any(tensor.is_meta for tensor in (*fresh.parameters(), *fresh.buffers()))

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_of_weights_that_were_not_tied_the_last_is_that_of_a_tied_model(self, device, tmp_path):
        model = embcomp.compress_(Tied(), "hash", "50%", verbose=False).model
        model.b.weight = nn.Parameter(torch.full((8, 8), 3.0))
        embcomp.save_pretrained(model, tmp_path)
        with torch.device(device):
            fresh = Tied()
        embcomp.load_pretrained_(fresh, tmp_path, verbose=False)
        assert fresh.a.weight is fresh.b.weight
        assert torch.equal(fresh.a.weight, model.b.weight)

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

    @pytest.mark.parametrize(
        "wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))]
    )
    @pytest.mark.parametrize("target", ["plain", "compressed", "wrapped plain", "wrapped compressed"])
    def test_bug_of_wrapped_models_the_model_within_is_saved_and_loaded(self, target, wrap, tmp_path):
        """Names had the prefix of the wrapper, and nothing but a model wrapped alike took them."""
        model = compressed().model
        nn.init.normal_(model.hidden.weight)
        embcomp.save_pretrained(wrap(model), tmp_path)
        fresh = Model() if target.endswith("plain") else compressed().model
        embcomp.load_pretrained_(wrap(fresh) if "wrapped" in target else fresh, tmp_path, verbose=False)
        assert same(fresh, model)
        assert torch.equal(fresh(IDS), model(IDS))

    @pytest.mark.parametrize("way", ["folder", "state", "state of a file"])
    @pytest.mark.parametrize("final", [False, True])
    @pytest.mark.parametrize(
        "deviations", [((0.1, 0.9), (0.9, 0.1)), ((0.1, 0.9), (0.5, 0.5)), ((0.5, 0.5), (0.1, 0.9))]
    )
    @pytest.mark.parametrize("strategy", embcomp.list_strategies())
    def test_bug_tables_that_began_with_other_deviations_take_vectors_over(
        self, strategy, deviations, final, way, tmp_path
    ):
        """`unified` kept scales of its own, which are no weights, so that vectors were others without a word."""

        def specs(*std):
            return [embcomp.TableSpec(f"t{i}", 50, 8, init_std=own) for i, own in enumerate(std)]

        budget = {"full": None, "mixed_dim": "100%"}.get(strategy, "60%")
        config = embcomp.plan(specs(0.1, 0.9), strategy, budget).config
        model, other = (nn.ModuleDict({"tables": embcomp.build_tables(specs(*std), config)}) for std in deviations)
        ids = torch.stack([torch.arange(9), torch.arange(9)], 1)
        if final:
            model["tables"].finalize_(), other["tables"].finalize_()
        if way == "folder":
            embcomp.save_pretrained(model, tmp_path)
            embcomp.load_pretrained_(other, tmp_path, verbose=False)
            assert other["tables"].specs == model["tables"].specs
        elif way == "state":
            other.load_state_dict(model.state_dict())
        else:
            torch.save(model.state_dict(), tmp_path / "state.pt")
            other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(other["tables"](ids), model["tables"](ids))
        embcomp.save_pretrained(other["tables"], tmp_path / "again")
        assert torch.equal(embcomp.from_pretrained(tmp_path / "again")(ids), model["tables"](ids))

    def test_bug_dynamic_rows_begin_as_in_the_tables_that_were_saved(self, tmp_path):
        """New residents of a model loaded into a compressed one were drawn with that one's deviations."""

        def made(std):
            config = embcomp.DynamicConfig(num_slots={"a": 4}, num_fallback={"a": 2}, unseen="hash", interval=1)
            return nn.ModuleDict(
                {"tables": embcomp.build_tables([embcomp.TableSpec("a", 50, 8, init_std=std)], config)}
            )

        def went_on(model):
            model["tables"](torch.arange(4)).sum().backward()
            model["tables"].step_()
            return model["tables"].state_dict()

        model, other = made(0.3), made(0.7)
        embcomp.save_pretrained(model, tmp_path)
        embcomp.load_pretrained_(other, tmp_path, verbose=False)
        mine, others = went_on(model), went_on(other)
        assert all(torch.equal(mine[name], others[name]) for name in mine)

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
