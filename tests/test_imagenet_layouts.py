"""ImageNet and Tiny ImageNet as they lie on disks: flat validation folders, each with its file of labels."""

import io
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from test_sources import content, opened, tree

from alexnet_jax.prepare.raw_sources import Source, SourceError

CLASSES = ('n01440764', 'n01751748', 'n02105855', 'n09193705')
# Class of each validation image, from 1. The first three are those of ILSVRC2012.
TRUTH = (1, 3, 2, 0, 0, 3, 1, 2, 1, 0)
IDS = (3, 1, 4, 2)  # ILSVRC2012_ID of each class, in another order than the sorted classes
CLS_LOC = 'ILSVRC/Data/CLS-LOC'
EXPECTED = sorted((label, number) for number, label in enumerate(TRUTH, 1))


def val_name(number: int) -> str:
    return f'ILSVRC2012_val_{number:08d}.JPEG'


def write_images(root: Path, train: str = '', classes: tuple[str, ...] = CLASSES, name=val_name) -> Path:
    """Writes train/CLASS/ and a flat val/ in random order; each file contains its own path."""
    tree(root, *(f'train/{wnid}/{train}{wnid}_{i}.JPEG' for wnid in classes for i in range(3)))
    return tree(root, *(f'val/{name(number)}' for number in shuffled(range(1, len(TRUTH) + 1))))


def shuffled(values) -> list:
    return random.Random(0).sample(list(values), len(values))


def validation(source: Source) -> list[tuple[str, int]]:
    """Returns the file name and label of each validation image; checks the contents of the files."""
    found = content(source.splits['validation'])
    assert all(bytes.decode().endswith(name) for name, bytes, _ in found)
    return [(name.split('/')[-1], label) for name, _, label in found]


def check(root: Path, labels_of: str, at: str = '') -> Source:
    """Checks that `root` has the labels of TRUTH, from the file `labels_of`, and returns the source."""
    source = opened(f'folder:{root / at}')
    assert source.class_names == list(CLASSES)
    assert not source.holds_out_validation
    assert validation(source) == [(val_name(number), label) for label, number in EXPECTED]
    assert source.origins['validation'] == f'val/ with the labels of {labels_of}'
    assert [label for *_, label in content(source.splits['train'])] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    return source


def refusal(root: Path) -> str:
    with pytest.raises(SourceError) as caught:
        opened(f'folder:{root}')
    assert '\n' not in str(caught.value)
    return str(caught.value)


# Kaggle.


def write_solution(path: Path, line_end: str = '\n') -> Path:
    lines = ['ImageId,PredictionString']
    for number in shuffled(range(1, len(TRUTH) + 1)):
        wnid = CLASSES[TRUTH[number - 1]]
        boxes = [f'{wnid} {number} 2 30 40', f'{wnid} 5 6 7 8'][: 1 + number % 2]
        lines.append(f'{val_name(number)[:-5]},{" ".join(boxes)} ')
    path.write_text(line_end.join([*lines, '']), newline='')
    return path


@pytest.fixture
def kaggle(tmp_path) -> Path:
    """Returns the tree of Kaggle's competition imagenet-object-localization-challenge."""
    root = tmp_path / 'kaggle'
    write_images(root / CLS_LOC)
    tree(root / CLS_LOC, *(f'test/ILSVRC2012_test_{i:08d}.JPEG' for i in range(1, 4)))
    tree(root / 'ILSVRC', f'Annotations/CLS-LOC/train/{CLASSES[0]}/{CLASSES[0]}_1.xml', 'ImageSets/CLS-LOC/val.txt')
    tree(root, 'samples/1.jpg', 'LOC_sample_submission.csv', 'LOC_synset_mapping.txt', 'LOC_train_solution.csv')
    return root


@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
@pytest.mark.parametrize('at', ['', 'ILSVRC', 'ILSVRC/Data', CLS_LOC])
def test_tree_of_kaggle(kaggle, at, line_end):
    solution = write_solution(kaggle / 'LOC_val_solution.csv', line_end)
    source = check(kaggle, str(solution), at)
    assert 'test is not used; it has no classes' in source.notes
    assert (f'the images are read from {kaggle / CLS_LOC}' in source.notes) == (at != CLS_LOC)
    assert source.roots == (str(kaggle / CLS_LOC), str(solution))


