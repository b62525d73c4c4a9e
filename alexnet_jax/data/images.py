"""From image files as the world has them to the square images of section 2 of the paper.

What becomes of each kind is one rule, whatever the source:
  grey                  three equal channels
  transparent           laid over white
  CMYK, YCCK            to RGB without a colour profile; JPEGs inverted, as Adobe writes them
  16 bits a channel     the upper eight
  turned by EXIF        upright
  animated, many pages  the first picture
Refused: what is no image, is cut off, has pixels without a known range (32 bits) or more than MAX_PIXELS of them.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's own bound against files that unpack to more than memory holds: 600 MB while such an image is converted.
MAX_PIXELS = 1024**3 // 12
# Of an image longer than this many times its width the middle is taken before it is scaled.
MAX_ASPECT_RATIO = 16


class UnreadableImage(ValueError):
    """Content that is not used: a few words that say why."""


def read_image(content: bytes | np.ndarray) -> Image.Image:
    """The picture in a file's `content`, or in an array (H, W) or (H, W, 3) of uint8, upright, of mode L or RGB.

    Raises UnreadableImage: see the module.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    if not content:
        raise UnreadableImage('an empty file')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of Pillow, about what the rules above decide
            image = Image.open(io.BytesIO(content))
            if image.format == 'EPS':
                raise UnreadableImage('EPS, which is a program')
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f'more than {MAX_PIXELS:,} pixels')
            ImageOps.exif_transpose(image, in_place=True)  # in place, it keeps its format
            return _grey_or_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage('no image, or of a kind that Pillow does not know') from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f'more than {MAX_PIXELS:,} pixels') from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damage
        what = ' '.join(str(error).split())[:80] or type(error).__name__
        raise UnreadableImage(f'damaged ({what})') from None


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PPM'):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise UnreadableImage('32 bits a pixel, whose range is unknown')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    return image.convert('L' if image.mode in ('1', 'L') else 'RGB')


def square(image: Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """Section 2 of the paper: the shorter side scaled to `size`, then the central square.

    Scaled with Pillow's bicubic filter, which when it makes smaller widens with the scale, so nothing is skipped.

    Args:
      image: of mode L or RGB, see read_image().
      size: pixels a side.
      channels: 3 spreads grey to three equal ones; 1 takes the luminance of colours.

    Returns:
      (size, size, channels) uint8.
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
