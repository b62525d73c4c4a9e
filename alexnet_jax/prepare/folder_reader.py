"""Reads the files of each class in a folder of images, and notes what is ignored."""

import os
import unicodedata
from collections import Counter
from pathlib import Path

from alexnet_jax.prepare.folder_layout import check_classes, flat_error, is_flat
from alexnet_jax.prepare.image_files import (
    REMEDY,
    Files,
    files_below,
    has_other_files,
    list_folder,
    shortened,
    sized,
)
from alexnet_jax.prepare.label_files import label_flat_folder
from alexnet_jax.prepare.label_table import LabelTable, find_table, read_table, sorted_classes
from alexnet_jax.prepare.raw_sources import SourceError


class FolderReader:
    """Reads the files of the splits of a folder.

    Attributes:
      root: the folder; the paths of the files are relative to it.
      notes: what was chosen or ignored, one line each.
      ignored: number of ignored files by kind, see image_files.entries_of().
      label_file: path of the file with the labels of a flat folder; '' if there is none.
      roots: absolute paths of the folder and of the files with labels.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []
        self.ignored = Counter[str]()
        self.label_file = ''
        self.roots = [str(root)]

    def read_classes(self, folder: Path) -> tuple[dict[str, Files], bool]:
        """Returns the files of each class in `folder`, in the order of the classes, and whether the classes have names.

        Raises SourceError: there are no images, no classes, or unusable names.
        """
        path = find_table(folder)
        if path is not None:
            table = read_table(path)
            if len(set(table.splits or ())) > 1:
                raise SourceError(f'{path} has several splits; move it to {self.root}, and give paths relative to it')
            return self.read_table(table)
        if folder != self.root and is_flat(folder):
            raise flat_error(folder, self.root)
        folders, images = list_folder(folder, self.ignored)
        odd = next((name for name in folders if not name.isprintable()), None)  # such as bytes that are not UTF-8
        if odd is not None:
            raise SourceError(f'{folder}: rename the folder {odd!r}; the name of a class must be printable text')
        classes, others = {}, []
        for name in folders:
            ignored = Counter[str]()
            files = files_below(str(self.root), str(folder / name), ignored)
            if files or not has_other_files(ignored):
                classes[name] = files
                self.ignored += ignored
            else:
                others.append(f'{name}/')
        if not classes:
            found = Counter[str]()
            files_below(str(self.root), str(folder), found)
            kind = 'hf' if found['*.parquet'] else 'wds' if found['*.tar'] else None
            remedy = f'{kind}:{folder} reads the *.{"parquet" if kind == "hf" else "tar"} files' if kind else REMEDY
            raise SourceError(f'config.data.source: {folder} has no folders of images; {remedy}')
        if not any(classes.values()):
            raise SourceError(
                f'{folder}: the folders of its {len(classes)} classes are empty; add images, or name another folder'
            )
        self.note_strays(folder, images)
        if others:
            self.notes.append(f'folders in {folder} without images are not used: {shortened(others)}')
        inner = check_classes(folder, classes, len(os.path.join(folder, '')) - len(os.path.join(self.root, '')))
        if inner:
            self.notes.append(f'folders inside the folder of a class belong to the class: {shortened(sorted(inner))}')
        return classes, True

    def read_table(self, table: LabelTable, split: str | None = None) -> tuple[dict[str, Files], bool]:
        """Returns the files of each class in `split`, in the order of the classes, and whether the classes have names.

        Raises SourceError: no file exists.
        """
        files = table.files(str(self.root), split)
        if str(table.file) not in self.roots:
            self.roots.append(str(table.file))
        missing = [path for part in files.values() for path, size in part if size < 0]
        if missing:
            self.notes.append(f'{table.file.name} names files that do not exist: {shortened(missing, 1)}')
        note = f'{table.file.name} has columns that are not read: {shortened(table.unused)}' if table.unused else None
        if note and note not in self.notes:
            self.notes.append(note)
        names, are_names = sorted_classes(set(files))
        return {name: files[name] for name in names}, are_names

    def read_labeled(self, folder: Path, train: Path, classes: list[str]) -> tuple[dict[str, Files], str]:
        """Returns the files of each class in the split `folder`, and where the labels come from, if not from folders.

        Raises SourceError: the split has no images, or a class that is missing from `classes`, those of `train`.
        """
        if is_flat(folder):
            return self._read_known(folder, train, classes)
        files, _ = self.read_classes(folder)
        table = find_table(folder)
        unknown = sorted(name for name, of_class in files.items() if of_class and name not in classes)
        if unknown:
            same = next((name for name in classes if _simplified(name) == _simplified(unknown[0])), None)
            remedy = f'rename it to {same}' if same else 'remove it, or add training images of the class'
            where = f'the class {unknown[0]} of {table}' if table else f'{folder / unknown[0]} is a class that'
            raise SourceError(f'{where} is missing from {train}; {remedy}')
        return files, f' with {table.name}' if table else ''

    def read_flat(self, folder: Path, classes: list[str]) -> tuple[dict[str, Files], str]:
        """Returns the files of each class in the flat `folder`, and where the labels come from.

        Args:
          folder: a folder of images without folders of classes.
          classes: the sorted class names of the training set, which the files of Caffe number.

        Raises SourceError: the folder has no images, or there is no file with their labels.
        """
        _, images = list_folder(folder, self.ignored)
        if not images:
            raise SourceError(f'config.data.source: the split {folder} has no images; remove it, or add images')
        label_file, labels = label_flat_folder(folder, self.root, [image.name for image in images], classes)
        files: dict[str, Files] = {}
        unlabeled: list[str] = []
        for image, file in zip(images, sized(str(self.root), images), strict=True):
            label = labels.get(image.name)
            if label is None:
                unlabeled.append(image.name)
            else:
                files.setdefault(label, []).append(file)
        if unlabeled:
            listed = shortened(sorted(unlabeled), 1)
            self.notes.append(f'images of {folder} without a label in {label_file} are not used: {listed}')
        self.label_file = label_file
        if os.path.isabs(label_file):
            self.roots.append(label_file)
        return files, f' with the labels of {label_file}'

    def _read_known(self, folder: Path, train: Path, classes: list[str]) -> tuple[dict[str, Files], str]:
        """Returns the result of read_flat() for `classes`, those of the folder `train`, without other classes."""
        found, origin = self.read_flat(folder, classes)
        files: dict[str, Files] = {name: found.get(name, []) for name in classes}
        unknown = sorted(
            (os.path.basename(path), name) for name in found if name not in files for path, _ in found[name]
        )
        if not any(files.values()):
            raise SourceError(
                f'config.data.source: the classes of {folder} are names such as {unknown[0][1]} in {self.label_file},'
                f' but those of {train} are names such as {classes[0]}'
            )
        if unknown:
            listed = shortened([f'{image} ({name})' for image, name in unknown], 1)
            self.notes.append(f'images of {folder} with a class that is missing from {train} are not used: {listed}')
        return files, origin

    def note_strays(self, folder: Path, images: list[os.DirEntry[str]]) -> None:
        """Notes that `images`, which are directly in `folder`, have no class."""
        if images:
            names = sorted(image.name for image in images)
            self.notes.append(f'images in {folder}, but in no class folder, are not used: {shortened(names, 1)}')

    def is_label_folder(self, name: str) -> bool:
        """Returns whether the folder `name` contains the file with the labels of a flat folder."""
        return self.label_file.startswith(os.path.join(self.root, name, ''))


def _simplified(name: str) -> str:
    """Returns `name` without differences of case and of the encoding of accents, which depends on the system."""
    return unicodedata.normalize('NFC', name).casefold()
