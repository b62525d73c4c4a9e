"""Folders of images in the habits of Kaggle, Roboflow, Keras and the Hugging Face Hub: splits, classes and tables."""

import os
import re
import struct
from pathlib import Path

import pytest
from helpers import read_lines
from PIL import Image
from test_sources import content, opened, tree

from alexnet_jax.data.split_names import split_kind
from alexnet_jax.prepare.raw_sources import Source, SourceError
from alexnet_jax.prepare.splits import choose_splits
from alexnet_jax.prepare.writer import PrepareConfig, prepare


def images(folder: str, classes: tuple[str, ...] = ('cats', 'dogs'), count: int = 4) -> list[str]:
    """Returns the paths of `count` images per class in `folder`."""
    return [os.path.join(folder, name, f'{i}.jpg') for name in classes for i in range(count)]


def names(source: Source, split: str) -> list[str]:
    return [name for name, *_ in content(source.splits[split])]


def refusal(root: Path, validation_split: str | None = None) -> str:
    """Returns the message of the error, which must be one line."""
    with pytest.raises(SourceError) as caught:
        opened(f'folder:{root}', validation_split=validation_split)
    message = str(caught.value)
    assert '\n' not in message
    return message


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        (name, 'train')
        for name in ('train', 'Train', 'TRAIN', 'training_set', 'Training Images', 'trainset', 'train2017')
    ]
    + [
        (name, 'train')
        for name in ('train_data', 'images_train', 'ImagesTrain', 'SegTrain', 'seg_train', 'imagenet1k-train')
    ]
    + [(name, 'validation') for name in ('val', 'valid', 'Validation', 'val_set', 'dev', 'eval', 'val-2012', 'ValData')]
    + [(name, 'test') for name in ('test', 'TEST', 'test_set', 'testing', 'test1', 't10k', 'asl_alphabet_test')]
    + [
        (name, None)
        for name in ('cats', 'values', 'constraint', 'contest', 'devices', 'retrain', '1', 'train_test', '')
    ],
)
def test_names_of_splits(name, kind):
    assert split_kind(name) == kind