def test_solution_next_to_the_folders_and_a_folder_above(kaggle):
    other = kaggle.parent / 'elsewhere'
    (kaggle / CLS_LOC).rename(other)
    check(other, str(write_solution(other / 'LOC_val_solution.csv')))
    check(other, str(write_solution(other / 'val' / 'LOC_val_solution.csv')))  # the nearest file


def test_training_folder_of_kaggle_alone(kaggle):
    source = opened(f'folder:{kaggle / CLS_LOC}/train', 0.34)
    assert source.holds_out_validation
    assert any(note.startswith(f'test and val next to {kaggle / CLS_LOC}/train are not used') for note in source.notes)


def test_images_without_a_usable_label_are_named(kaggle):
    solution = write_solution(kaggle / 'LOC_val_solution.csv')
    lines = solution.read_text().splitlines(keepends=True)
    solution.write_text(
        ''.join(line for line in lines if not line.startswith(('ILSVRC2012_val_00000004', val_name(9)[:-5])))
    )
    for path in (kaggle / CLS_LOC / 'train' / CLASSES[2]).iterdir():
        path.unlink()
    (kaggle / CLS_LOC / 'train' / CLASSES[2]).rmdir()
    source = opened(f'folder:{kaggle}')
    assert source.class_names == [CLASSES[0], CLASSES[1], CLASSES[3]]
    names = {0: 'n01440764', 1: 'n01751748', 3: 'n09193705'}
    wanted = [(val_name(number), names[label]) for label, number in EXPECTED if label != 2 and number not in (4, 9)]
    assert [(name, source.class_names[label]) for name, label in validation(source)] == wanted
    place = kaggle / CLS_LOC
    assert f'images of {place}/val without a label in {solution} are not used: {val_name(4)} and 1 more' in source.notes
    assert (
        f'images of {place}/val with a class that is missing from {place}/train are not used:'
        f' {val_name(3)} (n02105855) and 1 more'
    ) in source.notes


@pytest.mark.parametrize(
    ('line', 'reason'),
    [
        (
            'ILSVRC2012_val_00000001,n01440764 1 2 3 4',
            'line 12: ILSVRC2012_val_00000001 has the class n01440764, but n01751748',
        ),
        ('ILSVRC2012_val_00000001', 'line 12: expected an image and one class'),
        ('ILSVRC2012_val_00000001,', 'line 12: expected an image and one class'),
        ('ILSVRC2012_val_00000011,n01440764 1 2 3 4 n01751748 1 2 3 4', 'line 12: expected an image and one class'),
        ('"ILSVRC2012_val_00000011,n01440764 1 2 3 4', 'not valid CSV'),
    ],
)
def test_corrupt_solutions_are_refused(kaggle, line, reason):
    with open(write_solution(kaggle / 'LOC_val_solution.csv'), 'a') as file:
        file.write(line)
    message = refusal(kaggle)
    assert message.startswith(f'{kaggle}/LOC_val_solution.csv, line')
    assert re.search(reason, message)


def test_classes_with_other_names_are_refused(kaggle):
    solution = write_solution(kaggle / 'LOC_val_solution.csv')
    for number, wnid in enumerate(CLASSES):
        (kaggle / CLS_LOC / 'train' / wnid).rename(kaggle / CLS_LOC / 'train' / str(number))
    message = refusal(kaggle)
    assert re.search(rf'n\d{{8}} in {solution}, but those of {kaggle / CLS_LOC}/train are names such as 0', message)


# The development kit of ILSVRC2012.


