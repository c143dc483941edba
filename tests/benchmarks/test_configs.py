"""The files in configs/: every one composes, and says what its code takes."""

import dataclasses
import inspect
import itertools

import hydra
import pytest
from omegaconf import OmegaConf

from benchmarks.cells import Cell
from benchmarks.overrides import GROUPS, options_of
from embcomp import get_strategy, list_strategies, make_config
from recsys_models.ctr import MODELS
from recsys_models.data import list_session_datasets
from recsys_models.data.registry import READERS, make_reader
from recsys_models.data.sessions.registry import SESSION_READERS, make_session_reader
from recsys_models.session import ENCODERS, ModelConfig, model_options
from recsys_models.training import TrainingConfig


def compose(*overrides):
    with hydra.initialize_config_module("configs", version_base="1.3"):
        return hydra.compose("config", list(overrides), return_hydra_config=True)


def values(config, group):
    found = OmegaConf.to_container(config[group], resolve=True)
    return found.pop("name", None), found


@pytest.mark.parametrize("name", list_strategies())
def test_every_strategy_has_its_file_with_its_defaults(name):
    config_class = get_strategy(name).config_class
    _, options = values(compose(f"strategy={name}"), "strategy")
    assert make_config(name, **options) == config_class()


@pytest.mark.parametrize("choice", options_of("strategy"))
def test_every_strategy_file_makes_a_config(choice):
    name, options = values(compose(f"strategy={choice}"), "strategy")
    make_config(name, **options)


@pytest.mark.parametrize("choice", options_of("model"))
def test_model_files_name_every_option(choice):
    name, options = values(compose(f"model={choice}"), "model")
    if name in ENCODERS:
        known = model_options(name)
        assert options == known if "/" not in choice else set(options) == set(known)
    else:
        assert set(options) == set(inspect.signature(MODELS[name]).parameters) - {"tables", "num_dense"}
    assert choice.split("/")[-1].startswith(name)


@pytest.mark.parametrize("name", sorted(READERS))
def test_data_files_name_every_option_with_its_default(name):
    found, options = values(compose(f"data={name}"), "data")
    assert found == name
    assert set(options) == {option.name for option in dataclasses.fields(READERS[name])}
    assert make_reader(name, **options) == make_reader(name)


@pytest.mark.parametrize("name", list_session_datasets())
def test_files_of_sessions_name_every_option_with_its_default(name):
    found, options = values(compose(f"data=sessions/{name}"), "data")
    assert found == name
    assert set(options) == {option.name for option in dataclasses.fields(SESSION_READERS[name])}
    assert make_session_reader(name, **options) == make_session_reader(name)


@pytest.mark.parametrize("choice", options_of("training"))
def test_training_files_name_every_field(choice):
    _, options = values(compose(f"training={choice}"), "training")
    assert set(options) == {field.name for field in dataclasses.fields(TrainingConfig)}
    TrainingConfig(**options)


def test_default_training_is_the_codes_default():
    assert TrainingConfig(**values(compose(), "training")[1]) == TrainingConfig()


def check_parts(config):
    """Model, data and training of a composed config are such as the code takes."""
    model, data = dict(config["model"]), dict(config["data"])
    name = model.pop("name")
    if name in ENCODERS:
        assert set(model) <= set(model_options(name))
        shared = {field.name for field in dataclasses.fields(ModelConfig)}
        of_all = ModelConfig(**{key: value for key, value in model.items() if key in shared})
        own = {key: value for key, value in model.items() if key not in shared}
        encoder = ENCODERS[name](config["embedding_dim"], of_all.max_length, **own)
        assert of_all.targets in (None, encoder.targets) or encoder.has_choice
        assert of_all.windows == "last" or (of_all.targets or encoder.targets) == "positions"
        make_session_reader(data.pop("name"), **data)
    else:
        assert set(model) <= set(inspect.signature(MODELS[name]).parameters)
        make_reader(data.pop("name"), **data)
    TrainingConfig(**config["training"])


@pytest.mark.parametrize("name", options_of("experiment"))
def test_experiments_compose_for_every_point(name):
    config = compose(f"experiment={name}")
    assert config.name == name
    axes = {key: str(text).split(",") for key, text in config.hydra.sweeper.params.items()}
    assert len(axes["seed"]) >= 3
    points = set()
    choices = [[f"{key}={value}" for value in axis] for key, axis in axes.items() if key in GROUPS]
    for overrides in itertools.product(*choices):
        composed = compose(f"experiment={name}", *overrides)
        config = {key: value for key, value in OmegaConf.to_container(composed).items() if key != "hydra"}
        cell = Cell(config)
        make_config(**{("strategy" if key == "name" else key): value for key, value in config["strategy"].items()})
        check_parts(config)
        points.add(cell.digest)
    assert len(points) == len(list(itertools.product(*choices)))
