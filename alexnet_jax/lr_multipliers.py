"""The multipliers of the learning rate by layer and parameter, `optimizer.lr_multipliers`, and what they freeze."""

import fnmatch

from alexnet_jax.config_schema import Config, ModelConfig, OptimizerConfig
from alexnet_jax.shapes import LAYERS

KINDS = ('kernel', 'bias')

Parameter = tuple[str, str]  # a layer, and kernel or bias


def parameters(model: ModelConfig) -> list[Parameter]:
    """Returns the parameters of the network, conv1 to fc8; layers of width 0 have none."""
    widths = (*model.widths, 1)  # fc8 exists before the number of classes is known
    return [(layer, kind) for layer, width in zip(LAYERS, widths, strict=True) if width for kind in KINDS]


def matches(pattern: str, parameter: Parameter) -> bool:
    """Returns whether the glob `pattern` matches the layer, such as conv1, or the parameter, such as conv1/kernel."""
    layer, kind = parameter
    return any(fnmatch.fnmatchcase(name, pattern) for name in (layer, f'{layer}/{kind}'))


def lr_multiplier(optimizer: OptimizerConfig, parameter: Parameter) -> float:
    """Returns the factor of the last entry of `lr_multipliers` that matches `parameter`, or 1 without such an entry."""
    factors = [factor for pattern, factor in optimizer.lr_multipliers if matches(pattern, parameter)]
    return factors[-1] if factors else 1.0


def frozen_parameters(config: Config) -> frozenset[Parameter]:
    """Returns the parameters that are not trained in any step.

    Their multiplier is 0, and `lr_overrides` gives them no learning rate above 0.
    """
    trained_later = {name for name, _, rate in config.optimizer.lr_overrides if rate > 0}
    return frozenset(
        (layer, kind)
        for layer, kind in parameters(config.model)
        if not lr_multiplier(config.optimizer, (layer, kind)) and f'{layer}/{kind}' not in trained_later
    )


def frozen_layers(config: Config) -> frozenset[str]:
    """Returns the layers of which both the kernel and the bias are frozen."""
    frozen = frozen_parameters(config)
    return frozenset(layer for layer in LAYERS if all((layer, kind) in frozen for kind in KINDS))


def frozen_names(config: Config) -> list[str]:
    """Returns the names of what is frozen, conv1 to fc8: layers, and parameters of layers that are partly frozen."""
    frozen, layers = frozen_parameters(config), frozen_layers(config)
    names = [
        layer if layer in layers else f'{layer}/{kind}'
        for layer, kind in parameters(config.model)
        if (layer, kind) in frozen
    ]
    return list(dict.fromkeys(names))


def layers_with_input_gradient(config: Config) -> tuple[str, ...]:
    """Returns the layers whose backward pass computes the gradient of their inputs: those after the first trained one.

    The layers before need no backward pass; a layer is trained if its kernel or its bias is not frozen.
    """
    return LAYERS[LAYERS.index(first_trained_layer(config)) + 1 :]


def first_trained_layer(config: Config) -> str:
    """Returns the first layer of which a parameter is not frozen."""
    frozen = frozen_parameters(config)
    return next(layer for layer, kind in parameters(config.model) if (layer, kind) not in frozen)
