"""``quantize``: bits by budget, bytes by hand, and rounding against a written-out grid."""

import pytest
import torch

from embcomp import ConfigError, QuantizeConfig, TableSpec, build_tables, plan
from embcomp.strategies.quantize import BITS

SPECS = [TableSpec("item", 4000, 16), TableSpec("gender", 2, 16)]


def test_bytes_are_codes_and_one_step_per_column():
    report = plan(SPECS, QuantizeConfig(bits=4, granularity="column")).report
    assert report.by_table()["item"] == 4000 * 16 * 4 // 8 + 16 * 4
    assert report.by_table()["gender"] == 2 * 16 * 4 // 8 + 16 * 4


def test_a_table_whose_steps_cost_more_than_they_save_stays_float32():
    small = [TableSpec("item", 4000, 16), TableSpec("flag", 1, 16)]
    tables = build_tables(small, QuantizeConfig(bits=4, granularity="column"))
    assert tables.memory().by_table()["flag"] == 16 * 4


@pytest.mark.parametrize(("budget", "bits"), [("100%", 32), ("50%", 16), ("26%", 8), ("13%", 4), ("7%", 2), ("4%", 1)])
def test_the_budget_chooses_the_most_bits_that_fit(budget, bits):
    assert plan(SPECS, QuantizeConfig(granularity="column"), budget).config.bits == bits


@pytest.mark.parametrize("granularity", ["row", "column", "table", "group64"])
def test_error_falls_as_bits_grow(granularity):
    torch.manual_seed(1)
    weights = {spec.name: torch.randn(spec.num_embeddings, 16) for spec in SPECS}
    errors = []
    for bits in BITS:
        config = QuantizeConfig(bits=bits, granularity=granularity, aware=False)
        served = build_tables(SPECS, config).load_dense_(weights).finalize_()
        errors.append((served.materialize("item") - weights["item"]).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_gaussian_rows_lose_what_the_best_uniform_quantizer_loses(bits, distortion):
    """Known in advance: the optimal uniform quantizer's distortion for a unit Gaussian (Max, 1960)."""
    torch.manual_seed(0)
    spec = [TableSpec("item", 20_000, 4)]
    weight = torch.randn(20_000, 4)
    config = QuantizeConfig(bits=bits, granularity="table", aware=False)
    served = build_tables(spec, config).load_dense_({"item": weight}).finalize_()
    assert (served.materialize() - weight).square().mean().item() == pytest.approx(distortion, rel=0.05)


def test_the_rows_format_is_its_own_business():
    with pytest.raises(ConfigError, match="set bits="):
        QuantizeConfig(rows="int8")
    with pytest.raises(ConfigError, match="allowed are 1, 2, 3, 4, 8, 16, 32"):
        QuantizeConfig(bits=5)
    with pytest.raises(ConfigError, match="colum"):
        QuantizeConfig(granularity="colum")