@pytest.mark.parametrize(
    ('train', 'validation', 'unused'),
    [
        ('training_set', 'val_set', 'test_set'),  # Kaggle and Keras
        ('Train', 'Val', 'Test'),
        ('train', 'valid', 'test'),  # Roboflow
        ('TRAIN', 'validation', 'TESTING'),
        ('train2017', 'val2017', 'test2017'),
        ('Training Images', 'Dev', 'Eval Test'),
        ('seg_train/seg_train', 'seg_dev/seg_dev', 'seg_test/seg_test'),  # Kaggle's Intel scenes
        ('train/train', 'val/images', 'test'),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path, train, validation, unused):
    tree(tmp_path, *images(train), *images(validation, count=2), *images(unused, count=3))
    source = opened(f'folder:{tmp_path}')
    assert source.class_names == ['cats', 'dogs']
    assert not source.holds_out_validation
    assert names(source, 'train') == images(train)
    assert names(source, 'validation') == images(validation, count=2)
    assert source.origins == {'train': f'{train}/', 'validation': f'{validation}/'}
    assert [note.split()[0] for note in source.notes if 'not used' in note] == [unused.split('/')[0].split()[0]]


def test_a_test_split_is_used_only_if_it_is_named(tmp_path):
    tree(tmp_path, *images('training_set'), *images('test_set'))
    source = opened(f'folder:{tmp_path}')
    assert source.holds_out_validation
    assert sorted(names(source, 'train') + names(source, 'validation')) == images('training_set')
    assert source.origins['validation'] == '25% of each class of training_set/'
    assert source.notes == ('test_set is not used; config.data.validation_split=test_set validates on it',)
    for named in ('test_set', 'test', 'Test_Set'):
        source = opened(f'folder:{tmp_path}', validation_split=named)
        assert not source.holds_out_validation
        assert names(source, 'train') == images('training_set')
        assert names(source, 'validation') == images('test_set')


def test_a_plain_name_of_a_split_precedes_a_longer_one(tmp_path):
    tree(tmp_path, *images('train'), *images('train_small'), *images('val'), *images('val_easy'))
    source = opened(f'folder:{tmp_path}')
    assert (names(source, 'train'), names(source, 'validation')) == (images('train'), images('val'))
    assert source.notes == ('train_small is not used', 'val_easy is not used')


def test_a_named_split_must_exist():
    for named in ('extra', 'tests', 'train', ''):
        with pytest.raises(
            SourceError, match=r"validation_split: '.*' is not a validation split .* extra_images, train"
        ):
            choose_splits(['train', 'extra_images'], named, 'zoo')


@pytest.mark.parametrize(
    ('paths', 'reason'),
    [
        ([*images('train'), *images('training_set')], 'several training splits, train and training_set'),
        ([*images('train'), *images('val'), *images('valid')], 'several validation splits, val, valid'),
        (images('val'), 'no training split; its splits are val'),
        ([*images('test'), *images('valid')], 'no training split; its splits are test, valid'),
        ([*images('part1'), *images('part2')], 'part1 and part2, .* both contain cats and dogs.*folder:.*part1'),
        ([*images('2019'), *images('2020', ('cats', 'dogs', 'eels'))], '2019 and 2020, .* both contain cats and dogs'),
        ([*images('train/a'), *images('train/b')], 'train has the folders a and b'),
        (
            [*images('train'), *images('train/val')],
            'train/val is no class, .* contains cats and dogs, which are also next',
        ),
        ([*images(''), *images('backup')], 'backup is no class, .* contains cats and dogs, which are also next'),
        (
            [*images('cats', ('train', 'val')), *images('dogs', ('train', 'val'))],
            r'cats contains the splits train and val .*; move .*, such as \S*/cats/train to \S*/train/cats$',
        ),
        (
            [*images('zoo/train'), *images('zoo/test'), 'farm/1.jpg'],
            r'zoo contains the splits test and train .*; choose folder:\S*/zoo$',
        ),
        (['imgs/1.jpg', 'imgs/2.jpg', 'train.csv'], r'one folder of images, imgs/, .*\*.csv.*; .* name it labels.csv'),
        (['train/1.jpg', 'train/2.jpg', 'test/1.jpg'], 'the split .*train are in no folders of classes; .*labels.csv'),
        (['train/1.jpg', 'val/1.jpg', 'samples/1.jpg'], 'the split .*train are in no folders of classes'),
        ([*images('train'), 'val/1.jpg', 'val/2.jpg'], 'val has 2 images, but no folder per class.*labels.csv'),
        ([*images('train'), *images('val', ('Cats', 'dogs'))], 'Cats is a class that is missing .*; rename it to cats'),
        ([*images('train', ('K\xe4se',)), *images('val', ('Ka\u0308se',))], 'missing .*; rename it to K\xe4se'),
        ([*images('train'), *images('val', ('cats', 'eels'))], 'eels is a class that is missing .*; remove it, or add'),
        (['1.jpg', '2.jpg'], 'has no folders of images; .*labels.csv'),
    ],
)
def test_ambiguous_splits_and_classes_are_refused(tmp_path, paths, reason):
    assert re.search(reason, refusal(tree(tmp_path, *paths)))


@pytest.mark.parametrize(
    ('paths', 'reason'),
    [
        (['images/train/1.jpg', 'images/val/2.jpg', 'labels/train/1.txt', 'labels/val/2.txt'], 'images/ and labels/'),
        (['train/images/1.jpg', 'train/labels/1.txt', 'valid/images/2.jpg', 'valid/labels/2.txt'], 'train has labels/'),
        (['train/1.jpg', 'train/1.xml', 'train/2.jpg', 'train/2.xml'], r'\*\.xml'),
        (['train/1.jpg', 'train/_annotations.coco.json', 'valid/1.jpg'], '_annotations.coco.json'),
        (['train2017/1.jpg', 'val2017/2.jpg', 'annotations/instances_train2017.json'], 'annotations/'),
        (['JPEGImages/1.jpg', 'Annotations/1.xml', 'ImageSets/Main/train.txt'], 'JPEGImages/ and Annotations/'),
        (['data/images/1.jpg', 'data/labels/1.txt'], 'images/ and labels/'),
    ],
)
def test_data_sets_for_detection_are_refused(tmp_path, paths, reason):
    assert re.search(rf'{reason}.*object detection.*one class per image', refusal(tree(tmp_path, *paths)))


def test_segmentation_masks_are_no_class(tmp_path):
    assert 'images/ and masks/' in refusal(tree(tmp_path, 'images/1.png', 'images/2.png', 'masks/1.png', 'masks/2.png'))


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    for i, classes in enumerate(
        (('bus', 'train'), ('car', 'test'), ('bullet_train', 'bus'), ('bus/images', 'train/images'))
    ):
        root = tree(tmp_path / str(i), *images('', classes))
        source = opened(f'folder:{root}')
        assert source.class_names == [name.removesuffix('/images') for name in classes]
        assert sorted(names(source, 'train') + names(source, 'validation')) == images('', classes)
    for i, folders in enumerate((('bullet_train/a', 'bus/b'), ('train', 'train/more', 'bus'))):
        root = tree(tmp_path / f'more {i}', *images('', folders))
        source = opened(f'folder:{root}')
        assert source.class_names == sorted({name.split('/')[0] for name in folders})
        assert sorted(names(source, 'train') + names(source, 'validation')) == sorted(images('', folders))
    assert "'test'" in refusal(tmp_path / '0', validation_split='test')  # there are no splits


def test_part_of_a_data_set_names_the_splits_next_to_it(tmp_path):
    tree(tmp_path, *images('train'), *images('valid'), *images('other'))
    source = opened(f'folder:{tmp_path}/train')
    assert source.holds_out_validation
    assert source.notes == (f'valid next to {tmp_path}/train is not used; folder:{tmp_path} uses all splits',)
    assert f'folder:{tmp_path} uses all splits' in refusal(tmp_path / 'train', validation_split='valid')


@pytest.mark.parametrize(
    ('outer', 'splits'),
    [
        ('dataset', ('train', 'val')),
        ('archive/pets', ()),
        ('my_test_data', ('train', 'val')),
        ('a/b', ('Train', 'Dev')),
    ],
)
def test_a_folder_around_the_data_set_is_entered(tmp_path, outer, splits):
    paths = [path for split in splits or ('',) for path in images(split)]
    tree(tmp_path, *(f'{outer}/{path}' for path in paths), '__MACOSX/dataset/._x.jpg', 'readme.md', '.git/config')
    tree(tmp_path, 'cover.jpg')
    source = opened(f'folder:{tmp_path}')
    assert source.class_names == ['cats', 'dogs']
    assert sorted(names(source, 'train') + names(source, 'validation')) == sorted(paths)
    assert source.notes == (
        f'the images are read from {tmp_path}/{outer}',
        f'images in {tmp_path}, but in no class folder, are not used: cover.jpg',
        'not read as images: 1 *.md',
        'ignored as system files or hidden files: 1 .git/ and 1 __MACOSX/',
    )


def test_what_is_ignored_is_counted(tmp_path):
    tree(tmp_path, *images('train'), *images('val'), 'docs/readme.md', 'train/stray.jpg', 'train/labels/1.txt', 'a.jpg')
    tree(tmp_path, 'train/cats/Thumbs.db', 'train/cats/notes.txt', 'val/dogs/table.CSV', 'train/dogs/desktop.ini')
    tree(tmp_path, *(f'train/dogs/._{i}.jpg' for i in range(3)), 'val/dogs/.DS_Store', 'val/.ipynb_checkpoints/0.jpg')
    tree(tmp_path, 'train/cats/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg', '$RECYCLE.BIN/0.jpg', 'train/__pycache__/0.jpg')
    source = opened(f'folder:{tmp_path}')
    assert source.class_names == ['cats', 'dogs']
    assert (names(source, 'train'), names(source, 'validation')) == (images('train'), images('val'))
    *notes, others, litter = source.notes
    assert notes == [
        f'images in {tmp_path}, but in no class folder, are not used: a.jpg',
        f'images in {tmp_path}/train, but in no class folder, are not used: stray.jpg',
        f'folders in {tmp_path}/train without images are not used: labels/',
        'docs/ is not used',
    ]
    assert set(re.split(', | and ', others.removeprefix('not read as images: '))) == {'1 *.txt', '1 *.csv'}
    assert set(re.split(', | and ', litter.removeprefix('ignored as system files or hidden files: '))) == {
        *('3 ._*', '1 .DS_Store', '1 .ipynb_checkpoints/', '1 @eaDir/', '1 $RECYCLE.BIN/', '1 __pycache__/'),
        *('1 Thumbs.db', '1 desktop.ini'),
    }


def test_run_among_the_images_is_no_class(tmp_path):
    tree(tmp_path, *images(''), 'runs/first/figures/1.png', 'runs/first/config.json', 'dogs/second/config.json')
    for folder in ('runs/first', 'dogs/second'):
        (tmp_path / folder / 'checkpoints').mkdir()
    source = opened(f'folder:{tmp_path}')
    assert source.class_names == ['cats', 'dogs']
    assert f'folders in {tmp_path} without images are not used: runs/' in source.notes
    assert 'not read as images: 1 folders of runs' in source.notes


def test_files_that_are_no_images_by_name_are_not_corrupt_images(tmp_path):
    for name, color in (('cats', 'red'), ('dogs', 'blue')):
        (tmp_path / 'pets' / name).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (40, 40), color).save(tmp_path / 'pets' / name / f'{i}.png')
        Image.new('RGB', (40, 40), color).save(tmp_path / 'pets' / name / 'no_ending', 'PNG')
    tree(tmp_path / 'pets', 'cats/Thumbs.db', 'cats/labels.csv', 'dogs/readme.txt', 'dogs/desktop.ini', 'dogs/a.json')
    folder = prepare(PrepareConfig(f'folder:{tmp_path}/pets', 32, validation_fraction=0.25, workers=1), str(tmp_path))
    assert read_lines(Path(folder) / 'skipped.jsonl') == []
    tree(tmp_path / 'pets', 'dogs/unknown.xyz')  # may be an image
    assert sum(map(len, opened(f'folder:{tmp_path}/pets').splits.values())) == 11


