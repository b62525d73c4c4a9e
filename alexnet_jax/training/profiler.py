"""Traces train steps with the JAX profiler."""

import os
import re
from typing import TYPE_CHECKING

from alexnet_jax.config import ConfigError
from alexnet_jax.runtime.console import log

if TYPE_CHECKING:  # launch.py imports this module before jax
    from alexnet_jax.training.state import TrainState


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """Parses --profile='steps 20:25' to (20, 25); None stays None. Raises ConfigError: the text is not a range."""
    if text is None:
        return None
    match = re.fullmatch(r'(?:steps\s+)?(\d{1,9}):(\d{1,9})', text.strip())
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--profile: {text!r} is not a range of steps; for example --profile='steps 20:25'")
    return int(match[1]), int(match[2])


class StepProfiler:
    """Writes a JAX profiler trace of the steps `steps[0]` (inclusive) to `steps[1]` (exclusive) to WORKDIR/profile."""

    def __init__(self, steps: tuple[int, int] | None, workdir: str):
        self.steps, self.folder = steps, os.path.join(workdir, 'profile')
        self.started, self.running = False, False

    def on_step(self, step: int, state: 'TrainState | None') -> None:
        """Starts or stops the trace if it is due after `step` steps, which produced `state`."""
        import jax

        if self.steps and step == self.steps[0]:
            jax.block_until_ready(state)  # excludes earlier steps from the trace
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.started = self.running = True
        elif self.steps and step == self.steps[1]:
            self.close(state)

    def close(self, state: 'TrainState | None') -> None:
        """Writes the trace if one is running; logs a message if the requested trace never started."""
        import jax

        if self.steps and not self.started:
            log(f'no trace was written: the run ended before step {self.steps[0]} of --profile')
        if self.running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False
            log(f'{self.folder}: trace for TensorBoard, and perfetto_trace.json.gz for ui.perfetto.dev')
