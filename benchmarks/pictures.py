"""JPEGs to prepare, read or train on: random crops of scikit-image's photographs, which are never downloaded."""

import functools
import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'hubble_deep_field', 'retina', 'rocket', 'stereo_motorcycle')
QUALITY = 93  # a JPEG of 500x375 pixels has 53 kB on average


@functools.cache
def photograph(name: str) -> Any:
    """Returns the photograph in color as a Pillow image."""
    import skimage.data
    from PIL import Image

    pixels = getattr(skimage.data, name)()
    return Image.fromarray((pixels[0] if isinstance(pixels, tuple) else pixels)[..., :3])


def make_picture(path: str, size: tuple[int, int]) -> None:
    """Writes a random crop of a photograph with `size` (width, height). The crop depends only on the file's name."""
    from PIL import Image

    name = os.path.basename(path)
    image, generator = photograph(PHOTOGRAPHS[int(name[-10:-4]) % len(PHOTOGRAPHS)]), random.Random(name)
    aspect = size[0] / size[1]
    width = min(image.width, image.height * aspect) * generator.uniform(0.5, 1)
    left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - width / aspect)
    box = (left, top, left + width, top + width / aspect)
    image.resize(size, Image.Resampling.BICUBIC, box=box).save(path, quality=QUALITY)


def make_pictures(
    folder: str, training: int, classes: int, size: tuple[int, int], validation: int = 32, processes: int = 2
) -> None:
    """Makes `folder` with train/ and val/, each with one folder per class, unless `folder` exists.

    Args:
      folder: the new folder.
      training, validation: numbers of images, which are assigned to the classes in turn.
      classes: number of classes.
      size: (width, height) of the images in pixels.
      processes: number of processes that write the images.
    """
    if os.path.exists(folder):
        return
    paths = []
    for split, images in (('train', training), ('val', validation)):
        for label in range(classes):
            os.makedirs(f'{folder}.incomplete/{split}/{label:04d}')
        paths += [f'{folder}.incomplete/{split}/{i % classes:04d}/{split}_{i:06d}.jpg' for i in range(images)]
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(functools.partial(make_picture, size=size), paths, chunksize=64))
    os.rename(f'{folder}.incomplete', folder)


def training_files(folder: str) -> list[Path]:
    """Returns the paths of all training JPEGs, with the classes in turn."""
    return sorted(Path(folder, 'train').glob('*/*.jpg'), key=lambda path: path.name)