def test_classes_of_one_split_are_named(tmp_path):
    tree(tmp_path, *images('train'), *images('val', ('cats',)))
    for folder in ('train/ant', 'val/wasp', 'val/dogs'):
        (tmp_path / folder).mkdir()
    source = opened(f'folder:{tmp_path}')
    assert source.class_names == ['ant', 'cats', 'dogs']
    assert source.notes == (
        'a class has no training image: ant',
        '2 of 3 classes have no validation image: ant and dogs',
    )
    tree(tmp_path, 'val/ant/1.jpg')
    assert opened(f'folder:{tmp_path}').notes[0] == 'a class has no training image: ant'


def test_a_link_from_validation_to_training_images_is_refused(tmp_path):
    tree(tmp_path, *images('train'))
    os.symlink('train', tmp_path / 'val')
    assert refusal(tmp_path).endswith(f'{tmp_path}/train and {tmp_path}/val are the same folder')


def test_unreadable_links_are_skipped_later(tmp_path):
    tree(tmp_path, *images(''))
    os.symlink('itself.jpg', tmp_path / 'cats' / 'itself.jpg')
    os.symlink('nothing', tmp_path / 'dogs' / 'gone')
    source = opened(f'folder:{tmp_path}')
    found = [part.name(i) for part in source.splits.values() for i in range(len(part))]
    assert sorted(found) == sorted([*images(''), 'cats/itself.jpg', 'dogs/gone'])


