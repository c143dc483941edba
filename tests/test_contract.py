"""Every registered strategy keeps the contract, in every row format: one test per strategy, format and property."""

import pytest

import embcomp
from embcomp import ConfigError, StrategyConfig, make_config
from embcomp.testing import CHECKS, check_compile, check_export, reconstruction_error

STRATEGIES = embcomp.list_strategies()
FORMATS = ("float32", "bfloat16", "int8", "int4:row:after", "int2:column")

# Capturing graphs takes seconds: once per strategy, and in every format for the plain tables.
DEAR = (check_compile, check_export)


def cases():
    for name in STRATEGIES:
        for rows in FORMATS:
            try:
                config = make_config(name, rows=rows)
            except ConfigError:
                continue
            for check in CHECKS:
                if check not in DEAR or rows == "float32" or name == "full":
                    yield pytest.param(check, config, id=f"{name}-{rows}-{check.__name__.removeprefix('check_')}")


@pytest.mark.parametrize(("check", "config"), cases())
def test_contract(check, config: StrategyConfig):
    check(config)


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_bytes_keep_trained_tables_exactly(name: str):
    assert reconstruction_error(name, share=1.0) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_generated_code_agrees_with_eager(name: str):
    check_compile(name, backend="inductor")