def devkit_files(ids=IDS) -> dict[str, bytes]:
    """Returns the content of the two files; meta.mat has the fields of the original and synsets that are no classes."""
    fields = (
        'ILSVRC2012_ID',
        'WNID',
        'words',
        'gloss',
        'num_children',
        'children',
        'wordnet_height',
        'num_train_images',
    )
    rows = [
        (number, wnid, f'the {wnid}, a thing', 'gloss', 0, [], 0, 3) for number, wnid in zip(ids, CLASSES, strict=True)
    ]
    rows += [(5, 'n00001740', 'entity', 'that which exists', 2, [6.0, 1.0], 2, 0)]
    rows += [(6, 'n00001930', 'physical entity', 'an entity', 3, [2.0, 3.0, 4.0], 1, 0)]
    synsets = np.empty((len(rows), 1), [(name, object) for name in fields])
    for i, row in enumerate(sorted(rows)):
        for name, value in zip(fields, row, strict=True):
            synsets[name][i, 0] = value if isinstance(value, str) else np.array([value], np.float64)
    file = io.BytesIO()
    scipy.io.savemat(file, {'synsets': synsets})
    truth = ''.join(f'{ids[label]}\r\n' for label in TRUTH)
    return {'ILSVRC2012_validation_ground_truth.txt': truth.encode(), 'meta.mat': file.getvalue()}


def write_devkit(place: Path, files: dict[str, bytes]) -> Path:
    """Writes the files of the development kit in the folder `place` and returns the path of the ground truth."""
    place.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        (place / name).write_bytes(file)
    return place / 'ILSVRC2012_validation_ground_truth.txt'


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w:gz') as archive:
        for name, file in {'readme.txt': b'Introduction', **files}.items():
            member = tarfile.TarInfo(f'ILSVRC2012_devkit_t12/data/{name}')
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file))
    return path


@pytest.mark.parametrize(
    'place', ['images/ILSVRC2012_devkit_t12/data', 'ILSVRC2012_devkit_t12/data', 'images/val', 'images']
)
def test_development_kit(tmp_path, place):
    root = write_images(tmp_path / 'images')
    source = check(root, str(write_devkit(tmp_path / place, devkit_files())))
    assert not any('is not used' in note for note in source.notes)


@pytest.mark.parametrize('place', ['images', '.', 'images/val'])
def test_archive_of_the_development_kit_is_not_extracted(tmp_path, place):
    root = write_images(tmp_path / 'images')
    archive = write_archive(tmp_path / place / 'ILSVRC2012_devkit_t12.tar.gz', devkit_files())
    check(root, str(archive))
    assert [path.name for path in archive.parent.iterdir() if 'devkit' in path.name] == [archive.name]


def test_corrupt_development_kits_are_refused(tmp_path):
    root, files = write_images(tmp_path), devkit_files()
    truth, meta = files
    folder = tmp_path / 'ILSVRC2012_devkit_t12' / 'data'
    write_devkit(folder, {truth: files[truth].replace(b'4\r\n', b'77\r\n', 1), meta: files[meta]})
    assert re.search(r"ground_truth.txt: line 3 of the ground truth is '77'", refusal(root))
    write_devkit(folder, {truth: files[truth], meta: files[meta][:200]})
    assert re.search('ground_truth.txt: meta.mat is corrupt', refusal(root))
    (folder / meta).unlink()
    assert re.search('meta.mat is missing', refusal(root))
    (folder / truth).unlink()
    archive = write_archive(root / 'ILSVRC2012_devkit_t12.tar.gz', {truth: files[truth]})
    assert re.search(r'tar.gz must contain .*meta.mat', refusal(root))
    write_archive(archive, files)
    archive.write_bytes(archive.read_bytes()[:-300])
    assert re.search(r'tar.gz is corrupt', refusal(root))


def test_members_of_an_archive_that_are_no_files_are_not_read(tmp_path):
    root, files = write_images(tmp_path / 'images'), devkit_files()
    (tmp_path / 'secret').write_text('1\n' * 10)
    with tarfile.open(root / 'ILSVRC2012_devkit_t12.tar.gz', 'w:gz') as archive:
        for name, file in files.items():
            member = tarfile.TarInfo(f'../../ILSVRC2012_devkit_t12/data/{name}')
            if name == 'meta.mat':
                member.size = len(file)
                archive.addfile(member, io.BytesIO(file))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / 'secret')
                archive.addfile(member)
    before = sorted(tmp_path.rglob('*'))
    assert re.search('must contain', refusal(root))
    assert sorted(tmp_path.rglob('*')) == before


# Caffe, TFDS and Tiny ImageNet.


