"""Tables cut into pieces: whichever way they are cut, stacked and asked for, each id keeps its piece's vector."""

from dataclasses import dataclass

import pytest
import torch

from embcomp import ConfigError, FullConfig, StrategyConfig, TableSpec
from embcomp import config as registry
from embcomp.config import register_strategy
from embcomp.mixed import MixedTables, Piece
from embcomp.strategies._projected import ProjectedConfig, ProjectedTables
from embcomp.strategies.full import FullTables
from embcomp.testing import (
    check_bags,
    check_bytes,
    check_compile,
    check_config,
    check_export,
    check_finalize,
    check_padding,
    check_table_argument,
    check_unseen_error,
    check_unseen_hash,
    check_unseen_oov_row,
    check_unseen_zero,
)

WIDE = (FullTables, FullConfig())
NARROW = (ProjectedTables, ProjectedConfig(dim=2))
NARROWER = (ProjectedTables, ProjectedConfig(dim=1))


@dataclass(frozen=True)
class CutConfig(StrategyConfig):
    """How tables are cut.

    Attributes:
        how: name of a way.
    """

    how: str = "heads"


class CutTables(MixedTables):
    """Heads of tables wide, tails narrow, and other ways to cut."""

    def pieces(self):
        sizes = self.num_ids
        if self.config.how == "heads":
            cuts = [(t, 0, n // 3, WIDE) for t, n in enumerate(sizes) if n > 20]
            cuts += [(t, n // 3 if n > 20 else 0, n, NARROW) for t, n in enumerate(sizes)]
        elif self.config.how == "backwards":
            cuts = [(t, 0, n, WIDE) for t, n in reversed(list(enumerate(sizes)))]
        elif self.config.how == "alternating":
            cuts = [(t, 0, n, NARROW if t % 2 else WIDE) for t, n in enumerate(sizes)]
        else:
            cuts = [(0, 100, 200, NARROW), (0, 200, sizes[0], NARROWER), (0, 0, 100, WIDE)]
            cuts += [(t, 0, n, NARROWER) for t, n in reversed(list(enumerate(sizes))) if t]
        return [Piece(table, start, stop, *kind) for table, start, stop, kind in cuts]

    @classmethod
    def size_range(cls, specs, config, known):
        return 1, 1

    @classmethod
    def resize(cls, specs, config, size, known):
        return config


WAYS = pytest.mark.parametrize("how", ["heads", "backwards", "alternating", "thirds"])


@pytest.fixture(autouse=True)
def cut_strategy(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_strategy("cut", CutConfig)(CutTables)


def build(how: str, unseen: str = "error") -> CutTables:
    specs = [TableSpec("user", 300, 6), TableSpec("flag", 2, 6), TableSpec("item", 50, 6, 0), TableSpec("genre", 7, 6)]
    return CutTables(specs, CutConfig(how=how, unseen=unseen))


def reference(tables: CutTables, table: int, number: int) -> torch.Tensor:
    """The vector of one id, by looking for its piece."""
    pieces = sorted(tables.pieces(), key=lambda piece: (piece.table, piece.start))
    (found,) = [p for p in pieces if p.table == table and p.start <= number < p.stop]
    kind = (found.tables_class, found.config)
    (part,) = [p for p in tables.parts if (type(p), p.config) == kind]
    own = [p for p in pieces if (p.tables_class, p.config) == kind]
    vector = part(torch.tensor(number - found.start), own.index(found))
    return torch.zeros_like(vector) if tables.specs[table].padding_idx == number else vector


@WAYS
def test_every_id_has_the_vector_of_its_piece(how):
    tables = build(how)
    for table, spec in enumerate(tables.specs):
        for number in {0, 1, spec.num_embeddings - 1} | (
            {16, 99, 100, 199, 200} if spec.num_embeddings > 200 else set()
        ):
            wanted = reference(tables, table, number)
            assert torch.allclose(tables(torch.tensor(number), table), wanted)
            column = torch.zeros(3, 4, dtype=torch.long)
            column[1, table] = number
            assert torch.allclose(tables(column)[1, table], wanted)
            assert torch.allclose(tables(torch.tensor([number]), torch.tensor([table]))[0], wanted)


@WAYS
def test_pieces_train_alone(how):
    """A step on one id leaves the vectors of all ids that lie in other pieces as they were."""
    tables = build(how)
    before = tables.materialize("user").detach().clone()
    tables(torch.tensor([1]), "user").sum().backward()
    with torch.no_grad():
        for parameter in tables.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    changed = (tables.materialize("user") != before).any(1).nonzero().flatten().tolist()
    (piece,) = [p for p in tables.pieces() if p.table == 0 and p.start <= 1 < p.stop]
    assert 1 in changed
    assert set(changed) <= set(range(piece.start, piece.stop))


@WAYS
@pytest.mark.parametrize(
    "check",
    [
        check_table_argument,
        check_bags,
        check_padding,
        check_bytes,
        check_finalize,
        check_config,
        check_unseen_error,
        check_unseen_hash,
        check_unseen_oov_row,
        check_unseen_zero,
    ],
    ids=lambda check: check.__name__,
)
def test_contract(check, how):
    check(CutConfig(how=how))


@pytest.mark.parametrize("check", [check_compile, check_export], ids=lambda check: check.__name__)
def test_graphs(check):
    check(CutConfig(how="heads"))


def test_pieces_kept_alike_share_one_module():
    assert len(build("heads").parts) == 2
    assert len(build("backwards").parts) == 1
    assert len(build("thirds").parts) == 3


def test_configs_of_pieces_may_hold_dicts():
    @dataclass(frozen=True)
    class NamedConfig(FullConfig):
        sizes: dict[str, int] | None = None

    class NamedTables(CutTables):
        def pieces(self):
            return [Piece(t, 0, 5, FullTables, NamedConfig(sizes={"user": 1, "item": 2})) for t in range(2)]

    tables = NamedTables([TableSpec("user", 5, 6), TableSpec("item", 5, 6)], CutConfig())
    assert len(tables.parts) == 1


def test_bytes_stand_under_the_table_that_they_belong_to():
    report = build("heads").memory()
    assert set(report.by_table()) == {"user", "flag", "item", "genre"}
    user = [(part.name, part.serve_bytes) for part in report.parts if part.table == "user"]
    assert user == [("rows[0:100]", 2400), ("rows[100:300]", 1600), ("projection[100:300]", 48)]


def test_two_pieces_of_one_table_are_not_kept_alike():
    class Twice(CutTables):
        def pieces(self):
            return [Piece(0, 0, 100, *WIDE), Piece(0, 100, 300, *WIDE)]

    with pytest.raises(ConfigError, match=r"Twice.pieces: two pieces of one table"):
        Twice([TableSpec("user", 300, 6)], CutConfig())
