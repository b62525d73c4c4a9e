"""Describes the data set of a command without writing anything: its data card, and whether it is prepared."""

import contextlib
import dataclasses
import io

from alexnet_jax.data.dataset import PreparedDataset, dataset_dir, read_manifest
from alexnet_jax.data.open_or_prepare import find_prepared, find_trained_on, open_verified
from alexnet_jax.prepare import writer
from alexnet_jax.prepare.data_card import DataCard, card_of_prepared
from alexnet_jax.runtime.files import JsonObject, free_bytes


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known about a data set.

    Attributes:
      card: its content.
      state: its folder, whether it is prepared, and its size, one line each.
      prepared: the data set; None if it is not prepared.
    """

    card: DataCard
    state: list[str]
    prepared: PreparedDataset | None

    def lines(self) -> list[str]:
        """Returns the description, one fact per line."""
        return [*self.state, *self.card.lines()]

    def to_json(self) -> JsonObject:
        """Returns the description as a JSON object."""
        return self.card.to_json() | {'state': self.state, 'prepared': self.prepared is not None}


def describe(
    settings: writer.PrepareConfig, data_dir: str, prepared_dir: str | None, trained_on: str | None = None
) -> Description:
    """Returns the description of the data set with `settings`; see writer.prepare() and open_or_prepare().

    Raises SourceError, ConfigError or OSError: the data set is corrupt or cannot be prepared, or the source has other
    classes than `settings`.
    """
    of_run = find_trained_on(settings, data_dir, prepared_dir, trained_on) if trained_on else None
    directory = of_run[0] if of_run else find_prepared(settings, data_dir, prepared_dir)
    if of_run:
        settings = dataclasses.replace(settings, source=of_run[1])
    if directory is None:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints unknown sizes
            found = writer.preview(settings, data_dir, prepared_dir)
        if isinstance(found, writer.Preview):
            return _describe_preview(found, settings, data_dir, prepared_dir)
        directory = found
    prepared = open_verified(directory, settings, data_dir, prepared_dir, settings.num_classes)
    manifest = read_manifest(directory, settings)
    card = card_of_prepared(manifest, prepared.statistics['class_counts'])
    return Description(card, [f'{directory}: prepared, {size_text(sum(manifest.files.values()))}'], prepared)


def _describe_preview(
    found: writer.Preview, settings: writer.PrepareConfig, data_dir: str, prepared_dir: str | None
) -> Description:
    directory = dataset_dir(data_dir, settings, prepared_dir)
    parts = [f'TFDS downloads {size_text(found.download_bytes)}'] if found.download_bytes else []
    parts.append(f'the data set takes about {size_text(found.bytes)}{"" if found.card.images else " per image"}')
    if found.complete:
        parts.append(f'{found.complete:,} images were prepared by an earlier run')
    parts.append(f'{size_text(free_bytes(prepared_dir or data_dir))} are free')
    state = [f'{directory}: not prepared yet; the command prepares it from {settings.source}', '; '.join(parts)]
    return Description(found.card, state, None)


def size_text(size: float) -> str:
    """Returns `size` bytes as text, such as '488 MB'."""
    for unit, factor in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if size >= factor:
            number = size / factor
            return f'{number:,.0f} {unit}' if number >= 10 else f'{number:.1f} {unit}'
    return f'{size:.0f} bytes'
