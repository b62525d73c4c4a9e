"""Accelerators whose compilers run on any CPU: `alexnet audit --target=v5e:4x4` or `--target=h100:8`.

libtpu compiles for TPUs, jax-cuda12-pjrt or jax-cuda13-pjrt for GPUs. The compilers need a description of the hardware,
not the hardware. This module parses a target, finds its compiler and returns the target's devices, for which JAX can
compile but not execute. `python -m alexnet_jax.audit.targets` prints the compilers that fit the installed jax, for pip.
"""

import dataclasses
import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from alexnet_jax.config import ConfigError

GPUS_PER_HOST = 8
EXAMPLES = 'v5e:4x4, v5p:2x2x2, v6e:2x4, h100:8 or h200:64'


class CompilerError(RuntimeError):
    """The compiler of an accelerator refuses the training step, for example because its memory does not suffice."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One JAX device of an accelerator: a GPU, a TPU chip or, for tpu7x, one of the two cores of a chip.

    Rates are the peaks of the data sheets, without sparsity.

    Attributes:
      memory: Bytes of memory.
      bandwidth: Bytes/s of this memory.
      bfloat16: FLOP/s of matrix products and convolutions of bfloat16 inputs.
      tensorfloat32: FLOP/s of products of float32 inputs at JAX's default precision: TF32 on GPUs, one pass of bfloat16
        on TPUs.
      high: FLOP/s of products of float32 inputs at JAX's precision `high`: TF32 on GPUs, three passes of bfloat16 on
        TPUs.
      float32: FLOP/s of products in full float32 precision; on TPUs six passes of bfloat16.
      link: Bytes/s that a device sends to devices of the same host (GPU: NVLink), or along one axis of the torus in
        both directions (TPU: the sum of both directions of all links, divided by two and by the number of axes).
      network: Bytes/s that one GPU's network adapter sends to other hosts; None for TPUs.
    """

    memory: int
    bandwidth: float
    bfloat16: float
    tensorfloat32: float
    high: float
    float32: float
    link: float
    network: float | None = None


def _tpu(gib: float, bandwidth: float, bfloat16: float, link: float) -> Hardware:
    return Hardware(int(gib * 2**30), bandwidth, bfloat16, bfloat16, bfloat16 / 3, bfloat16 / 6, link)


# TPUs: the pages "TPU v4" to "TPU7x" of Google Cloud's documentation (peak compute, HBM, and interconnect per chip).
# GPUs: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and HGX B200; the network adapters are those of
# the DGX systems, 200 Gbit/s (A100) and 400 Gbit/s per GPU. GPU memory is what the driver reports.
HARDWARE = {
    'v4': _tpu(32, 1.228e12, 275e12, 100e9),
    'v5e': _tpu(16, 0.819e12, 197e12, 100e9),
    'v5p': _tpu(95, 2.765e12, 459e12, 200e9),
    'v6e': _tpu(32, 1.638e12, 918e12, 200e9),
    'tpu7x': _tpu(96, 3.69e12, 1153.5e12, 100e9),
    'a100': Hardware(85_100_068_864, 2.039e12, 312e12, 156e12, 156e12, 19.5e12, 300e9, 25e9),
    'h100': Hardware(84_929_347_584, 3.352e12, 989e12, 494.5e12, 494.5e12, 66.9e12, 450e9, 50e9),
    'h200': Hardware(151_397_597_184, 4.8e12, 989e12, 494.5e12, 494.5e12, 66.9e12, 450e9, 50e9),
    'b200': Hardware(191_514_411_008, 7.672e12, 2250e12, 1125e12, 1125e12, 75e12, 900e9, 50e9),
}

# Per TPU: axes of the torus, devices per chip, and the configuration in which a chip of two cores is one device.
_TPUS: dict[str, tuple[int, int, dict[str, str]]] = {
    'v4': (3, 1, {'chip_config_name': 'megacore'}),
    'v5e': (2, 1, {}),
    'v5p': (3, 1, {}),
    'v6e': (2, 1, {}),
    'tpu7x': (3, 2, {}),
}

