"""The images in tar files of WebDataset, and their labels: members with the same key are one example."""

import collections
import dataclasses
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from alexnet_jax.paths import shown
from alexnet_jax.prepare.tar_members import BLOCK_BYTES, Member, read_members

_IMAGE_ENDINGS = ('jpg', 'jpeg', 'png', 'webp', 'ppm', 'pgm', 'bmp', 'tif', 'tiff', 'gif')
_LABEL_FIELDS = ('label', 'cls', 'class')  # of a member .json
_MAX_LABEL_BYTES = 1000
_MAX_JSON_BYTES = 1 << 20


@dataclasses.dataclass(slots=True)
class _Group:
    """The members of one key: position of the header of the image, code of the label, and the member .json."""

    image: int = -1
    label: int = -1
    json: Member | None = None


class TarIndex:
    """Positions and labels of the images in the tar files of a split, in the order of the images.

    Attributes:
      counts: images by tar file.
      headers: position of the header of each image.
      codes: code of the label of each image; -1 if the image has none.
      texts: code of each label.
      endings: number of members by ending.
      problems: count and first name of what is not used, by problem.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.headers, self.codes = array('q'), array('i')
        self.texts: dict[str, int] = {}
        self.endings: collections.Counter[str] = collections.Counter()
        self.problems: dict[str, tuple[int, str]] = {}

    def add(self, path: str) -> None:
        """Indexes a tar file. Raises SourceError: see tar_members.read_members(). Raises OSError: it is unreadable."""
        images, codes, hashes = array('q'), array('i'), array('q')
        with open(path, 'rb', buffering=0) as file:
            for key, group in self._groups(file.fileno(), path):
                if group.image >= 0:
                    images.append(group.image)
                    codes.append(group.label)
                    hashes.append(hash(key))
                elif group.label >= 0:
                    self._count('labels without an image', f'{path}/{key}')
            order = np.argsort(np.array(images))
            is_first = np.zeros(len(order), bool)
            is_first[np.unique(np.array(hashes)[order], return_index=True)[1]] = True
            for position in order[~is_first]:
                name = next(read_members(file.fileno(), path, images[position])).name
                self._count('images with the key of an earlier image', f'{path}/{name}')
            if any(os.pread(file.fileno(), BLOCK_BYTES, max(0, os.path.getsize(path) - BLOCK_BYTES))):
                self._count('tar files without an end mark, which may be incomplete', path)
        self.counts.append(int(is_first.sum()))
        self.headers.extend(np.array(images)[order[is_first]].tolist())
        self.codes.extend(np.array(codes)[order[is_first]].tolist())

    def _groups(self, descriptor: int, path: str) -> Iterator[tuple[str, _Group]]:
        """Yields the keys and their members: those with image and label, then the others."""
        others: dict[str, _Group] = {}  # usually empty, because the members of a key are next to each other
        key, group = '', _Group()
        for member in read_members(descriptor, path):
            folder, slash, base = member.name.rpartition('/')
            stem, _, ending = base.partition('.')
            if not stem:  # a hidden file
                continue
            if folder + slash + stem != key:
                if self._is_complete(descriptor, group):
                    yield key, group
                else:
                    others[key] = group
                key = folder + slash + stem
                group = others.pop(key, _Group())
            ending = ending.lower()
            self.endings[ending] += 1
            if ending in _IMAGE_ENDINGS and group.image < 0:
                group.image = member.header
            elif ending in _IMAGE_ENDINGS:
                self._count('images with the key of an earlier image', f'{path}/{member.name}')
            elif ending == 'cls':
                group.label = self._code(_read_text(descriptor, member, _MAX_LABEL_BYTES))
            elif ending == 'json':
                group.json = member
        others[key] = group
        for key, group in others.items():
            self._is_complete(descriptor, group)
            yield key, group

    def _is_complete(self, descriptor: int, group: _Group) -> bool:
        if group.image >= 0 and group.label < 0 and group.json is not None:
            group.label = self._code(_json_label(descriptor, group.json))
        return group.image >= 0 and group.label >= 0

    def _code(self, text: str | None) -> int:
        return -1 if not text else self.texts.setdefault(text, len(self.texts))

    def _count(self, problem: str, name: str) -> None:
        count, first = self.problems.get(problem, (0, name))
        self.problems[problem] = (count + 1, first)

    def notes(self) -> tuple[str, ...]:
        """Returns what is not used, one line each."""
        return tuple(
            f'{problem}: {count}; the first is {shown(first)}' for problem, (count, first) in self.problems.items()
        )

    def values(self) -> Sequence[int | str]:
        """Returns the labels by code: as numbers if all are numbers."""
        if all(re.fullmatch(r'-?[0-9]+', text) for text in self.texts):
            return [int(text) for text in self.texts]
        return list(self.texts)


def _read_text(descriptor: int, member: Member, limit: int) -> str | None:
    """Returns the text in a member without blanks around it; None if it is no text or exceeds `limit` bytes.

    A link has no content, so it is not followed.
    """
    if member.size > limit:
        return None
    try:
        return os.pread(descriptor, member.size, member.start).decode().strip()
    except UnicodeDecodeError:
        return None


def _json_label(descriptor: int, member: Member) -> str | None:
    """Returns the label in a member .json; None if it has none."""
    try:
        content = json.loads(_read_text(descriptor, member, _MAX_JSON_BYTES) or '')
    except (ValueError, RecursionError):
        return None
    labels = [content[field] for field in _LABEL_FIELDS if field in content] if isinstance(content, dict) else []
    label = labels[0] if labels else None
    if isinstance(label, bool) or not isinstance(label, int | str):
        return None
    return str(label).strip()[:_MAX_LABEL_BYTES]
