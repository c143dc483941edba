"""Configs: the registry, JSON, and what bad values are answered."""

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest

import embcomp
from embcomp import ConfigError, FullConfig, ReducedDimConfig, StrategyConfig
from embcomp import config as registry
from embcomp.config import (
    check_at_least,
    config_from_dict,
    config_to_dict,
    config_to_json,
    get_strategy,
    list_strategies,
    make_config,
    register_strategy,
    strategy_of,
)

EVERY = pytest.mark.parametrize("name", list_strategies())


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


class TestEveryStrategy:
    @EVERY
    def test_defaults_survive_json(self, name):
        config = make_config(name)
        assert config_from_dict(json.loads(config_to_json(config))) == config
        assert config_to_dict(config)["strategy"] == name

    @EVERY
    def test_is_a_hydra_structured_config(self, name):
        omegaconf = pytest.importorskip("omegaconf")
        config_class = get_strategy(name).config_class
        node = omegaconf.OmegaConf.structured(config_class)
        assert omegaconf.OmegaConf.to_object(node) == config_class()
        with pytest.raises(omegaconf.errors.ConfigKeyError):
            omegaconf.OmegaConf.merge(node, {"no_such_field": 1})

    @EVERY
    def test_says_what_it_is_and_is_exported(self, name):
        entry = get_strategy(name)
        assert getattr(embcomp, entry.config_class.__name__) is entry.config_class
        assert entry.config_class.__name__ in embcomp.__all__
        assert entry.tables_class.__doc__
        assert entry.tables_class.knob != "nothing"
        for field in dataclasses.fields(entry.config_class):
            documented = "".join(c.__doc__ or "" for c in entry.config_class.__mro__ if issubclass(c, StrategyConfig))
            assert f"{field.name}:" in documented, f"{entry.config_class.__name__}.{field.name} is not documented"

    @EVERY
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rows": "int5"}, "rows='int5' is not a row format"),
            ({"rows": 8}, "rows=8"),
            ({"unseen": "ignore"}, r"unseen='ignore'.*error, hash, oov_row, zero"),
            ({"unseen": None}, "unseen=None"),
            ({"seed": 1.5}, r"seed=1.5.*must be int, not float"),
            ({"seed": True}, "seed=True"),
            ({"sparse": "yes"}, r"sparse='yes'.*must be bool, not str"),
            ({"sede": 1}, r"has no field 'sede'; did you mean 'seed'"),
        ],
    )
    def test_common_fields_are_checked(self, name, options, message):
        with pytest.raises(ConfigError, match=message):
            make_config(name, **options)


class TestJson:
    def test_form(self):
        values = config_to_dict(ReducedDimConfig(dim=4, rows="int8"))
        assert list(values)[:2] == ["strategy", "version"]
        assert values["strategy"] == "reduced_dim"
        assert values["dim"] == 4

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({}, r"needs 'strategy': one of .*full"),
            ({"strategy": 3, "version": 1}, "needs 'strategy'.*got 3"),
            ({"strategy": "ful", "version": 1}, "no strategy 'ful'; did you mean 'full'"),
            ({"strategy": "full"}, "version None.*reads 1 to 2"),
            ({"strategy": "full", "version": 3}, "version 3.*upgrade"),
            ({"strategy": "full", "version": "1"}, "version '1'"),
            ({"strategy": "full", "version": 1, "dim": 3}, "FullConfig has no field 'dim'"),
            ("full", "not a mapping"),
            (None, "not a mapping"),
        ],
    )
    def test_bad_forms(self, values, message):
        with pytest.raises(ConfigError, match=message):
            config_from_dict(values)


class TestMakeConfig:
    def test_passes_a_config_through_and_replaces_options(self):
        config = ReducedDimConfig(dim=4)
        assert make_config(config) == config
        assert make_config(config, rows="int8") == ReducedDimConfig(dim=4, rows="int8")
        assert make_config("reduced_dim", dim=4) == config

    def test_unknown_strategy(self):
        with pytest.raises(
            ConfigError, match=r"no strategy 'reduce_dim'; did you mean 'reduced_dim'\? Allowed: .*full"
        ):
            make_config("reduce_dim")

    def test_a_config_of_no_strategy(self):
        with pytest.raises(ConfigError, match=r"not the config of a strategy; give one of .*FullConfig"):
            make_config(StrategyConfig())

    @pytest.mark.parametrize("value", [0, -1])
    def test_values_out_of_range(self, value):
        with pytest.raises(ConfigError, match=rf"ReducedDimConfig\(dim={value}\): must be at least 1"):
            ReducedDimConfig(dim=value)

    @pytest.mark.parametrize(
        ("value", "message"), [(math.nan, "rate=nan"), (math.inf, "must be at least 0, and finite")]
    )
    def test_nan_and_infinity_are_not_at_least_anything(self, value, message):
        @dataclass(frozen=True)
        class Odd:
            rate: float

        with pytest.raises(ConfigError, match=message):
            check_at_least(Odd(value), "rate", 0)

    def test_configs_are_values(self):
        assert hash(FullConfig()) == hash(FullConfig())
        with pytest.raises(dataclasses.FrozenInstanceError):
            FullConfig().rows = "int8"


@pytest.mark.usefixtures("clean_registry")
class TestRegistry:
    def test_a_strategy_of_somebody_else(self):
        @dataclass(frozen=True)
        class MineConfig(StrategyConfig):
            width: int = 3

        @register_strategy("mine", MineConfig)
        class MineTables(embcomp.EmbeddingTables):
            pass

        assert "mine" in list_strategies()
        assert strategy_of(make_config("mine", width=4)).tables_class is MineTables
        with pytest.raises(ConfigError, match="'mine' is registered already, by"):
            register_strategy("mine", MineConfig)
        with pytest.raises(ConfigError, match="MineConfig belongs to another strategy"):
            register_strategy("ours", MineConfig)

    @pytest.mark.parametrize("name", ["Mine", "my strategy", "", "3d", "my-own"])
    def test_names(self, name):
        with pytest.raises(ConfigError, match="must be a lower-case identifier"):
            register_strategy(name, FullConfig)

    @pytest.mark.parametrize("config_class", [dict, object, int])
    def test_config_classes(self, config_class):
        with pytest.raises(ConfigError, match="must be a frozen dataclass of StrategyConfig"):
            register_strategy("mine", config_class)

    def test_a_config_class_that_forgot_to_be_a_dataclass(self):
        class Forgot(StrategyConfig):
            width: int = 3

        with pytest.raises(ConfigError, match="Forgot must be a frozen dataclass"):
            register_strategy("mine", Forgot)


def test_nested_field_types():
    @dataclass(frozen=True)
    class Nested(StrategyConfig):
        dims: dict[str, int] | None = None

    assert Nested(dims={"user": 3}).dims == {"user": 3}
    for bad in ({"user": "3"}, {3: 3}, [3], 3):
        with pytest.raises(ConfigError, match="dims="):
            Nested(dims=bad)
