"""The validation images of imported weights, which no run here was trained on."""

import os
from collections.abc import Sequence

from alexnet_jax.config import ConfigError, check_num_classes
from alexnet_jax.data.manifest import load_manifest
from alexnet_jax.data.open_or_prepare import find_prepared
from alexnet_jax.prepare.raw_sources import SourceError
from alexnet_jax.prepare.writer import PrepareConfig, preview
from alexnet_jax.runtime.checkpoint_ref import CheckpointRef, with_data_folders
from alexnet_jax.training.checkpoint_reader import restore


def check_own_data(refs: Sequence[CheckpointRef], data_dir: str | None, prepared_dir: str | None) -> None:
    """Raises ConfigError if all checkpoints have imported weights and the data of their settings is not available.

    The arguments are those of trained_model.open_eval_dataset(), which would otherwise try to prepare that data. The
    message names --source.
    """
    if any(restore(ref, None).run_state.dataset_fingerprint is not None for ref in refs):
        return
    config = with_data_folders(refs[0].config, data_dir, prepared_dir)
    data = config.data
    settings = PrepareConfig(
        source=data.source,
        image_size=data.image_size,
        channels=data.channels,
        encoding=data.encoding,
        class_names=data.class_names or (),
        validation_fraction=data.validation_fraction,
        validation_split=data.validation_split,
        num_classes=config.model.num_classes,
    )
    try:
        directory = find_prepared(data, data.data_dir, data.prepared_dir)
        if directory is None:
            preview(settings, data.data_dir, data.prepared_dir)
        else:
            check_num_classes(config.model.num_classes, directory, load_manifest(directory).class_names)
    except (SourceError, ConfigError) as error:
        is_folder = data_dir is not None and os.path.isdir(os.path.expanduser(data_dir))
        example = f'folder:{data_dir}' if is_folder else 'folder:DIR'
        raise ConfigError(
            f'{refs[0].name}: has imported weights without images; name the images to evaluate on, such as'
            f' --source={example} (its settings name {data.source}: {error})'
        ) from None
