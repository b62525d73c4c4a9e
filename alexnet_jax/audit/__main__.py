"""Compute the communication, memory and FLOPs of a training step on a mesh, without the hardware of that mesh.

    alexnet audit --config=configs/imagenet.py --mesh=data:64,model:2 --images_per_device=128
    alexnet audit --config=configs/imagenet.py --target=h100:8 --images_per_device=128

The step is compiled for simulated CPU devices or, with --target, by the compiler of an accelerator (see targets.py). It
is never executed. Collectives and memory are those of the compiled step. The layers of the collectives, and their
dtypes on CPUs, are those before compilation (see hlo_collectives.py). The communication lower bound and the FLOPs are
computed from the configuration (see cost_model.py), the times on an accelerator from its data sheet (see roofline.py).
"""

import math

from absl import flags

from alexnet_jax import cli
from alexnet_jax.audit import cost_model
from alexnet_jax.audit.hlo_collectives import HloFormatError
from alexnet_jax.audit.report_text import as_json, as_text, collectives_table, products_line
from alexnet_jax.audit.step_audit import audit, audit_config
from alexnet_jax.audit.targets import EXAMPLES, CompilerError, find_compiler, parse_target, set_environment
from alexnet_jax.config import ConfigError


def main(argv: list[str]) -> int:
    """Audits the training step that the flags specify; returns the exit code."""
    del argv
    given = flags.FLAGS
    if (given.bandwidth is None) != (given.flops is None):
        raise ConfigError('--bandwidth and --flops: a prediction needs both')
    if given.bandwidth is not None and not (0 < given.bandwidth < math.inf and 0 < given.flops < math.inf):
        raise ConfigError(f'--bandwidth={given.bandwidth:g} --flops={given.flops:g}: both must be above 0 and finite')
    if given.collectives and (given.json or given.bandwidth is not None):
        raise ConfigError('--collectives prints only the collectives; remove --json, --bandwidth and --flops')
    target = compiler = None
    if given.target is not None:
        target = parse_target(given.target)
        compiler = find_compiler(target, given.compilers)
        set_environment(target, compiler)
    elif given.compilers is not None:
        raise ConfigError('--compilers: requires --target')
    config = audit_config(given.config, given.mesh, given.images_per_device, target)
    import jax  # after the checks, which do not need jax

    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', config.mesh.data * config.mesh.model)
    try:
        report = audit(config, target, compiler)
    except HloFormatError as error:
        raise HloFormatError(f'the compiled step of jax {jax.__version__} cannot be read: {error}') from None
    if given.bandwidth is not None:
        report['prediction'] = cost_model.predict(config, report['collectives'], given.bandwidth, given.flops)
    if given.collectives:
        print(collectives_table(report['collectives'], with_schedule=target is not None))
        if 'target' in report:
            print(products_line(report['target']))
    else:
        print(as_json(report) if given.json else as_text(report))
    return 0


if __name__ == '__main__':
    cli.define_config_flag()
    flags.DEFINE_string('mesh', None, 'Devices on the axes, for example data:64,model:2. Default: config.mesh.')
    flags.DEFINE_integer(
        'images_per_device',
        None,
        'Images per device; sets train.batch_size to this number times the number of devices.',
        lower_bound=1,
    )
    flags.DEFINE_string(
        'target', None, f'Accelerators for which their own compiler compiles the step: {EXAMPLES}. See docs/scaling.md.'
    )
    flags.DEFINE_string(
        'compilers', None, 'Folder of the compilers, from pip install --target=FOLDER. Default: the Python path.'
    )
    flags.DEFINE_float('bandwidth', None, 'Assumed bytes/s that a device sends; requires --flops.')
    flags.DEFINE_float('flops', None, 'Assumed FLOP/s that a device sustains; requires --bandwidth.')
    flags.DEFINE_bool('json', False, 'Print one JSON object.')
    flags.DEFINE_bool(
        'collectives', False, 'Print only the collectives and the precision of the products, as in tests/golden.'
    )
    cli.run(main, failures=(HloFormatError, CompilerError))
