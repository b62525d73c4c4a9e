"""The data set `photos`: patches of the photographs in the scikit-image package. The label is the photograph.

The source photos:first or photos:second has only the first or the second half of the photographs. A number after a
slash, as in photos:second/5, limits the training patches of each photograph; the validation patches stay the same.
"""

import dataclasses
import io
import re
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from alexnet_jax.prepare.raw_sources import SourceError

PHOTOGRAPHS = (
    'astronaut',
    'brick',
    'camera',
    'cell',
    'chelsea',
    'coffee',
    'coins',
    'grass',
    'gravel',
    'hubble_deep_field',
    'immunohistochemistry',
    'moon',
    'page',
    'retina',
    'rocket',
    'stereo_motorcycle',
)
GRID = 4  # cells per side; training and validation cells alternate like a checkerboard
PATCHES_PER_IMAGE = {'train': 400, 'validation': 100}  # per photograph
PATCH_SCALE = (0.6, 1.0)  # range of patch sides, relative to the shorter side of a cell


@dataclasses.dataclass
class Selection(tfds.core.BuilderConfig):
    """A part of the data set.

    Attributes:
      photographs: names of the photographs; their positions are the labels.
      train_patches: number of training patches per photograph.
    """

    photographs: tuple[str, ...] = PHOTOGRAPHS
    train_patches: int = PATCHES_PER_IMAGE['train']


def parse_selection(source: str) -> Selection | None:
    """Returns the part of the data set that `source` names, or None for all of it.

    `source` is photos, photos:HALF or photos:HALF/COUNT, where HALF is first or second. Raises SourceError: it has
    another form, or COUNT is too large.
    """
    if source == 'photos':
        return None
    most, middle = PATCHES_PER_IMAGE['train'], len(PHOTOGRAPHS) // 2
    match = re.fullmatch(r'photos:(first|second)(?:/([1-9]\d{0,2}))?', source)
    if match is None or int(match[2] or most) > most:
        raise SourceError(
            f'config.data.source: {source!r} is not photos:first or photos:second, with a number of training patches'
            f' per photograph from 1 to {most} after a slash or without it; for example photos:second/5'
        )
    half, count = match.groups()
    photographs = PHOTOGRAPHS[:middle] if half == 'first' else PHOTOGRAPHS[middle:]
    return Selection(
        name=f'{half}_{count}' if count else half, photographs=photographs, train_patches=int(count or most)
    )


def photograph(name: str) -> UInt8[np.ndarray, 'h w 3']:
    """Returns a photograph that scikit-image contains without a download; gray photographs get three equal channels."""
    import skimage.data

    image = getattr(skimage.data, name)()
    image = image[0] if isinstance(image, tuple) else image  # left image of the stereo pair
    return np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image[..., :3]


def cells(split: str, height: int, width: int) -> list[tuple[slice, slice]]:
    """Returns the regions (rows, columns) of a photograph that belong to `split`. The splits share no pixel."""
    rows = np.linspace(0, height, GRID + 1).astype(int)
    columns = np.linspace(0, width, GRID + 1).astype(int)
    parity = ('train', 'validation').index(split)
    return [
        (slice(rows[r], rows[r + 1]), slice(columns[c], columns[c + 1]))
        for r in range(GRID)
        for c in range(GRID)
        if (r + c) % 2 == parity
    ]


def patches(
    split: str, selection: Selection | None = None
) -> Iterator[tuple[str, UInt8[np.ndarray, 'side side 3'], int]]:
    """Yields (key, patch, label): square crops of the cells of `split`, with random size and position (fixed seed).

    The patches of a `selection` are those of the whole data set, with other labels.
    """
    selection = selection or Selection(name='all', photographs=PHOTOGRAPHS)
    counts = PATCHES_PER_IMAGE | {'train': selection.train_patches}
    for label, name in enumerate(selection.photographs):
        image = photograph(name)
        regions = [image[region] for region in cells(split, *image.shape[:2])]
        generator = np.random.default_rng([PHOTOGRAPHS.index(name), split == 'train'])
        for index in range(counts[split]):
            region = regions[index % len(regions)]
            side = int(min(region.shape[:2]) * generator.uniform(*PATCH_SCALE))
            top, left = (generator.integers(0, length - side + 1) for length in region.shape[:2])
            yield f'{name}_{index:04d}', region[top : top + side, left : left + side], label


class Photos(tfds.core.GeneratorBasedBuilder):
    """6,400 training and 1,600 validation patches of 16 photographs, from regions that share no pixel."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        photographs = self.builder_config.photographs if self.builder_config else PHOTOGRAPHS
        features = {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'label': tfds.features.ClassLabel(names=list(photographs)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in PATCHES_PER_IMAGE}

    def _generate_examples(self, split):
        for key, patch, label in patches(split, self.builder_config):
            file = io.BytesIO()
            Image.fromarray(patch).save(file, 'PNG', compress_level=1)  # four times as fast as the default level
            file.seek(0)
            yield key, {'image': file, 'label': label}
