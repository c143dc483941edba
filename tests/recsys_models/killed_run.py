"""A training run that can be killed on the way, in a process of its own: ``python -m … FOLDER "step 25" full``."""

import os
import signal
import sys
from pathlib import Path

import torch

from embcomp import DynamicConfig, FullConfig, OptEmbedConfig
from recsys_models.training import Callback, TrainingConfig, checkpoint, fit
from recsys_models.training.click_search import ClickSearch
from tests.recsys_models.tiny import tiny_log, tiny_model

CONFIG = TrainingConfig(
    learning_rate=0.3,
    embedding_optimizer="adagrad",
    embedding_l2=0.01,
    batch_size=64,
    epochs=4,
    eval_steps=7,
    patience=None,
    device="cpu",
    search_rows=100,
    search_at_once=3,
)


STRATEGIES = {
    "full": FullConfig(),
    "dynamic": DynamicConfig(num_slots={"f0": 20, "f1": 6, "f2": 2}, interval=3, admission="probability"),
    "optembed": OptEmbedConfig(generations=3, mutations=4, crossovers=4, parents=5),
}

PLACES = {
    # Half way through writing the second checkpoint; in the third epoch.
    "full": ("write 2", "step 25"),
    "dynamic": ("write 2", "step 25"),
    # Inside the first round of the search, inside the second, half way through writing it down, at a finalist, and when
    # it is over, but no checkpoint has what it found.
    "optembed": ("many 2", "many 5", "round 1", "one 3", "phase retrain"),
}
BUDGETS = {"optembed": "40%"}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Callback):
    """Kills the process at a step, or at the beginning of a phase of the given name."""

    def __init__(self, step, phase=None):
        self.step, self.phase = step, phase

    def on_phase_start(self, model, phase):
        if phase.name == self.phase:
            die()

    def on_step_end(self, model, step):
        if step == self.step:
            die()


def die_while_writing(number):
    """Kill the process when checkpoint ``number`` is half written."""
    save, calls = checkpoint.write_tensors, []

    def save_or_die(path, tensors, metadata):
        calls.append(path)
        save(path, tensors, metadata)
        if len(calls) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    checkpoint.write_tensors = save_or_die


def die_while_searching(name, number):
    """Kill the process in an evaluation of a search."""
    evaluate, calls = getattr(ClickSearch, name), []

    def evaluate_or_die(self, *args):
        calls.append(args)
        if len(calls) == number:
            die()
        return evaluate(self, *args)

    setattr(ClickSearch, name, evaluate_or_die)


def die_while_writing_a_round(number):
    """Kill the process when a search's file ``number`` is half written."""
    write, calls = Path.write_text, []

    def write_or_die(self, text):
        calls.append(self)
        if len(calls) == number:
            write(self, text[: len(text) // 2])
            die()
        return write(self, text)

    Path.write_text = write_or_die


def run(folder, where="step 0", strategy="full"):
    """Train, from the checkpoint if there is one; return the result and the final weights."""
    what, number = where.split()
    if what == "write":
        die_while_writing(int(number))
    elif what == "round":
        die_while_writing_a_round(int(number))
    elif what in ("many", "one"):
        die_while_searching({"many": "evaluate_many", "one": "evaluate"}[what], int(number))
    torch.set_num_threads(1)
    torch.manual_seed(7)
    data = tiny_log(num_dense=1)
    budget = BUDGETS.get(strategy)
    model = tiny_model(data, strategy=STRATEGIES[strategy], budget=budget, dropout=0.2, batch_norm=True)
    killer = Killer(int(number) if what == "step" else 0, number if what == "phase" else None)
    result = fit(model, data, CONFIG, checkpoint_dir=folder, resume=True, callbacks=[killer])
    return result, model.state_dict()


if __name__ == "__main__":
    run(*sys.argv[1:])