def test_the_current_folder_is_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tree(tmp_path, *images('train'), *images('val')))
    assert names(opened('folder:.'), 'validation') == images('val')


# Tables of images and classes.

ROWS = [(f'a/{i}.jpg', 'dogs' if i % 3 else 'cats', ('train', 'val', 'test')[i // 4 % 3]) for i in (7, 2, 9, 4, 1, 0)]
ROWS += [
    (f'b/{i}.jpg', 'cats' if i % 3 else 'dogs', ('train', 'val', 'test')[i // 4 % 3]) for i in (3, 5, 8, 6, 10, 11)
]


def write_table(root: Path, text: str, name: str = 'labels.csv', encoding: str = 'utf-8') -> Path:
    tree(root, *(path for path, *_ in ROWS))
    (root / name).write_bytes(text.encode(encoding))
    return root


def expected(split: str | None = None) -> list[tuple[str, int]]:
    """Returns the path and label of each row, in the order of label and path."""
    rows = [(['cats', 'dogs'].index(label), path) for path, label, of in ROWS if split in (None, of)]
    return [(path, label) for label, path in sorted(rows)]


def labeled(source: Source, *splits: str) -> list[tuple[str, int]]:
    return [(name, label) for split in splits for name, _, label in content(source.splits[split])]


@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
@pytest.mark.parametrize('header', ['path,label,split', 'Filename,CLASS,Set', '"image","target","subset"'])
def test_table_with_splits(tmp_path, header, line_end):
    lines = [header, *(f'"{path}",{label},{split}' for path, label, split in ROWS), '', '']
    source = opened(f'folder:{write_table(tmp_path, line_end.join(lines), encoding="utf-8-sig")}')
    assert source.class_names == ['cats', 'dogs']
    assert source.names_classes
    assert labeled(source, 'train') == expected('train')
    assert labeled(source, 'validation') == expected('val')
    assert source.splits['train'][0] == (expected('train')[0][0].encode(), 0)
    assert source.origins == {'train': 'train in labels.csv', 'validation': 'val in labels.csv'}
    assert 'test is not used; config.data.validation_split=test validates on it' in source.notes
    assert labeled(opened(f'folder:{tmp_path}', validation_split='test'), 'validation') == expected('test')


def test_table_without_splits_holds_out_the_images_that_folders_hold_out(tmp_path):
    pairs = [(f'{i:02d}.jpg', 'ant' if i % 3 else 'bee') for i in range(24)]
    tree(tmp_path / 'folders', *(f'{label}/{path}' for path, label in pairs))
    tree(tmp_path / 'flat', *(path for path, _ in pairs))
    lines = ['label\tfile_name', *(f'{label}\t{path}' for path, label in reversed(pairs))]
    (tmp_path / 'flat' / 'labels.tsv').write_text('\n'.join(lines))
    folders, flat = (opened(f'folder:{tmp_path}/{name}') for name in ('folders', 'flat'))
    for split in ('train', 'validation'):
        assert [(name.split('/')[1], label) for name, label in labeled(folders, split)] == labeled(flat, split)
    assert flat.origins == {'train': 'labels.tsv', 'validation': '25% of each class of labels.tsv'}


def test_integers_in_a_table_are_sorted_by_value(tmp_path):
    text = 'id,category\n' + ''.join(f'{path},{10 if label == "cats" else 2}\n' for path, label, _ in ROWS)
    source = opened(f'folder:{write_table(tmp_path, text)}')
    assert (source.class_names, source.names_classes) == (['2', '10'], False)
    assert sorted(labeled(source, 'train', 'validation')) == sorted((path, 1 - label) for path, label in expected())
    (tmp_path / 'labels.csv').write_text(text.replace(',2\n', ',02\n'))
    source = opened(f'folder:{tmp_path}')
    assert (source.class_names, source.names_classes) == (['02', '10'], True)


def test_table_wins_over_folders_and_names_what_it_does_not_list(tmp_path):
    text = 'path,label\n' + ''.join(
        f'{path},{label}\n' for path, label, _ in ROWS if path not in ('a/9.jpg', 'b/5.jpg')
    )
    source = opened(f'folder:{write_table(tmp_path, text)}')
    assert len(labeled(source, 'train', 'validation')) == 10
    assert 'labels.csv gives the classes of the images; the names of the folders do not' in source.notes
    assert 'not used, because labels.csv does not list them: a/9.jpg and 1 more' in source.notes


def test_a_column_named_label_precedes_its_synonyms(tmp_path):
    text = 'class,file,path,label\n' + ''.join(f'x,y.jpg,{path},{label}\n' for path, label, _ in ROWS)
    source = opened(f'folder:{write_table(tmp_path, text)}')
    assert sorted(labeled(source, 'train', 'validation')) == sorted(expected())


def test_missing_files_of_a_table_are_skipped_by_name(tmp_path):
    (tmp_path / 'pets').mkdir()
    lines = ['path,label', *(f'{i}.png,{"red" if i % 2 else "blue"}' for i in range(20))]
    (tmp_path / 'pets' / 'labels.csv').write_text('\n'.join(lines))
    for i in range(20):
        if i not in (3, 8):
            Image.new('RGB', (40, 40), 'red' if i % 2 else 'blue').save(tmp_path / 'pets' / f'{i}.png')
    assert 'labels.csv names files that do not exist: 8.png and 1 more' in opened(f'folder:{tmp_path}/pets').notes
    given = PrepareConfig(f'folder:{tmp_path}/pets', 32, max_corrupt_fraction=0.1, workers=1)
    skipped = read_lines(Path(prepare(given, str(tmp_path))) / 'skipped.jsonl')
    assert sorted(line['name'] for line in skipped) == ['3.png', '8.png']
    assert all('No such file' in line['reason'] for line in skipped)


def test_folders_in_the_paths_of_a_table_are_splits(tmp_path):
    paths = [f'images/{split}/{i}.jpg' for split in ('train', 'test') for i in range(8)]
    tree(tmp_path, *paths)
    rows = [f'images\\{path[7:]},{"ab"[i % 2]}' for i, path in enumerate(paths)]  # as Windows writes paths
    (tmp_path / 'metadata.csv').write_text('\n'.join(['file_name,label', *rows]))
    source = opened(f'folder:{tmp_path}')
    assert sorted(names(source, 'train') + names(source, 'validation')) == paths[:8]
    assert 'test is not used; config.data.validation_split=test validates on it' in source.notes
    assert sorted(names(opened(f'folder:{tmp_path}', validation_split='test'), 'validation')) == paths[8:]
    with open(tmp_path / 'metadata.csv', 'a') as file:
        file.write('\nelsewhere/1.jpg,a')
    assert re.search('train, others are not, such as elsewhere/1.jpg; add a column split', refusal(tmp_path))


@pytest.mark.parametrize(
    ('name', 'header', 'row'),
    [('metadata.csv', 'file_name,label', '{},{}'), ('_classes.csv', 'filename, cat, dog', '{}, {:d}, {:d}')],
)
def test_a_table_in_each_split(tmp_path, name, header, row):
    wanted = {'train': [('0.jpg', 'dog'), ('1.jpg', 'cat'), ('2.jpg', 'dog')], 'valid': [('0.jpg', 'cat')]}
    for split, pairs in wanted.items():
        tree(tmp_path, *(f'{split}/{file}' for file, _ in pairs))
        columns = [
            (file, label) if name == 'metadata.csv' else (file, label == 'cat', label == 'dog') for file, label in pairs
        ]
        (tmp_path / split / name).write_text('\n'.join([header, *(row.format(*cells) for cells in columns)]))
    source = opened(f'folder:{tmp_path}')
    assert source.class_names == ['cat', 'dog']
    assert labeled(source, 'train') == [('train/1.jpg', 0), ('train/0.jpg', 1), ('train/2.jpg', 1)]
    assert labeled(source, 'validation') == [('valid/0.jpg', 0)]
    assert source.origins['validation'] == f'valid/ with {name}'


def test_captions_are_no_labels(tmp_path):
    tree(tmp_path, *images('train'), *images('val'))
    (tmp_path / 'metadata.csv').write_text('file_name,text\ntrain/cats/0.jpg,"a cat, asleep"\n')
    assert names(opened(f'folder:{tmp_path}'), 'train') == images('train')


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('', 'labels.csv is empty; .*path,label'),
        ('path,label\n', 'no images'),
        ('a/1.jpg,cats\na/2.jpg,dogs\n', "line 1: the header 'a/1.jpg,cats' has no column path"),
        ('path,breed\na/1.jpg,cats\n', 'no column label'),
        ('path;label\na/1.jpg;cats\n', 'line 1: .*separated by semicolons, .* commas'),
        ('path\tlabel\na/1.jpg\tcats\n', 'line 1: .*separated by tabs, .* commas'),
        ('path,class,category\na/1.jpg,cats,pets\n', 'line 1: .*class and category mean the same'),
        ('path,label\na/1.jpg,cats\na/2.jpg\n', 'line 3: the number of cells is 1'),
        ('path,label\na/1.jpg,cats\n\na/1.jpg,dogs\n', 'line 4: a/1.jpg has another class in line 2'),
        ('path,label,split\na/1.jpg,cats,train\na/./1.jpg,cats,test\n', 'line 3: a/1.jpg has another split in line 2'),
        ('path,label\na/1.jpg,\n', 'line 2: the class of a/1.jpg is missing'),
        ('path,label,split\na/1.jpg,cats,\n', 'line 2: the split of a/1.jpg is missing'),
        ('path,label\n,cats\n', 'line 2: the path .* is not that of a file'),
        ('path,label\na/1\0.jpg,cats\n', 'line 2: the path .* is not that of a file'),
        ('path,label\n/etc/passwd,cats\n', "line 2: the path '/etc/passwd' is absolute"),
        ('path,label\na/../../b.jpg,cats\n', 'line 2: .* leads out'),
        ('path,label\n..\\b.jpg,cats\n', 'line 2: .* leads out'),
        ('path,label\nC:\\pets\\b.jpg,cats\n', 'line 2: .* is absolute'),
        ('path,label\n"a/1.jpg,cats\na/2.jpg,dogs\n', 'labels.csv, line 3: not valid CSV'),
        (f'path,label\na/1.jpg,{"x" * 200000}\n', 'line 2: not valid CSV: field larger'),
        ('path,label\nc/1.jpg,cats\nc/2.jpg,dogs\n', 'none of its images exist; the first is c/1.jpg'),
        ('path,label,split\na/1.jpg,cats,1\na/2.jpg,dogs,2\n', 'no training split; its splits are 1, 2'),
        ('path,label,split\na/1.jpg,cats,train\na/2.jpg,dogs,val\n', 'class dogs has images in val, but none in train'),
    ],
)
def test_invalid_tables_are_refused(tmp_path, text, reason):
    message = refusal(write_table(tmp_path, text))
    assert 'labels.csv' in message
    assert re.search(reason, message), message


def test_table_with_a_name_in_another_case_names_the_columns_that_are_not_read(tmp_path):
    tree(tmp_path, *images('imgs', ('a',), 4))
    rows = ''.join(f'imgs/a/{i}.jpg,{"cat" if i % 2 else "dog"},{i > 2}\n' for i in range(4))
    (tmp_path / 'Labels.CSV').write_text(f'path,label,is_valid\n{rows}')
    source = opened(f'folder:{tmp_path}', 0.5)
    assert source.class_names == ['cat', 'dog']
    assert 'Labels.CSV has columns that are not read: is_valid' in source.notes
    assert not any('*.csv' in note for note in source.notes)


def test_empty_folder_of_annotations_is_no_class(tmp_path):
    tree(tmp_path, *images('train/images'), *images('valid/images'))
    (tmp_path / 'train/labels').mkdir()
    assert opened(f'folder:{tmp_path}').origins == {'train': 'train/images/', 'validation': 'valid/images/'}


@pytest.mark.parametrize('fraction', [0, 0.1, 1])
def test_fraction_that_leaves_a_split_empty_names_the_field(tmp_path, fraction):
    tree(tmp_path, *images('', ('cats', 'dogs'), 2))
    with pytest.raises(
        SourceError, match=r'^config.data.validation_fraction: .* of each class of the 4 images .* leaves no image for '
    ):
        opened(f'folder:{tmp_path}', fraction)


def test_tables_in_other_encodings_or_twice_are_refused(tmp_path):
    for encoding in ('latin-1', 'utf-16'):
        message = refusal(write_table(tmp_path, 'path,label\na/1.jpg,Kätzchen\n', encoding=encoding))
        assert message.endswith('labels.csv is not UTF-8 text; save it as UTF-8')
    write_table(tmp_path, 'path\tlabel\na/1.jpg\tcats\n', 'labels.tsv')
    assert 'labels.csv and labels.tsv; keep one' in refusal(tmp_path)


def test_images_of_several_classes_are_refused(tmp_path):
    tree(tmp_path, 'train/0.jpg', 'train/1.jpg')
    for cells in ('1,1', '0,0'):
        (tmp_path / 'train' / '_classes.csv').write_text(f'filename,cat,dog\n1.jpg,1,0\n0.jpg,{cells}\n')
        assert re.search(rf'line 3: 0.jpg has {sum(map(int, cells.split(",")))} classes', refusal(tmp_path))


def test_idx_files_say_where_the_splits_come_from(tmp_path):
    for split in ('train', 't10k'):
        for what, dimensions, sizes in (('images', 3, (8, 2, 2)), ('labels', 1, (8,))):
            values = bytes(i % 2 for i in range(8 * (4 if what == 'images' else 1)))
            header = struct.pack(f'>BBBB{dimensions}I', 0, 0, 8, dimensions, *sizes)
            (tmp_path / f'{split}-{what}-idx{dimensions}-ubyte').write_bytes(header + values)
    source = opened(f'idx:{tmp_path}')
    assert source.origins == {'train': 'train', 'validation': '25% of each class of train'}
    assert source.notes == ('t10k is not used; config.data.validation_split=t10k validates on it',)
    assert opened(f'idx:{tmp_path}', validation_split='test').origins['validation'] == 't10k'
