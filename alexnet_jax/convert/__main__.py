"""Import weights of other frameworks as a run, or export a checkpoint to a file.

    alexnet convert FILE WORKDIR [--preset=NAME] [--mean=...] [--class_names=FILE] [--crop_size=PIXELS]
    alexnet convert CHECKPOINT FILE
    alexnet convert CHECKPOINT FOLDER/

Import: FILE is torchvision's `alexnet` from PyTorch, ONNX or a model hub (.pth, .onnx, .safetensors), a .caffemodel or
.onnx of Caffe's `bvlc_alexnet` or `bvlc_reference_caffenet`, or a .safetensors or .onnx exported by this command; the
content of FILE determines the format. FILE may be a folder that contains model.safetensors. The arrays determine the
widths and the number of classes. WORKDIR is a new folder, which receives a checkpoint of step 0.
Export: CHECKPOINT is a run's folder WORKDIR (its newest checkpoint), WORKDIR/best or WORKDIR/checkpoints/STEP. The
extension of FILE selects the format, see export.py. A new or empty FOLDER receives the weights, their settings and a
model card, ready for a model hub, see hub_folder.py.
"""

from absl import flags

from alexnet_jax import cli
from alexnet_jax.convert import export
from alexnet_jax.convert.importer import check_arguments, import_file
from alexnet_jax.runtime import backend
from alexnet_jax.runtime.checkpoint_ref import CHECKPOINT_HELP
from alexnet_jax.runtime.console import make_stdout_optional
from alexnet_jax.weights.formats import FormatError
from alexnet_jax.weights.weight_files import IMPORTABLE_PRESETS, MEAN_FORMS, find_weights


def main(argv: list[str]) -> int:
    """Converts argv[1] to argv[2]; returns the exit code."""
    given = flags.FLAGS
    make_stdout_optional()
    try:
        member = check_arguments(argv, given)
        if member is None or member.config.cpu_tuning:
            backend.configure_cpu_backend()
        backend.enable_compilation_cache()
        if member is None:
            import_file(str(find_weights(argv[1])), argv[2], given)
        else:
            from alexnet_jax.inference.trained_model import load_model

            export.write(load_model(member), argv[2])
    except FormatError as error:
        raise FormatError(f'{argv[1]}: {error}') from None
    return 0


if __name__ == '__main__':
    flags.DEFINE_enum('preset', None, IMPORTABLE_PRESETS, 'Preset of the network in FILE. Default: derived from FILE.')
    flags.DEFINE_string('mean', None, f'Mean of the training images, required for networks of Caffe: {MEAN_FORMS}.')
    flags.DEFINE_string(
        'class_names',
        None,
        "File with one class name per line, or Caffe's synset_words.txt. Default: the ids of ImageNet, or numbers.",
    )
    flags.DEFINE_integer(
        'crop_size', None, 'Height and width of the images of an ONNX file. Default: those in FILE.', lower_bound=1
    )
    cli.run(
        main,
        missing='no file is given; name a file of weights and a new folder, or a checkpoint and a file; a checkpoint is'
        f' {CHECKPOINT_HELP}',
        max_arguments=2,
        failures=(FormatError,),
    )
