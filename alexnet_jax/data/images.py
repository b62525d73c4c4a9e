"""Converts image files of any format to the square images of section 2 of the paper.

The same rules apply to all sources:
  gray                    three equal channels, unless the data set has one channel
  transparent             composited over white
  CMYK, YCCK              converted to RGB without a color profile; JPEGs are read as inverted, as Adobe writes them
  16 bits per channel     the upper eight bits
  EXIF orientation        applied, so that the image is upright
  animated or multi-page  the first image
read_image() rejects files that are not images or are truncated, EPS files, images of 32 bits per channel, whose value
range is unknown, and images of more than MAX_PIXELS pixels.
"""

import io
import os
import stat
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# The value of Pillow's MAX_IMAGE_PIXELS. The conversion of an image of this size takes 600 MB.
MAX_PIXELS = 1024**3 // 12
# An image with a larger ratio of longer to shorter side is center-cropped to this ratio before scaling.
MAX_ASPECT_RATIO = 16


# Brands of the formats HEIC and AVIF, at byte 8 of a file; Pillow may read AVIF, and never reads HEIC.
HEIF_BRANDS = (
    b'heic',
    b'heix',
    b'heim',
    b'heis',
    b'hevc',
    b'hevx',
    b'hevm',
    b'hevs',
    b'mif1',
    b'msf1',
    b'avif',
    b'avis',
)


class UnreadableImage(ValueError):
    """Raised for rejected content. The message is a short reason."""


def read_file(path: str) -> bytes:
    """Returns the content of a file.

    Raises UnreadableImage: `path` is a pipe, a socket or a device. Raises OSError: the file cannot be read.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe would wait for a writer
        kinds = {stat.S_IFIFO: 'a pipe', stat.S_IFSOCK: 'a socket'}
        raise UnreadableImage(f'{kinds.get(stat.S_IFMT(mode), "a device")}, not an image file')
    with open(path, 'rb') as file:
        return file.read()


def read_image(content: bytes | Image.Image | UInt8[np.ndarray, 'h w'] | UInt8[np.ndarray, 'h w 3']) -> Image.Image:
    """Returns the upright image, of mode L or RGB, from the bytes of a file, an image or an array of pixels.

    Raises UnreadableImage: the content is rejected, see the module docstring.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    if not content:
        raise UnreadableImage('an empty file')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns about cases that the rules above decide
            image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
            if image.format == 'EPS':
                raise UnreadableImage('EPS, which is a program, not an image')
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f'more than {MAX_PIXELS:,} pixels')
            if isinstance(content, Image.Image):
                image = content.copy()  # the image of the caller stays as it is
                image.format = content.format
            ImageOps.exif_transpose(image, in_place=True)  # in_place keeps image.format
            return _gray_or_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        if isinstance(content, bytes) and content[4:8] == b'ftyp' and content[8:12] in HEIF_BRANDS:
            raise UnreadableImage('HEIC or AVIF, which Pillow does not read; convert it to JPEG or PNG') from None
        raise UnreadableImage('not an image, or in a format that Pillow does not read') from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f'more than {MAX_PIXELS:,} pixels') from None
    except Exception as error:  # Pillow's decoders raise a dozen types for corrupt files
        what = ' '.join(str(error).split())[:80] or type(error).__name__
        raise UnreadableImage(f'corrupt ({what})') from None


def _gray_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PPM'):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise UnreadableImage('32 bits per pixel, with an unknown value range')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('L' if image.mode in ('1', 'L') else 'RGB')


def resize_and_center_crop(image: Image.Image, size: int, channels: int = 3) -> UInt8[np.ndarray, 'size size channels']:
    """Scales the shorter side to `size`, then crops the central square (section 2 of the paper).

    Pillow's bicubic filter is antialiased: the filter widens with the downscaling factor, so every pixel contributes.

    Args:
      image: image of mode L or RGB, see read_image().
      size: side of the square in pixels.
      channels: 3 replicates gray to three equal channels; 1 converts colors to luminance.
    """
    width, height = image.size
    shorter = min(width, height)
    if max(width, height) > MAX_ASPECT_RATIO * shorter:
        image = ImageOps.fit(image, (min(width, MAX_ASPECT_RATIO * shorter), min(height, MAX_ASPECT_RATIO * shorter)))
        width, height = image.size
    scale = size / shorter
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if channels == 1:
        image = image.convert('L')
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], channels, -1)
    return pixels
