"""Compute the communication, memory and FLOPs of a training step on a mesh, without the hardware of that mesh.

    alexnet audit --config=configs/imagenet.py --mesh=data:64,model:2 --images_per_device=128

The step is compiled for simulated devices and never executed. Collectives are from the compiled step, with the layers
and dtypes of the program before compilation (see collectives.py). Memory is that of the step compiled for a CPU. The
communication lower bound and the FLOPs are computed from the configuration (see costs.py).
"""

from absl import app, flags

from alexnet_jax.audit import cost_model
from alexnet_jax.audit.hlo_collectives import HloFormatError
from alexnet_jax.audit.step_audit import as_json, as_text, audit, audit_config, collectives_table
from alexnet_jax.config import ConfigError
from alexnet_jax.config_flag import CONFIG, parse_flags, report_usage_error
from alexnet_jax.runtime.console import log_error

flags.declare_key_flag('config')
_MESH = flags.DEFINE_string(
    'mesh', None, 'Devices along the axes, for example data:64,model:2; by default config.mesh.'
)
_IMAGES = flags.DEFINE_integer(
    'images_per_device', None, 'Sets train.batch_size to this many images times the devices.', lower_bound=1
)
_BANDWIDTH = flags.DEFINE_float('bandwidth', None, 'Assumed bytes/s that a device can send; with --flops.')
_FLOPS = flags.DEFINE_float('flops', None, 'Assumed FLOP/s that a device sustains; with --bandwidth.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')
_COLLECTIVES = flags.DEFINE_bool('collectives', False, 'Print only the collectives, as tests/golden keeps them.')


def main(argv: list[str]) -> int:
    """Audits the training step that the flags specify; returns the exit code."""
    del argv
    bandwidth, flops = _BANDWIDTH.value, _FLOPS.value
    try:
        if (bandwidth is None) != (flops is None):
            raise ConfigError('--bandwidth and --flops: a prediction needs both')
        if bandwidth is not None and not (bandwidth > 0 and flops > 0):
            raise ConfigError(f'--bandwidth={bandwidth:g} --flops={flops:g}: speeds are above 0')
        config = audit_config(CONFIG.value, _MESH.value, _IMAGES.value)
    except ConfigError as error:
        return report_usage_error(str(error))
    import jax

    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', config.mesh.data * config.mesh.model)
    try:
        report = audit(config)
    except HloFormatError as error:
        log_error(f'the compiled step of jax {jax.__version__} cannot be read: {error}')
        return 1
    if bandwidth is not None:
        report['prediction'] = cost_model.predict(config, report['collectives'], bandwidth, flops)
    if _COLLECTIVES.value:
        print(collectives_table(report['collectives']))
    else:
        print(as_json(report) if _JSON.value else as_text(report))
    return 0


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
