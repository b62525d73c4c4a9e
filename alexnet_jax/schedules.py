"""The learning-rate schedules of the paper and of later recipes."""

from alexnet_jax.config import Config, OptimizerConfig, duration_in_steps, total_steps
from alexnet_jax.shapes import LAYERS


def learning_rate(config: Config, step: int, examples: int, decays_taken: int) -> float:
    """Returns the learning rate of all kernels without an entry in `lr_overrides` at `step`, counted from 0.

    Args:
      config: the whole configuration.
      examples: number of training images, which defines an epoch.
      decays_taken: number of drops so far of the schedule 'plateau', see plateau_next().
    """
    optimizer, batch_size = config.optimizer, config.train.batch_size
    rate = optimizer.learning_rate
    if optimizer.schedule == 'steps':
        at = [duration_in_steps(str(drop), batch_size=batch_size, examples=examples) for drop in optimizer.milestones]
        rate /= optimizer.decay_factor ** sum(step >= drop for drop in at)
    elif optimizer.schedule == 'plateau':
        rate /= optimizer.decay_factor**decays_taken
    elif optimizer.schedule == 'dexp':
        rate /= _dexp_divisor(optimizer.dexp_factor, optimizer.dexp_parts, step, total_steps(config.train, examples))
    elif optimizer.schedule == 'poly':
        rate *= max(0.0, 1 - step / total_steps(config.train, examples)) ** optimizer.poly_power
    return rate * _warmed_up(config, step, examples)


def _dexp_divisor(factor: float, parts: int, step: int, total: int) -> float:
    """Returns cuda-convnet2's `dexp` divisor (lr.cu): from 1 to `factor` in `parts` equally long, geometric steps."""
    part = min(parts - 1, step * parts // max(total, 1))
    return factor ** (part / (parts - 1))


def _warmed_up(config: Config, step: int, examples: int) -> float:
    warmup = str(config.optimizer.warmup)
    steps = duration_in_steps(warmup, batch_size=config.train.batch_size, examples=examples)
    return min(1.0, (step + 1) / steps) if steps else 1.0


def learning_rate_tree(config: Config, step: int, examples: int, decays_taken: int) -> dict[str, dict[str, float]]:
    """Returns the learning rate of each layer's `kernel` and `bias` at `step`; see scheduled_rate() for the arguments.

    The learning rate of biases is `bias_lr_multiplier` times the scheduled one, or times that of a `bias_schedule` with
    the same initial value. `lr_overrides` overrides single kernels or biases from a given time on.
    """
    optimizer, batch_size = config.optimizer, config.train.batch_size
    kernel = bias = learning_rate(config, step, examples, decays_taken)
    if optimizer.bias_schedule != 'same':
        bias = optimizer.learning_rate * _warmed_up(config, step, examples)
    if optimizer.bias_schedule == 'dexp':
        total = total_steps(config.train, examples)
        bias /= _dexp_divisor(optimizer.bias_dexp_factor, optimizer.bias_dexp_parts, step, total)
    rates = {name: {'kernel': kernel, 'bias': bias * optimizer.bias_lr_multiplier} for name in LAYERS}
    for name, since, rate in optimizer.lr_overrides:
        if step >= duration_in_steps(str(since), batch_size=batch_size, examples=examples):
            layer, kind = name.split('/')
            rates[layer][kind] = rate
    return rates


def plateau_init() -> dict[str, float]:
    """Returns the state of the schedule 'plateau' before the first evaluation: plain numbers, saved in checkpoints."""
    return {'lowest_error': 1.0, 'waited': 0, 'decays_taken': 0}


def plateau_next(state: dict[str, float], error: float, config: OptimizerConfig) -> dict[str, float]:
    """Returns the state after an evaluation with top-1 `error` (0 to 1), by the paper's rule: drop on a plateau.

    A drop follows `patience` evaluations in a row without a new lowest error, at most `max_decays` times. `config` is
    `optimizer` of a configuration.
    """
    if error < state['lowest_error']:
        return state | {'lowest_error': error, 'waited': 0}
    waited = state['waited'] + 1
    if waited >= config.patience and state['decays_taken'] < config.max_decays:
        return state | {'waited': 0, 'decays_taken': state['decays_taken'] + 1}
    return state | {'waited': waited}
