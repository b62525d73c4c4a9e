"""Reads the checkpoint that a CheckpointRef refers to. Reading changes no file of the run, which may be training."""

import os

from alexnet_jax.config import ConfigError
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef
from alexnet_jax.runtime.workdir import CheckpointError
from alexnet_jax.training import checkpointing
from alexnet_jax.training.state import TrainState


def resolve_step(ref: CheckpointRef) -> int:
    """Returns the step of the checkpoint that `ref` currently refers to.

    Raises ConfigError: there is no such checkpoint. Raises CheckpointError: the checkpoints cannot be listed.
    """
    errors = checkpointing.checkpoint_metrics(os.path.join(ref.workdir, 'checkpoints'))
    if not errors:
        raise ConfigError(f'{ref.name}: {ref.workdir} has no checkpoint; train there first')
    there = f'the checkpoints are those of steps {", ".join(map(str, errors))}'
    if ref.selector == 'newest':
        return max(errors)
    if ref.selector == 'best':
        measured = {step: error for step, error in errors.items() if error is not None}
        if not measured:
            raise ConfigError(f'{ref.name}: no checkpoint has a validation error; {there}')
        return min(measured, key=lambda step: measured[step])
    if int(ref.selector) not in errors:
        raise ConfigError(f'{ref.name}: there is no such checkpoint; {there}')
    return int(ref.selector)


def restore(ref: CheckpointRef, abstract: TrainState | None) -> checkpointing.Checkpoint:
    """Restores the checkpoint that `ref` refers to; for `abstract` see checkpointing.restore_checkpoint().

    Raises ConfigError: there is no such checkpoint. Raises CheckpointError: the checkpoint cannot be read.
    """
    while True:
        step = resolve_step(ref)
        path = os.path.join(ref.workdir, 'checkpoints', str(step))
        restored, problem = checkpointing.restore_checkpoint(path, abstract)
        if restored is not None and restored.run_state.step == step:
            return restored
        if restored is not None:
            problem = f'it is a checkpoint of step {restored.run_state.step}'
        # A run that is still training may have replaced the checkpoint in the meantime.
        if resolve_step(ref) == step:
            raise CheckpointError(f'{ref.name}: checkpoint {path} is corrupt ({problem}); name another checkpoint')
