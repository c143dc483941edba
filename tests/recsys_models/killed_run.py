"""A training run that can be killed on the way, in a process of its own: ``python -m … FOLDER "step 25" full``."""

import os
import signal
import sys

import torch

from embcomp import DynamicConfig, FullConfig
from recsys_models.training import Callback, TrainingConfig, checkpoint, fit
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
)


STRATEGIES = {
    "full": FullConfig(),
    "dynamic": DynamicConfig(num_slots={"f0": 20, "f1": 6, "f2": 2}, interval=3, admission="probability"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, model, step):
        if step == self.step:
            die()


def die_while_writing(number):
    """Kill the process when checkpoint ``number`` is half written."""
    save, calls = checkpoint.save_file, []

    def save_or_die(tensors, path, metadata):
        calls.append(path)
        save(tensors, path, metadata)
        if len(calls) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    checkpoint.save_file = save_or_die


def run(folder, where="step 0", strategy="full"):
    """Train, from the checkpoint if there is one; return the result and the final weights."""
    what, number = where.split()
    if what == "write":
        die_while_writing(int(number))
    torch.set_num_threads(1)
    torch.manual_seed(7)
    data = tiny_log(num_dense=1)
    model = tiny_model(data, strategy=STRATEGIES[strategy], dropout=0.2, batch_norm=True)
    killer = Killer(int(number) if what == "step" else 0)
    result = fit(model, data, CONFIG, checkpoint_dir=folder, resume=True, callbacks=[killer])
    return result, model.state_dict()


if __name__ == "__main__":
    run(*sys.argv[1:])