# The fields of XLA's GpuTargetConfigProto that differ between the GPUs.
_GPUS: dict[str, dict[str, Any]] = {
    'a100': {
        'description': 'NVIDIA A100-SXM4-80GB',
        'capability': 8,
        'cores': 108,
        'fpus': 64,
        'clock': 1.41,
        'bandwidth': 2_039_040_000_000,
        'cache': 41_943_040,
        'shared': 167_936,
        'optin': 166_912,
    },
    'h100': {
        'description': 'NVIDIA H100 80GB HBM3',
        'capability': 9,
        'cores': 132,
        'fpus': 128,
        'clock': 1.98,
        'bandwidth': 3_352_320_000_000,
        'cache': 52_428_800,
        'shared': 233_472,
        'optin': 232_448,
    },
}
_GPUS['h200'] = _GPUS['h100'] | {'description': 'NVIDIA H200 141GB HBM3e', 'bandwidth': 4_800_000_000_000}
_GPUS['b200'] = _GPUS['h100'] | {
    'description': 'NVIDIA B200',
    'capability': 10,
    'cores': 148,
    'clock': 1.965,
    'bandwidth': 7_672_320_000_000,
    'cache': 132_644_864,
}
_GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{description}"
"""

# The compilers of a platform: package -> the library in it. The first that is installed is used.
_LIBRARIES = {
    'tpu': {'libtpu': 'libtpu/libtpu.so'},
    'gpu': {
        'jax-cuda12-pjrt': 'jax_plugins/xla_cuda12/xla_cuda_plugin.so',
        'jax-cuda13-pjrt': 'jax_plugins/xla_cuda13/xla_cuda_plugin.so',
    },
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of devices of one kind.

    Attributes:
      text: As written by the user, 'v5e:2x4' or 'h100:8'.
      kind: Key of HARDWARE.
      devices: Number of JAX devices.
      topology: The topology in the form of the compiler: chips along the axes of the torus, or slices x hosts x GPUs.
    """

    text: str
    kind: str
    devices: int
    topology: str

    @property
    def platform(self) -> str:
        """JAX's name of the platform: 'tpu' or 'gpu'."""
        return 'tpu' if self.kind in _TPUS else 'gpu'

    @property
    def hardware(self) -> Hardware:
        """The data sheet of a device."""
        return HARDWARE[self.kind]


@dataclasses.dataclass(frozen=True)
class Compiler:
    """An installed compiler: its package, the version and the path of its library."""

    package: str
    version: str
    library: str
    is_importable: bool


def parse_target(text: str) -> Target:
    """Parses `text`, such as 'v5e:2x4' (a slice of TPU chips) or 'h100:16' (GPUs, in hosts of eight).

    Raises ConfigError: unknown hardware, or a shape that the hardware does not have.
    """
    kind, _, shape = text.partition(':')
    if kind not in HARDWARE:
        raise ConfigError(f'--target: {text!r} is not known; known are {", ".join(HARDWARE)}, such as {EXAMPLES}')
    if kind in _TPUS:
        axes, per_chip, _ = _TPUS[kind]
        example = 'x'.join(['2', '2', '2'][:axes])
        if not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){{{axes - 1}}}', shape):
            raise ConfigError(f'--target: {text!r} has no shape of {axes} axes; write for example {kind}:{example}')
        chips = 1
        for side in shape.split('x'):
            chips *= int(side)
        return Target(text, kind, chips * per_chip, f'{kind}:{shape}')
    if not re.fullmatch(r'[1-9]\d*', shape):
        raise ConfigError(f'--target: {text!r} has no number of GPUs; write for example {kind}:8')
    gpus = int(shape)
    hosts, rest = divmod(gpus, GPUS_PER_HOST)
    if hosts and rest:
        below = hosts * GPUS_PER_HOST
        raise ConfigError(
            f'--target: {text!r} is not a number of hosts of {GPUS_PER_HOST} GPUs; the nearest are {kind}:{below} and'
            f' {kind}:{below + GPUS_PER_HOST}'
        )
    return Target(text, kind, gpus, f'1x{hosts}x{GPUS_PER_HOST}' if hosts else f'1x1x{gpus}')


