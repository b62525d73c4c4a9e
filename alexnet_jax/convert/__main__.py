"""Import weights of other frameworks as a run, or export a checkpoint to a file.

    alexnet convert FILE WORKDIR [--preset=NAME] [--mean=...] [--class_names=FILE]
    alexnet convert CHECKPOINT FILE

Import: FILE is torchvision's `alexnet` from PyTorch or a model hub (.pth, .safetensors), a .caffemodel of Caffe's
`bvlc_alexnet` or `bvlc_reference_caffenet`, or a .safetensors exported by this command; the content of FILE determines
the format. The arrays determine the widths and the number of classes. WORKDIR is a new folder, which receives a
checkpoint of step 0.
Export: CHECKPOINT is defined in trained.py. The extension of FILE selects the format, see export.py.
"""

import os

from absl import app, flags, logging

from alexnet_jax.cli import parse_flags
from alexnet_jax.config import ConfigError
from alexnet_jax.convert import export
from alexnet_jax.convert.formats import FormatError
from alexnet_jax.convert.importer import (
    IMPORTABLE_PRESETS,
    MEAN_FORMS,
    check_arguments,
    import_file,
    refuse_foreign_options,
)
from alexnet_jax.inference.trained_model import CHECKPOINT_HELP, load_model
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.console import log_error


def main(argv: list[str]) -> int:
    """Converts argv[1] to argv[2]. Logs failures in one line; returns the exit code."""
    logging.set_verbosity(logging.ERROR)
    given = flags.FLAGS
    try:
        kind, member = check_arguments(argv, given)
    except (ConfigError, FormatError, OSError) as error:
        return refuse_foreign_options(argv[1], error)
    if member is None or member.config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    from alexnet_jax.training.checkpointing import CheckpointError  # imports jax, so only after flag parsing

    try:
        if kind:
            import_file(os.path.expanduser(argv[1]), kind, argv[2], given)
        else:
            export.write(load_model(member), argv[2])
    except (ConfigError, FormatError, CheckpointError, OSError) as error:
        return refuse_foreign_options(argv[1], error)
    except KeyboardInterrupt:
        log_error('stopped')
        return 130
    return 0


if __name__ == '__main__':
    flags.DEFINE_enum(
        'preset', None, IMPORTABLE_PRESETS, 'The network that FILE holds; by default what the file tells.'
    )
    flags.DEFINE_string('mean', None, f'Of the training images; needed for networks of Caffe: {MEAN_FORMS}.')
    flags.DEFINE_string(
        'class_names',
        None,
        "File with one name a line, or Caffe's synset_words.txt; by default ImageNet's ids, or numbers.",
    )
    wanted = f'what to convert? Name a file of weights and a new folder, or a checkpoint and a file: {CHECKPOINT_HELP}'
    app.run(main, flags_parser=lambda argv: parse_flags(argv, wanted, most=2))
