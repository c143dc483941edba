"""Memory reports: known numbers, and that no byte hides."""

import pytest
import torch
from torch import nn

from embcomp import ConfigError, FullConfig, ReducedDimConfig, TableSpec, build_tables
from embcomp.memory import SHARED, MemoryPart, MemoryReport, format_bytes, sum_reports
from embcomp.strategies.full import FullTables

SPECS = (TableSpec("user", 100, 8), TableSpec("item", 50, 8))


def test_known_numbers_of_plain_tables():
    report = build_tables(SPECS).memory()
    assert report.parts == (
        MemoryPart("user", "rows", 3200, 800, 100, 3200),
        MemoryPart("item", "rows", 1600, 400, 50, 1600),
    )
    assert report.serve_bytes == report.full_bytes == 4800
    assert report.ratio == 1
    assert report.by_table() == {"user": 3200, "item": 1600}
    trained = {"sgd": 9600, "momentum": 14_400, "adagrad": 14_400, "rowwise_adagrad": 10_200, "adam": 19_200}
    assert {optimizer: report.train_bytes(optimizer) for optimizer in trained} == trained


def test_half_precision_serves_half_and_trains_a_float32_copy():
    assert build_tables(SPECS, FullConfig(rows="float16")).memory().serve_bytes == 2400
    assert build_tables(SPECS, FullConfig(rows="float16")).memory().train_bytes("sgd") == 9600
    pure = build_tables(SPECS, FullConfig(rows="float16:pure")).memory()
    assert sum(part.train_bytes for part in pure.parts) == 2400


def test_sparse_gradients_are_not_counted():
    report = build_tables(SPECS, FullConfig(sparse=True)).memory()
    assert report.train_bytes("sgd") == 4800
    assert report.train_bytes("rowwise_adagrad") == 4800 + 4 * 150


def test_finalized_tables_have_nothing_to_train():
    final = build_tables(SPECS, ReducedDimConfig(dim=2)).finalize().memory()
    assert final.train_bytes("adam") == final.serve_bytes


def test_projections_are_counted():
    report = build_tables(SPECS, ReducedDimConfig(dim=2)).memory()
    assert report.by_table() == {"user": 4 * (200 + 16), "item": 4 * (100 + 16)}


class WithHead(FullTables):
    """A strategy with a network of its own, a shared vector, and a buffer that counts for nothing."""

    def __init__(self, specs, config, counts=None):
        super().__init__(specs, config)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        self.shift = nn.Parameter(torch.zeros(3))
        self.register_buffer("codes", torch.zeros(7, dtype=torch.int16))
        self.register_buffer("scratch", torch.zeros(1000), persistent=False)


def test_no_byte_hides_in_child_modules_parameters_and_buffers():
    tables = WithHead(SPECS, FullConfig())
    report = tables.memory()
    assert report.by_table() == {"user": 3200, "item": 1600, SHARED: 4 * (64 + 8 + 64 + 3) + 14}
    assert report.serve_bytes == sum(tensor.nbytes for tensor in tables.state_dict().values())
    trained = sum(p.numel() for p in tables.parameters())
    assert sum(part.train_values for part in report.parts) == trained
    assert report.train_bytes("adam") == report.serve_bytes + 12 * trained


def test_unknown_optimizer():
    with pytest.raises(ConfigError, match=r"optimizer 'adamm' is unknown; did you mean 'adam'\?"):
        build_tables(SPECS).memory().train_bytes("adamm")


def test_reports_add_up():
    one, two = build_tables(SPECS[:1]).memory(), build_tables(SPECS[1:]).memory()
    assert sum_reports([one, two]) == build_tables(SPECS).memory()
    assert sum_reports([]).serve_bytes == 0
    assert "serve 0 B" in str(sum_reports([]))


def test_rows_and_text():
    report = build_tables([TableSpec("a_name_that_is_longer_than_its_column", 300, 8)]).memory()
    assert report.to_rows() == [
        {"table": "a_name_that_is_longer_than_its_column", "part": "rows", "serve_bytes": 9600, "train_bytes": 9600}
    ]
    assert "a_name_that_is_longer_…" in str(report)
    assert "serve 9.38 KiB = 100.00% of 9.38 KiB as float32; train with Adam 37.50 KiB" in str(report)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20, "1.00 MiB"),
        (5 * 2**40, "5.00 TiB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_an_empty_report_is_a_report():
    assert MemoryReport((), 0).by_table() == {}