def find_compiler(target: Target, folder: str | None = None) -> Compiler:
    """Returns the installed compiler for `target`: that on Python's path, which JAX would load, or that in `folder`.

    `folder` is one into which `pip install --no-deps --target=FOLDER` installed the compiler.

    Raises ConfigError: no compiler is installed, or its version does not fit the installed jax.
    """
    wanted = {package: _wanted_version(package) for package in _LIBRARIES[target.platform]}
    package = next(iter(wanted))
    install = (
        f'pip install --no-deps --target=FOLDER "{package}=={wanted[package]}" and add --compilers=FOLDER, where FOLDER'
        ' is a new folder'
    )
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f'--compilers: {folder!r} is not a folder; {install}')
    misfit = None
    for places in (sys.path, [folder] if folder else []):
        for package, library in _LIBRARIES[target.platform].items():
            for found in importlib.metadata.distributions(name=package, path=places):
                path = os.path.abspath(str(found.locate_file(library)))
                if not os.path.isfile(path) or 'Version' not in found.metadata:  # an incomplete installation
                    continue
                if _fits(package, found.version, wanted[package]):
                    return Compiler(package, found.version, path, places is sys.path)
                misfit = f'{package} {found.version} in {path.removesuffix(library)}'
    if misfit:
        jax = importlib.metadata.version('jax')
        raise ConfigError(f'--target={target.text}: {misfit} does not fit jax {jax}; {install}')
    raise ConfigError(
        f'--target={target.text}: its compiler, {" or ".join(wanted)}, is not'
        f' {f"in {folder}" if folder else "installed"}; {install}'
    )


def requirements() -> list[str]:
    """Returns the requirement of pip for one compiler of each platform, for the installed jax."""
    packages = [next(iter(libraries)) for libraries in _LIBRARIES.values()]
    return [f'{package}=={_wanted_version(package)}' for package in packages]


def _wanted_version(package: str) -> str:
    """Returns the version of a compiler that the installed jax requires, such as '0.10.2' or '0.0.42.*'."""
    if package != 'libtpu':
        return importlib.metadata.version('jaxlib')
    required = importlib.metadata.requires('jax') or []
    return next((match[1] for each in required if (match := re.match(r'libtpu==([\d.*]+)', each))), '*')


def _fits(package: str, version: str, wanted: str) -> bool:
    """Returns whether a compiler of `version` works with the installed jax, which requires the version `wanted`.

    A plugin for GPUs must have the version of jaxlib, up to the patch number. A libtpu newer than the required one
    works, too.
    """

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r'\d+', text)]

    if package == 'libtpu':
        return numbers(version)[:3] >= numbers(wanted)[:3]
    return numbers(version)[:2] == numbers(wanted)[:2]


def set_environment(target: Target, compiler: Compiler) -> None:
    """Sets the environment variables with which JAX loads the compiler without its hardware. Call before importing jax.

    The variables keep libtpu from asking the metadata server of Google Cloud and from allowing only one process, and
    both compilers from warning that there is no accelerator.
    """
    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
    logging.getLogger('jax_plugins').setLevel(logging.ERROR)
    if target.platform == 'tpu':
        os.environ['TPU_LIBRARY_PATH'] = compiler.library
        os.environ['TPU_SKIP_MDS_QUERY'] = '1'
        os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
        os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
        os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
    elif not compiler.is_importable:  # otherwise JAX finds and registers the plugin by itself
        os.environ['PJRT_NAMES_AND_LIBRARY_PATHS'] = f'cuda:{compiler.library}'


def gpu_config(kind: str) -> str:
    """Returns the description of a GPU for its compiler, the text of XLA's GpuTargetConfigProto."""
    return _GPU_CONFIG.format(memory=HARDWARE[kind].memory, **_GPUS[kind])


def target_devices(target: Target, compiler: Compiler) -> Sequence[Any]:
    """Returns the devices of `target`, jax.Devices for which JAX can compile. Call set_environment() first.

    Raises ConfigError: the compiler refuses the topology.
    """
    import jax
    from jax.experimental import topologies

    try:
        if target.platform == 'tpu':
            description = topologies.get_topology_desc(target.topology, 'tpu', **_TPUS[target.kind][2])
        else:
            description = topologies.get_topology_desc(
                '', 'cuda', target_config=gpu_config(target.kind), topology=target.topology
            )
    except (jax.errors.JaxRuntimeError, IndexError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f'--target={target.text}: {compiler.package} {compiler.version} refuses this topology: {reason}'
        ) from None
    if len(description.devices) != target.devices:
        raise ConfigError(
            f'--target={target.text}: {compiler.package} {compiler.version} has {len(description.devices)} devices for'
            f' this topology, not {target.devices}'
        )
    return description.devices


if __name__ == '__main__':
    print(*requirements())
