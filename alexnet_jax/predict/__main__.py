"""Classify images with a trained model, as in the left half of the paper's figure 4.

    alexnet predict CHECKPOINT IMAGE... [--views=10] [--top=5] [--json] [--figure=FILE.png]

CHECKPOINT is a run's folder WORKDIR (its newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP. IMAGE is a file
in any format that `prepare` reads, or a folder, which stands for all files below the folder. The command scales, crops
and normalizes images as the run does. If the folder that contains an image has the name of a class, the
folder name is the true label. If images are unreadable, the command reports them, classifies the others, and exits with
code 1. --validation=8 also classifies about 8 images of the run's validation data.
"""

import itertools
import math

from absl import flags

from alexnet_jax import cli
from alexnet_jax.config import ConfigError
from alexnet_jax.inference.images import expand_paths, load_images, sample_validation
from alexnet_jax.predict.records import MAX_FIGURE_IMAGES
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.checkpoint_ref import CHECKPOINT_HELP, parse_checkpoint_ref
from alexnet_jax.runtime.console import log


def main(argv: list[str]) -> int:
    """Classifies the images argv[2:] with the model argv[1]; returns the exit code, 1 if an image is unreadable."""
    given = flags.FLAGS
    if len(argv) < 3 and not given.validation:
        raise ConfigError('no image is given; name files or folders after the checkpoint, or set --validation=8')
    given.figure = cli.check_output('figure', given.figure, ('.png', '.pdf'))
    ref, files = parse_checkpoint_ref(argv[1]), expand_paths(argv[2:])
    if ref.config.cpu_tuning:
        backend.configure_cpu_backend()
    backend.enable_compilation_cache()
    from alexnet_jax.inference.trained_model import load_model, open_eval_dataset
    from alexnet_jax.predict.classify import classify

    folders = given.data_dir, given.prepared_dir
    prepared = open_eval_dataset([ref], *folders) if given.validation else None
    sampled = sample_validation(prepared, given.validation) if prepared else []
    model = load_model(ref, prepared)
    log(f'{model.name}: step {model.step}, {len(model.class_names)} classes')
    images = itertools.chain(load_images(files, model.config.data, model.class_names), sampled)
    return 1 if classify(model, images, len(files) + len(sampled), given) else 0


if __name__ == '__main__':
    flags.DEFINE_enum(
        'views', '10', ['1', '10'], 'Views per image: its center, or ten, whose softmax outputs are averaged.'
    )
    flags.DEFINE_integer('top', 5, 'Number of classes to print.', lower_bound=1)
    flags.DEFINE_integer(
        'validation', 0, "Number of evenly spaced images of the run's validation data to classify too.", lower_bound=0
    )
    flags.DEFINE_string('data_dir', None, "Folder of the prepared data sets. Default: the run's data.data_dir.")
    flags.DEFINE_string('prepared_dir', None, 'Folder of the prepared data sets. Default: `prepared` in data.data_dir.')
    flags.DEFINE_bool('json', False, 'Print one JSON object per image and line.')
    flags.DEFINE_string('figure', None, f'FILE.png or FILE.pdf for a figure of the first {MAX_FIGURE_IMAGES} images.')
    cli.run(
        main,
        missing=f'no checkpoint is given; name {CHECKPOINT_HELP}, and images: alexnet predict CHECKPOINT IMAGE...',
        max_arguments=math.inf,
    )
