"""Content of the report page as plain data, and the template that turns it into HTML.

A section is a title with a list of blocks; a block is a kind with a value:

    text, remark, missing (a reason for missing content), heading, command    str
    list                                                                      list[str]
    facts                                                                     dict[str, str]; empty values are omitted
    table, figure                                                             Table, Figure
    cards, small_cards                                                        list[Card]

The template escapes all text and renders text between backticks as code.
"""

import base64
import dataclasses
import io
import os
import re
from collections.abc import Sequence

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

Picture = dict[str, str | int]  # attributes of an <img>


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; `label` describes it for screen readers.

    Attributes:
      rows: the first cell of each row is its name.
      numeric: whether the other cells contain numbers.
      published: whether the last row contains published errors.
    """

    label: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True
    published: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing on white with a caption. A `wide` drawing keeps a readable size and scrolls on a small screen."""

    picture: Picture
    caption: str
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Card:
    """A photograph with the name of its class. `bars` are (class, probability in percent), most probable first."""

    picture: Picture
    name: str
    remark: str = ''
    bars: Sequence[tuple[str, int]] = ()
    framed: bool = False


Block = tuple[str, str | list[str] | dict[str, str] | Table | Figure | list[Card]]
Section = tuple[str, list[Block]]


def png_picture(png: bytes, alt: str) -> Picture:
    """Embeds a PNG file; `alt` is the text alternative of the image."""
    width, height = Image.open(io.BytesIO(png)).size
    data = base64.b64encode(png).decode()
    return {'src': f'data:image/png;base64,{data}', 'width': width, 'height': height, 'alt': alt}


def pixel_picture(pixels: UInt8[np.ndarray, 'h w c'], alt: str, max_pixels: int = 144) -> Picture:
    """Embeds an image with C = 1 or 3, scaled down to at most `max_pixels` on either side."""
    image, file = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), io.BytesIO()
    image.thumbnail((max_pixels, max_pixels), Image.Resampling.LANCZOS)
    image.save(file, 'png', optimize=True)
    return png_picture(file.getvalue(), alt)


def render(title: str, lead: str, sections: list[Section], command: str) -> bytes:
    """Returns the page as the content of an HTML file. `lead` is a summary, `command` the running command."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, autoescape=True)
    environment.loader = jinja2.FileSystemLoader(os.path.dirname(__file__))
    environment.undefined = jinja2.StrictUndefined
    environment.filters['split_code'] = re.compile('`([^`]+)`').split  # every second part is code
    template = environment.get_template('report.html.j2')
    text = template.render(title=title, lead=lead, sections=sections, command=command)
    return text.encode('utf-8', 'replace')  # file names may contain surrogates
