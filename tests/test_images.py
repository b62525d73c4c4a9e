"""Decoding of every kind of image file, and the geometry of resizing and cropping."""

import re

import numpy as np
import pytest
import zoo
from PIL import Image

from alexnet_jax.data.images import UnreadableImage, read_image, resize_and_center_crop

ZOO = zoo.zoo()


@pytest.mark.parametrize('name', ZOO)
def test_every_kind_of_image_file(name):
    content, expected = ZOO[name]
    if isinstance(expected, str):
        with pytest.raises(UnreadableImage, match=expected):
            read_image(content)
        return
    pixels = resize_and_center_crop(read_image(content), 32)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    np.testing.assert_allclose(pixels.mean((0, 1)), expected, atol=3)
    if name == 'turned.jpg':
        np.testing.assert_allclose(pixels[4, 16], 0, atol=12)
        np.testing.assert_allclose(pixels[28, 16], zoo.COLOR, atol=12)
    else:
        assert np.ptp(pixels, axis=(0, 1)).max() <= 3  # one color everywhere


def test_one_channel_is_luminance():
    image = Image.new('RGB', (80, 70), zoo.COLOR)
    for picture in (image, image.convert('L')):
        pixels = resize_and_center_crop(picture, 64, channels=1)
        assert pixels.shape == (64, 64, 1)
        np.testing.assert_allclose(pixels, zoo.GRAY, atol=1)
    np.testing.assert_array_equal(resize_and_center_crop(image.convert('L'), 64), np.full((64, 64, 3), zoo.GRAY))


def test_arrays_are_read_as_images():
    generator = np.random.default_rng(0)
    for shape in ((28, 28), (28, 28, 3)):
        pixels = generator.integers(0, 256, shape, np.uint8)
        result = resize_and_center_crop(read_image(pixels), 28)
        np.testing.assert_array_equal(result, np.broadcast_to(pixels.reshape(28, 28, -1), (28, 28, 3)))


@pytest.mark.parametrize(('width', 'height'), [(300, 200), (200, 300), (64, 64), (40, 90), (500, 65)])
def test_resize_scales_shorter_side_and_crops_center(width, height):
    """The center of a ramp along the longer side keeps its middle value and its scaled slope."""
    ramp = np.broadcast_to(np.linspace(0, 255, max(width, height)), (min(width, height), max(width, height)))
    ramp = (ramp if width >= height else ramp.T).astype(np.uint8)
    result = resize_and_center_crop(Image.fromarray(ramp), 64)
    assert result.shape == (64, 64, 3)
    along = result[32, :, 0].astype(float) if width >= height else result[:, 32, 0].astype(float)
    longer = max(width, height) / min(width, height)
    assert abs(along.mean() - 127) < 3
    assert abs((along[48] - along[16]) - 32 / 64 * 255 / longer) < 4


def bicubic_matrix(length: int, scaled: int) -> np.ndarray:
    """Returns weights (scaled, length) of Keys' cubic with a = -1/2, widened for downscaling."""
    scale = length / scaled
    width = max(scale, 1.0)
    centers = (np.arange(scaled) + 0.5) * scale
    distance = np.abs(np.arange(length)[None] + 0.5 - centers[:, None]) / width
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(('width', 'height'), [(150, 100), (100, 131), (40, 30)])
def test_resize_matches_bicubic_matrix(width, height):
    pixels = np.random.default_rng(0).integers(80, 176, (height, width), np.uint8)  # No value is clipped.
    size = 64
    scale = size / min(width, height)
    rows, columns = round(height * scale), round(width * scale)
    scaled = bicubic_matrix(height, rows) @ pixels.astype(float) @ bicubic_matrix(width, columns).T
    top, left = (rows - size) // 2, (columns - size) // 2
    expected = scaled[top : top + size, left : left + size]
    result = resize_and_center_crop(Image.fromarray(pixels), size, channels=1)[..., 0]
    # Pillow rounds to eight bits between the two directions.
    np.testing.assert_allclose(result, expected, atol=1.2)


def test_very_long_image_keeps_its_middle():
    pixels = np.zeros((5000, 2, 3), np.uint8)
    pixels[2490:2510] = zoo.COLOR
    result = resize_and_center_crop(Image.fromarray(pixels), 32)
    np.testing.assert_array_equal(result[16], np.broadcast_to(zoo.COLOR, (32, 3)))


def test_very_long_image_needs_little_memory():
    # The complete scaled image would have 130 GB.
    assert resize_and_center_crop(Image.new('L', (1, 2_000_000), 7), 256, channels=1).max() == 7


def test_16_bit_images_keep_the_upper_byte():
    values = np.array([[0, 255, 256, 511, 65279, 65280, 65535]], np.uint16)
    file = zoo.saved(Image.fromarray(values), 'PNG')
    np.testing.assert_array_equal(np.asarray(read_image(file)), [[0, 0, 1, 1, 254, 255, 255]])


def test_error_message_is_one_short_line():
    for content, expected in ZOO.values():
        if isinstance(expected, str):
            with pytest.raises(UnreadableImage) as caught:
                read_image(content)
            assert re.fullmatch(r'.{5,120}', str(caught.value))