@pytest.mark.parametrize('place', ['', 'val/'])
def test_numbers_of_caffe_are_those_of_the_sorted_classes(tmp_path, place):
    root = write_images(tmp_path)
    lines = [f'{val_name(number)} {TRUTH[number - 1]}\n' for number in shuffled(range(1, 11))]
    (root / f'{place}val.txt').write_text(''.join(lines))
    check(root, f'{root}/{place}val.txt')


def test_numbers_of_caffe_are_those_of_all_classes_if_some_are_missing(tmp_path):
    root = write_images(tmp_path)
    numbers = (0, 65, 230, 970)  # of CLASSES among the 1,000 classes
    lines = [f'{val_name(number)} {numbers[TRUTH[number - 1]]}\n' for number in shuffled(range(1, 11))]
    (root / 'val.txt').write_text(''.join(lines))
    check(root, f'{root}/val.txt')
    (root / 'val.txt').write_text(f'{val_name(1)} 1000\n')
    assert re.search('val.txt: the class 1000 does not exist', refusal(root))
    (root / 'val.txt').write_text(f'{val_name(1)} n01440764\n')
    assert re.search('val.txt, line 1: expected a file name and the number', refusal(root))


def test_validation_images_without_a_file_of_labels(tmp_path):
    root = write_images(tmp_path / 'images')
    for number in range(4, 11):
        (root / 'val' / val_name(number)).unlink()
    tree(root, f'val/{val_name(50000)}')
    source = opened(f'folder:{root}')
    # The first three labels of ILSVRC2012, known from many publications; the class of the last one has no images here.
    assert validation(source) == [(val_name(1), 1), (val_name(3), 2), (val_name(2), 3)]
    assert source.origins['validation'] == 'val/ with the labels of validation_labels.txt in TFDS'
    assert any(val_name(50000) in note for note in source.notes)
    # A file of labels precedes the list in TFDS.
    labels = {1: 3, 2: 2, 3: 1, 50000: 0}
    (root / 'val.txt').write_text(''.join(f'{val_name(number)} {label}\n' for number, label in labels.items()))
    assert sorted(validation(opened(f'folder:{root}'))) == [
        (val_name(number), label) for number, label in labels.items()
    ]


def test_other_names_have_no_labels(tmp_path):
    root = write_images(tmp_path / 'images', name='{:05d}.JPEG'.format)
    assert re.search('val has 10 images, but no folder per class and no file of labels; make', refusal(root))
    write_solution(root / 'LOC_val_solution.csv')
    assert re.search('LOC_val_solution.csv has no label for them; make', refusal(root))
    tree(root, 'val/ILSVRC2012_val_00050001.JPEG')  # one more than there are
    assert re.search('val has 11 images, but no folder per class', refusal(root))


@pytest.mark.parametrize('at', ['', 'tiny-imagenet-200'])
def test_tiny_imagenet(tmp_path, at):
    root = write_images(tmp_path / 'tiny-imagenet-200', train='images/', name='images/val_{}.JPEG'.format)
    tree(root, *(f'train/{wnid}/{wnid}_boxes.txt' for wnid in CLASSES), 'test/images/test_0.JPEG', 'words.txt')
    (root / 'wnids.txt').write_text('\n'.join(reversed(CLASSES)))
    lines = [f'val_{number}.JPEG\t{CLASSES[TRUTH[number - 1]]}\t0\t32\t44\t62\n' for number in shuffled(range(1, 11))]
    (root / 'val' / 'val_annotations.txt').write_text(''.join(lines))
    source = opened(f'folder:{tmp_path / at}')
    assert source.class_names == list(CLASSES)
    wanted = sorted((label, f'val_{number}.JPEG') for number, label in enumerate(TRUTH, 1))
    assert validation(source) == [(name, label) for label, name in wanted]
    assert source.origins['validation'] == f'val/images/ with the labels of {root}/val/val_annotations.txt'
    assert 'test is not used; it has no classes' in source.notes
    assert 'not read as images: 6 *.txt' in source.notes
    assert not any('belong to the class' in note for note in source.notes)
    for wrong in ('val_1.JPEG\tn09193705\t0\n', 'val_11.JPEG n09193705\n'):
        (root / 'val' / 'val_annotations.txt').write_text(''.join([*lines, wrong]))
        assert re.search('val_annotations.txt, line 11: ', refusal(root))
