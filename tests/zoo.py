"""Image files as the world has them, made here, each with what is to become of it."""

import io
import re
import struct
import zlib

import numpy as np
from PIL import Image

COLOUR, GREY = (200, 80, 30), 110  # the grey is the colour's luminance
WIDTH, HEIGHT = 90, 60


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG written out by hand; `rows` are whole, each with its leading filter byte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack('>I', len(content)) + body + struct.pack('>I', zlib.crc32(body))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def ycck() -> bytes:
    """A CMYK JPEG whose marker says that its first three channels are luminance and chroma, and are so."""
    # Adobe keeps 255 - C, and a decoder makes it of the luminance and chroma of the opposite colour.
    opposite = tuple(255 - value for value in COLOUR)
    channels = Image.new('RGB', (WIDTH, HEIGHT), opposite).convert('YCbCr').split()
    inverted = [Image.fromarray(255 - np.asarray(channel)) for channel in channels]  # for Pillow inverts them again
    black = Image.new('L', (WIDTH, HEIGHT), 0)
    content = saved(Image.merge('CMYK', (*inverted, black)), 'JPEG', quality=95)
    marker = content.index(b'Adobe')
    assert content[marker + 11] == 0
    return content[: marker + 11] + b'\x02' + content[marker + 12 :]


def turned() -> bytes:
    """Lies on its side, left half black; upright, as EXIF says, the upper half is black."""
    pixels = np.full((HEIGHT, WIDTH, 3), COLOUR, np.uint8)
    pixels[:, : WIDTH // 2] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    return saved(Image.fromarray(pixels), 'JPEG', quality=95, exif=exif)


def transparent_palette() -> bytes:
    image = Image.new('P', (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, *COLOUR])
    return saved(image, 'PNG', transparency=bytes([255, 0]))


def zoo() -> dict[str, tuple[bytes, object]]:
    """name: (content, mean colour of the square it becomes, or a pattern of the reason why it is skipped)."""
    image = Image.new('RGB', (WIDTH, HEIGHT), COLOUR)
    random = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    noisy = saved(random, 'JPEG', quality=95)
    half = Image.new('RGBA', (WIDTH, HEIGHT), (*COLOUR, 127))
    over_white = tuple(round(255 - (255 - value) * 127 / 255) for value in COLOUR)
    frames = [Image.new('P', (WIDTH, HEIGHT), index) for index in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, *COLOUR, 0, 0, 255])
    grey16 = np.full((HEIGHT, WIDTH), GREY * 256 + 255, np.uint16)
    row16 = b'\0' + struct.pack('>HHH', *(value * 256 + 255 for value in COLOUR)) * WIDTH
    bomb = png(60000, 60000, 1, 0, bytes(7501) * 100)
    huge = Image.new('P', (9200, 9000), 1)
    huge.putpalette([0, 0, 0, *COLOUR])
    return {
        'plain.jpg': (saved(image, 'JPEG', quality=95), COLOUR),
        'progressive.jpg': (saved(image, 'JPEG', quality=95, progressive=True), COLOUR),
        'grey.jpg': (saved(Image.new('L', (WIDTH, HEIGHT), GREY), 'JPEG'), (GREY,) * 3),
        'cmyk.jpg': (saved(image.convert('CMYK'), 'JPEG', quality=95), COLOUR),
        'ycck.jpg': (ycck(), COLOUR),
        'turned.jpg': (turned(), tuple(value / 2 for value in COLOUR)),
        'truncated.jpg': (noisy[: len(noisy) // 2], 'damaged .*truncated'),
        'empty.jpg': (b'', 'an empty file'),
        'text.jpg': (b'<html>404 not found</html>', 'no image'),
        'headless.jpg': (noisy[:3], 'no image'),
        'png.JPEG': (saved(image, 'PNG'), COLOUR),  # as n02105855_2933.JPEG of ImageNet
        'no_ending': (saved(image, 'JPEG', quality=95), COLOUR),
        'palette.png': (saved(image.quantize(4), 'PNG'), COLOUR),
        'transparent_palette.png': (transparent_palette(), (255,) * 3),
        'half_transparent.png': (saved(half, 'PNG'), over_white),
        'grey_alpha.png': (saved(Image.new('LA', (WIDTH, HEIGHT), (GREY, 0)), 'PNG'), (255,) * 3),
        'one_bit.png': (saved(Image.new('1', (WIDTH, HEIGHT), 1), 'PNG'), (255,) * 3),
        'grey16.png': (saved(Image.fromarray(grey16), 'PNG'), (GREY,) * 3),
        'grey16.pgm': (b'P5 %d %d 65535\n' % (WIDTH, HEIGHT) + grey16.astype('>u2').tobytes(), (GREY,) * 3),
        'program.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', 'EPS, which is'),
        'colour16.png': (png(WIDTH, HEIGHT, 16, 2, row16 * HEIGHT), COLOUR),
        'damaged.png': (saved(random, 'PNG')[:-600], 'damaged'),
        'one_pixel_wide.png': (saved(Image.new('RGB', (1, 5000), COLOUR), 'PNG'), COLOUR),
        'one_pixel.png': (saved(Image.new('RGB', (1, 1), COLOUR), 'PNG'), COLOUR),
        'huge.png': (saved(huge, 'PNG', compress_level=1), COLOUR),
        'bomb.png': (bomb, re.escape('more than 89,478,485 pixels')),
        'animated.gif': (saved(frames[0], 'GIF', save_all=True, append_images=frames[1:], duration=100), COLOUR),
        'picture.webp': (saved(image, 'WEBP', lossless=True), COLOUR),
        'picture.bmp': (saved(image, 'BMP'), COLOUR),
        'picture.tiff': (saved(image, 'TIFF'), COLOUR),
        'float.tiff': (saved(Image.new('F', (WIDTH, HEIGHT), 0.5), 'TIFF'), '32 bits'),
        'whole_numbers.tiff': (saved(Image.new('I', (WIDTH, HEIGHT), 70000), 'TIFF'), '32 bits'),
    }
