"""Checkpoints: Orbax behind one small class, with a fingerprint that tells a damaged file from a good one."""

import hashlib
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from alexnet_jax.monitor import log


def state_digest(state: Any) -> str:
    """sha256 over parameters and optimiser state: float32 little-endian, leaves in the order of their names."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf, dtype='<f4').data)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of a run, written in the background: the newest `keep` and the one with the lowest error.

    Args:
      directory: where they lie, one folder a step.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: str, keep: int):
        def error(metrics):
            return metrics['top1_error']

        # Orbax' own pair of best_fn and max_to_keep would delete the newest checkpoint when it is not the best.
        newest = checkpoint_managers.LatestN(n=keep)
        best = checkpoint_managers.BestN(get_metric_fn=error, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self.manager = ocp.CheckpointManager(
            os.path.abspath(directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                best_fn=error,
                best_mode='min',
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: Any, progress: dict[str, Any], error: float | None) -> None:
        """Begin to write `state` and `progress` (JSON); `error` is the validation error at this step, if measured."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave({**progress, 'state_digest': state_digest(state)}),
        )
        self.manager.save(step, args=arguments, metrics=None if error is None else {'top1_error': error})

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, laid out as `abstract_state` says, and its progress; None without any.

        A damaged one is named, moved to damaged-STEP and passed over.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            problem = ''
            try:
                restored = self.manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state),
                        progress=ocp.args.JsonRestore(),
                    ),
                )
                if state_digest(restored.state) == restored.progress['state_digest']:
                    return restored.state, restored.progress
                problem = 'its numbers differ from those written'
            except Exception as error:  # Orbax raises many kinds; the next older checkpoint is the answer to all
                problem = f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'
            folder = os.path.join(self.manager.directory, str(step))
            aside = os.path.join(self.manager.directory, f'damaged-{step}')
            log(f'checkpoint {folder} is damaged ({problem}); moved to {aside}')
            os.rename(folder, aside)
            self.manager.reload()
        return None

    def wait(self) -> None:
        """Return when everything is on disk. Raises what went wrong in the background."""
        self.manager.wait_until_finished()
        self.manager.check_for_errors()

    def close(self) -> None:
        """Wait and release."""
        self.wait()
        self.manager.close()
