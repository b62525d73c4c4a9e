"""The command `alexnet prepare` for the data set of a configuration."""

import csv
import io
from collections.abc import Sequence
from typing import Protocol

from alexnet_jax.config import DataConfig
from alexnet_jax.data.dataset import DatasetSettings
from alexnet_jax.paths import absolute_source
from alexnet_jax.runtime.commands import shell_command

_FLAGS = ('image_size', 'channels', 'encoding', 'validation_fraction', 'validation_split', 'max_corrupt_fraction')


class PrepareSettings(DatasetSettings, Protocol):
    """The settings of a prepared data set and of its preparation."""

    @property
    def validation_fraction(self) -> float:
        """Fraction of the training images to hold out if the source has no validation split."""


def prepare_flags(settings: PrepareSettings, data_dir: str, prepared_dir: str | None) -> list[str]:
    """Returns the flags of `alexnet prepare` for the data set of `settings`, without those that have their defaults."""
    flags = [f'--source={absolute_source("config.data.source", settings.source)}', f'--data_dir={data_dir}']
    flags += [] if prepared_dir is None else [f'--prepared_dir={prepared_dir}']
    values = {name: getattr(settings, name) for name in _FLAGS}
    flags += [f'--{name}={value}' for name, value in values.items() if value != getattr(DataConfig, name)]
    return flags + _class_names(settings.class_names or ())


def _class_names(names: Sequence[str]) -> list[str]:
    line = io.StringIO()
    csv.writer(line, lineterminator='').writerow(names)  # a name may contain a comma
    return [f'--class_names={line.getvalue()}'] if names else []


def replace_command(settings: PrepareSettings, data_dir: str, prepared_dir: str | None) -> str:
    """Returns the shell command that prepares the data set of `settings` anew and replaces the existing one."""
    return shell_command('prepare', *prepare_flags(settings, data_dir, prepared_dir), '--replace')
