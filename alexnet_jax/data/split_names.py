"""Names of splits in any habit."""

import re

TRAIN, VALIDATION, TEST = 'train', 'validation', 'test'
_WORDS = {
    'train': TRAIN,
    'training': TRAIN,
    'trainval': TRAIN,
    'trn': TRAIN,
    'val': VALIDATION,
    'valid': VALIDATION,
    'validate': VALIDATION,
    'validation': VALIDATION,
    'dev': VALIDATION,
    'development': VALIDATION,
    'eval': VALIDATION,
    'evaluation': VALIDATION,
    'test': TEST,
    'testing': TEST,
    'tst': TEST,
    't10k': TEST,
}
_FILLERS = ('set', 'data', 'dataset', 'split', 'images', 'image', 'imgs', 'img', 'pictures', 'photos', 'folder')


def split_kind(name: str) -> str | None:
    """Returns 'train', 'validation' or 'test' if one word of `name` says so, otherwise None.

    Case, separators and numbers do not matter: 'Training_Set', 'test-images', 'VAL', 'train2017' and 'seg_train' are
    names of splits, and 'train_test' is not.
    """
    kinds = {_WORDS[word] for word in _words(name) if word in _WORDS}
    return kinds.pop() if len(kinds) == 1 else None


def is_plain_split(name: str) -> bool:
    """Returns whether `name` has no other word than those of a split: 'Training_Set', but not 'bullet_train'."""
    return split_kind(name) is not None and len(_words(name)) == 1


def split_word(name: str) -> str | None:
    """Returns the part of `name` that names a split, such as 'train' of 'imagenet-train-256'; None if it is unclear."""
    if is_plain_split(name):
        return name
    words = [word for word in re.split(r'[\W_]+', name) if is_plain_split(word)]
    return words[0] if len({split_kind(word) for word in words}) == 1 else None


def _words(name: str) -> list[str]:
    """Returns the words of `name` in lower case, without numbers and fillers such as 'set'."""
    words = []
    for word in re.split(r'(?<![a-z])(t10k)(?![a-z])|[\W\d_]+|(?<=[a-z])(?=[A-Z])', name):
        word = (word or '').lower()
        stems = [word.removesuffix(filler) for filler in _FILLERS] + [word.removeprefix(filler) for filler in _FILLERS]
        word = next((stem for stem in stems if stem in _WORDS), word)
        if word and word not in _FILLERS:
            words.append(word)
    return words
