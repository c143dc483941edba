"""A callback that breaks a run off."""

from recsys_models.training import Callback


class Killed(Exception):
    pass


class Killer(Callback):
    """Raises at a step of a phase."""

    def __init__(self, name, step):
        self.name, self.step, self.phase = name, step, None

    def on_phase_start(self, model, phase):
        self.phase = phase.name

    def on_step_end(self, model, step):
        if (self.phase, step) == (self.name, self.step):
            raise Killed
