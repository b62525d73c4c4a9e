"""The progress of a run, which checkpoints contain as JSON besides the train state."""

import dataclasses
import math

from alexnet_jax.config import OptimizerConfig
from alexnet_jax.runtime.files import JsonObject
from alexnet_jax.schedules import PlateauState

# Keys in checkpoints of version 0.1, which this version can resume, and their new names.
RENAMED_KEYS = {
    'judged_by': 'stopping_criteria',
    'goal_step': 'target_step',
    'store': 'dataset_fingerprint',
    'evaluated': 'last_evaluated_step',
    'errors': 'last_evaluation',
    'drops_taken': 'decays_taken',
}


@dataclasses.dataclass(frozen=True)
class Window:
    """Sums over the train steps since the last multiple of train.log_every.

    Attributes:
      steps: number of steps.
      loss, top1_error: sums of the metrics of the steps.
    """

    steps: int = 0
    loss: float = 0.0
    top1_error: float = 0.0

    def add(self, sums: dict[str, float], steps: int) -> 'Window':
        """Returns the window extended by `steps` steps with the metric sums `sums`."""
        return Window(self.steps + steps, self.loss + sums['loss'], self.top1_error + sums['top1_error'])


@dataclasses.dataclass(frozen=True)
class RunState:
    """The progress of a run; the defaults describe a run before its first step.

    Attributes:
      step: number of train steps taken, including those before a resume.
      dataset_fingerprint: see dataset.PreparedDataset; None for imported weights.
      last_evaluated_step: the step of the last evaluation, or -1.
      last_evaluation: the result of that evaluation, see Evaluator.evaluate().
      plateau: see PlateauState.
      window: see Window.
      stopping_criteria: target_error, stall_after and stall_action to which `target_step` and `stalled_step` refer.
      target_step: the step at which train.target_error was reached, or None.
      stalled_step: the step at which Diagnostics found a stalled loss, or None.
      images_per_second: the last measurement of the training throughput.
      statistics_digest: see workdir.statistics_digest(); None in checkpoints of earlier versions.
    """

    step: int = 0
    dataset_fingerprint: str | None = None
    last_evaluated_step: int = -1
    last_evaluation: dict[str, float] | None = None
    plateau: PlateauState = dataclasses.field(default_factory=PlateauState)
    window: Window = dataclasses.field(default_factory=Window)
    stopping_criteria: tuple[float | str, ...] = ()
    target_step: int | None = None
    stalled_step: int | None = None
    images_per_second: float = 0.0
    statistics_digest: str | None = None

    def to_json(self) -> JsonObject:
        """Returns the JSON object that from_json() reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: JsonObject) -> 'RunState':
        """Returns the state from the JSON object `values` of this version or of version 0.1.

        Missing keys, as in imported weights, take the defaults.

        Raises ValueError: `values` has an unknown key. Raises TypeError: a value has the wrong type.
        """
        state = cls(**_known_fields(cls, values))
        state = dataclasses.replace(
            state,
            plateau=PlateauState(**_known_fields(PlateauState, values.get('plateau', {}))),
            window=Window(**_known_fields(Window, values.get('window', {}))),
            stopping_criteria=tuple(state.stopping_criteria),
        )
        for field in _wrong_types(state):
            raise TypeError(f'{field} has a value of the wrong type')
        return state

    def ends_at_plateau(self, config: OptimizerConfig) -> bool:
        """Returns whether optimizer.stop_on_plateau ends the run; see PlateauState.is_exhausted()."""
        return config.stop_on_plateau and self.plateau.is_exhausted(config)

    def with_stopping_criteria(self, criteria: tuple[float | str, ...]) -> 'RunState':
        """Returns the state with `criteria`; other criteria than before reset `target_step` and `stalled_step`."""
        if criteria == self.stopping_criteria:
            return self
        return dataclasses.replace(self, stopping_criteria=criteria, target_step=None, stalled_step=None)


def _known_fields(kind: type, values: JsonObject) -> JsonObject:
    """Returns `values` with new key names.

    Raises ValueError: a key is not a field of the dataclass `kind`. Raises TypeError: `values` is not a dict.
    """
    if not isinstance(values, dict):
        raise TypeError(f'{kind.__name__} is not a JSON object')
    renamed = {RENAMED_KEYS.get(key, key): value for key, value in values.items()}
    unknown = sorted(set(renamed) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f'{kind.__name__} has no field {unknown[0]!r}')
    return renamed


def _wrong_types(state: RunState) -> list[str]:
    """Returns the names of the fields that have values of wrong types, as in corrupt JSON without a digest."""
    evaluation = state.last_evaluation
    is_valid = {
        'step': _is_count(state.step),
        'dataset_fingerprint': isinstance(state.dataset_fingerprint, str | None),
        'last_evaluated_step': state.last_evaluated_step == -1 or _is_count(state.last_evaluated_step),
        'last_evaluation': evaluation is None
        or (isinstance(evaluation, dict) and all(map(_is_number, evaluation.values()))),
        'plateau': _is_number(state.plateau.lowest_error)
        and _is_count(state.plateau.waited)
        and _is_count(state.plateau.decays_taken),
        'window': _is_count(state.window.steps)
        and _is_number(state.window.loss)
        and _is_number(state.window.top1_error),
        'stopping_criteria': all(isinstance(each, float | int | str) for each in state.stopping_criteria),
        'target_step': state.target_step is None or _is_count(state.target_step),
        'stalled_step': state.stalled_step is None or _is_count(state.stalled_step),
        'images_per_second': _is_number(state.images_per_second),
        'statistics_digest': isinstance(state.statistics_digest, str | None),
    }
    return [name for name, valid in is_valid.items() if not valid]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
