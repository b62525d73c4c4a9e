"""Image files of every kind, each with the color that it must decode to or the reason why it must be skipped."""

import io
import re
import struct
import zlib

import numpy as np
from PIL import Image

COLOR, GRAY = (200, 80, 30), 110  # GRAY is the luminance of COLOR.
WIDTH, HEIGHT = 90, 60


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """Returns a PNG written by hand; each of `rows` begins with its filter byte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack('>I', len(content)) + body + struct.pack('>I', zlib.crc32(body))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, kind, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def ycck() -> bytes:
    """Returns a CMYK JPEG whose first three channels are luminance and chroma, as its Adobe marker says."""
    # Adobe stores 255 - C, so the luminance and chroma are those of the inverted color.
    opposite = tuple(255 - value for value in COLOR)
    channels = Image.new('RGB', (WIDTH, HEIGHT), opposite).convert('YCbCr').split()
    inverted = [Image.fromarray(255 - np.asarray(channel)) for channel in channels]  # Pillow inverts them again.
    black = Image.new('L', (WIDTH, HEIGHT), 0)
    content = saved(Image.merge('CMYK', (*inverted, black)), 'JPEG', quality=95)
    marker = content.index(b'Adobe')
    assert content[marker + 11] == 0
    return content[: marker + 11] + b'\x02' + content[marker + 12 :]


def turned() -> bytes:
    """Returns a JPEG whose left half is black; its EXIF orientation rotates this half to the top."""
    pixels = np.full((HEIGHT, WIDTH, 3), COLOR, np.uint8)
    pixels[:, : WIDTH // 2] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotate by 90 degrees clockwise.
    return saved(Image.fromarray(pixels), 'JPEG', quality=95, exif=exif)


def transparent_palette() -> bytes:
    image = Image.new('P', (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, *COLOR])
    return saved(image, 'PNG', transparency=bytes([255, 0]))


def zoo() -> dict[str, tuple[bytes, object]]:
    """Returns (content, expected) by name: the mean color of the square image, or a pattern of the reason to skip."""
    image = Image.new('RGB', (WIDTH, HEIGHT), COLOR)
    random = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    noisy = saved(random, 'JPEG', quality=95)
    half = Image.new('RGBA', (WIDTH, HEIGHT), (*COLOR, 127))
    over_white = tuple(round(255 - (255 - value) * 127 / 255) for value in COLOR)
    frames = [Image.new('P', (WIDTH, HEIGHT), index) for index in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, *COLOR, 0, 0, 255])
    gray16 = np.full((HEIGHT, WIDTH), GRAY * 256 + 255, np.uint16)
    row16 = b'\0' + struct.pack('>HHH', *(value * 256 + 255 for value in COLOR)) * WIDTH
    bomb = png(60000, 60000, 1, 0, bytes(7501) * 100)
    huge = Image.new('P', (9200, 9000), 1)
    huge.putpalette([0, 0, 0, *COLOR])
    return {
        'plain.jpg': (saved(image, 'JPEG', quality=95), COLOR),
        'progressive.jpg': (saved(image, 'JPEG', quality=95, progressive=True), COLOR),
        'gray.jpg': (saved(Image.new('L', (WIDTH, HEIGHT), GRAY), 'JPEG'), (GRAY,) * 3),
        'cmyk.jpg': (saved(image.convert('CMYK'), 'JPEG', quality=95), COLOR),
        'ycck.jpg': (ycck(), COLOR),
        'turned.jpg': (turned(), tuple(value / 2 for value in COLOR)),
        'truncated.jpg': (noisy[: len(noisy) // 2], 'truncated'),
        'empty.jpg': (b'', 'empty'),
        'text.jpg': (b'<html>404 not found</html>', 'image'),
        'headless.jpg': (noisy[:3], 'image'),
        'png.JPEG': (saved(image, 'PNG'), COLOR),  # as n02105855_2933.JPEG of ImageNet
        'no_ending': (saved(image, 'JPEG', quality=95), COLOR),
        'palette.png': (saved(image.quantize(4), 'PNG'), COLOR),
        'transparent_palette.png': (transparent_palette(), (255,) * 3),
        'half_transparent.png': (saved(half, 'PNG'), over_white),
        'gray_alpha.png': (saved(Image.new('LA', (WIDTH, HEIGHT), (GRAY, 0)), 'PNG'), (255,) * 3),
        'one_bit.png': (saved(Image.new('1', (WIDTH, HEIGHT), 1), 'PNG'), (255,) * 3),
        'gray16.png': (saved(Image.fromarray(gray16), 'PNG'), (GRAY,) * 3),
        'gray16.pgm': (b'P5 %d %d 65535\n' % (WIDTH, HEIGHT) + gray16.astype('>u2').tobytes(), (GRAY,) * 3),
        'program.eps': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', 'EPS'),
        'color16.png': (png(WIDTH, HEIGHT, 16, 2, row16 * HEIGHT), COLOR),
        'damaged.png': (saved(random, 'PNG')[:-600], 'damaged|corrupt'),
        'one_pixel_wide.png': (saved(Image.new('RGB', (1, 5000), COLOR), 'PNG'), COLOR),
        'one_pixel.png': (saved(Image.new('RGB', (1, 1), COLOR), 'PNG'), COLOR),
        'huge.png': (saved(huge, 'PNG', compress_level=1), COLOR),
        'bomb.png': (bomb, re.escape('more than 89,478,485 pixels')),
        'animated.gif': (saved(frames[0], 'GIF', save_all=True, append_images=frames[1:], duration=100), COLOR),
        'picture.webp': (saved(image, 'WEBP', lossless=True), COLOR),
        'picture.bmp': (saved(image, 'BMP'), COLOR),
        'picture.tiff': (saved(image, 'TIFF'), COLOR),
        'float.tiff': (saved(Image.new('F', (WIDTH, HEIGHT), 0.5), 'TIFF'), '32 bits'),
        'whole_numbers.tiff': (saved(Image.new('I', (WIDTH, HEIGHT), 70000), 'TIFF'), '32 bits'),
    }
