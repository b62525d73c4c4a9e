"""Files that are rejected: pickles that would execute code, files of other formats, and corrupt files."""

import gzip
import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from pathlib import Path

import caffe_files
import h5py  # type: ignore[import-untyped]
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from alexnet_jax.weights import caffe_file, onnx_file, safetensors_file, torch_file
from alexnet_jax.weights.formats import FormatError, detect_format

FIXTURES = Path(__file__).parent / 'fixtures'
ZIP, LEGACY = ((FIXTURES / f'torchvision_{name}.pth').read_bytes() for name in ('zip', 'legacy'))


def read(path: Path) -> object:
    kind = detect_format(str(path))
    return {'torch': torch_file, 'safetensors': safetensors_file, 'onnx': onnx_file, 'caffe': caffe_file}[kind].read(
        str(path)
    )


def refusal(content: bytes, folder: Path) -> str:
    """Returns the error of reading a file with this content."""
    path = folder / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(FormatError) as error:
        read(path)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def as_zip(pickled: bytes) -> bytes:
    return zipped({'net/data.pkl': pickled, 'net/version': b'3\n', 'net/data/0': bytes(16)})


def as_legacy(pickled: bytes) -> bytes:
    parts = (0x1950A86A20F9469CFC6C, 1001, {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}})
    return b''.join(pickle.dumps(part, 2) for part in parts) + pickled + pickle.dumps([], 2)


# Pickles that would execute code


class Evil:
    """Reading its pickle with Python calls `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def attacks(marker: str) -> dict[str, tuple[bytes, str]]:
    """Returns pickles by name, each with the name that the error must contain."""
    touch = f'touch {marker}'
    code = f'open({marker!r}, "w").close()'
    system = pickle.dumps(Evil(os.system, touch), 2)
    nested = {'state_dict': {'features.0.weight': [1, (2, {'x': Evil(os.system, touch)})]}}
    text = touch.encode()
    short = bytes([len(text)]) + text
    return {
        'system': (system, 'posix.system'),
        'eval': (pickle.dumps(Evil(eval, code), 2), '__builtin__.eval'),
        'exec by two texts': (pickle.dumps(Evil(exec, code), 4), 'builtins.exec'),
        'nested': (pickle.dumps(nested, 2), 'posix.system'),
        'behind an ordered dict': (
            b'\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00a' + system[2:-1] + b'u.',
            'posix.system',
        ),
        'INST': (b'(S' + repr(touch).encode() + b'\nios\nsystem\n.', 'STRING'),
        'INST with new texts': (b'\x80\x02(U' + short + b'ios\nsystem\n.', 'os.system'),
        'INST of a known name': (
            b'\x80\x02(itorch._utils\n_rebuild_tensor_v2\n.',
            'torch._utils._rebuild_tensor_v2',
        ),
        'OBJ': (b'\x80\x02(cos\nsystem\nU' + short + b'o.', 'os.system'),
        'NEWOBJ': (b'\x80\x02csubprocess\nPopen\n(]U\x04trueaU\x01xt\x81.', 'subprocess.Popen'),
        'getattr': (b'\x80\x02c__builtin__\ngetattr\n.', '__builtin__.getattr'),
        'in the name': (b'\x80\x04\x8c\x05torch\x8c\x12_utils.os.system  \x93U' + short + b'\x85R.', 'torch._utils.os'),
        '__setstate__': (b'\x80\x02c__main__\nEvil\n)\x81}U\x01aK\x01sb.', '__main__.Evil'),
        'persistent id as text': (b'Pposix system\n.', 'PERSID'),
        'persistent id with a name': (b'\x80\x02(U\x06modulecos\nsystem\nU\x01xtQ.', 'os.system'),
        'persistent id of a module': (
            b'\x80\x02(U\x06modulectorch\nFloatStorage\nU\x010U\x01xK\x04tQ.',
            'persistent id',
        ),
        'persistent id of a view': (
            b'\x80\x02(U\x07storagectorch\nFloatStorage\nU\x010U\x01xK\x04U\x01vK\x00K\x02\x87tQ.',
            'persistent id',
        ),
        'persistent id that is a number': (b'\x80\x02K\x05Q.', 'persistent id'),
        'extension': (b'\x80\x02\x82\x01.', 'EXT1'),
        'control characters': (b'\x80\x02c\x1b[2J\nx\r\n.', "'\\x1b[2J.x"),
    }


@pytest.mark.parametrize('form', [bytes, as_zip, as_legacy])
@pytest.mark.parametrize('name', attacks('x'))
def test_unpickler_executes_nothing(name, form, tmp_path):
    marker = tmp_path / 'marker'
    pickled, refused = attacks(str(marker))[name]
    if form is bytes:  # a plain pickle, or text of the oldest protocol, which is not a known format
        refused = '' if pickled[:1] != b'\x80' else refused
        refused = 'pickle' if refused == 'persistent id' else refused
    assert refused in refusal(form(pickled), tmp_path)
    assert os.listdir(tmp_path) == ['weights.pth']


@pytest.mark.parametrize(
    'name', ['system', 'eval', 'exec by two texts', 'nested', 'INST', 'INST with new texts', 'OBJ']
)
def test_malicious_pickles_do_execute_in_pickle(name, tmp_path):
    """The reader of Python executes the code."""
    pickle.loads(attacks(str(tmp_path / 'marker'))[name][0])
    assert (tmp_path / 'marker').exists()


def test_known_names_are_not_called(tmp_path):
    """Names that a state dict needs are not called either; the reader interprets their arguments."""
    storage = b'(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ'
    tensor = b'ctorch._utils\n_rebuild_tensor_v2\n('

    def state(value: bytes) -> bytes:
        return as_zip(b'\x80\x02}U\x01a' + value + b's.')

    path = tmp_path / 'good'
    path.write_bytes(state(tensor + storage + b'K\x01K\x03\x85K\x01\x85\x89}tR'))
    np.testing.assert_array_equal(torch_file.read(str(path))['a'], np.zeros(3, np.float32), strict=True)
    outside = 'storage'
    assert outside in refusal(state(tensor + storage + b'K\x02K\x03\x85K\x01\x85\x89}tR'), tmp_path)
    assert outside in refusal(state(tensor + storage + b'K\x00K\x03\x85K\x02\x85\x89}tR'), tmp_path)
    assert outside in refusal(state(tensor + storage + b'J\xff\xff\xff\xffK\x03\x85K\x01\x85\x89}tR'), tmp_path)
    assert outside in refusal(state(tensor + storage + b'K\x00K\x03\x85J\xff\xff\xff\xff\x85\x89}tR'), tmp_path)
    assert outside in refusal(state(tensor + storage + b'K\x00\x8a\x06\0\0\0\0\0\x7f\x85K\x00\x85\x89}tR'), tmp_path)
    assert outside in refusal(state(tensor + storage + b'K\x00K\x02\x85)\x89}tR'), tmp_path)
    assert outside in refusal(state(tensor + b'U\x04textK\x00K\x02\x85K\x01\x85\x89}tR'), tmp_path)
    longer = storage.replace(b'K\x04', b'K\x05')
    assert 'storage 0 has 16 bytes' in refusal(state(tensor + longer + b'K\x00K\x03\x85K\x01\x85\x89}tR'), tmp_path)
    other = storage.replace(b'U\x010', b'U\x011')
    assert 'net/data/1' in refusal(state(tensor + other + b'K\x00K\x03\x85K\x01\x85\x89}tR'), tmp_path)
    twice = tensor + storage + b'K\x00K\x02\x85K\x01\x85\x89}tRs' + b'U\x01b' + tensor
    twice += storage.replace(b'Float', b'Int') + b'K\x00K\x02\x85K\x01\x85\x89}tR'
    assert 'two types' in refusal(state(twice), tmp_path)
    good = tensor + storage + b'K\x01K\x03\x85K\x01\x85\x89}tR'
    assert 'tuple' in refusal(as_zip(b'\x80\x02}K\x01K\x02\x86' + good + b's.'), tmp_path)
    path.write_bytes(
        as_zip(b'\x80\x02ccollections\nOrderedDict\n]](U\x01a' + good + b'ea\x85R.')
    )  # as Python 2 writes it
    assert torch_file.read(str(path))['a'].shape == (3,)
    assert 'named tensors' in refusal(state(b'ctorch\nFloatStorage\n\x8a\x06\0\0\0\0\0\x7f\x85R'), tmp_path)


# Files of other formats


def picture(form: str) -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (40, 30), 'red').save(file, form)
    return file.getvalue()


def hdf5() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, 'w') as written:
        written['kernel'] = np.zeros(3)
    return file.getvalue()


def numpy_file(save_with, *arrays) -> bytes:
    file = io.BytesIO()
    save_with(file, *arrays)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('storages'), io.BytesIO())
    return file.getvalue()


def proto(*fields: tuple[int, bytes | str | int]) -> bytes:
    """A protocol buffer message with these numbers, texts and messages, by field."""
    return b''.join(
        caffe_files.number(field, value)
        if isinstance(value, int)
        else caffe_files.content(field, value.encode() if isinstance(value, str) else value)
        for field, value in fields
    )


def onnx_of_quantized() -> bytes:
    """ModelProto: ir_version, producer_name, graph, opset_import."""
    node = proto((1, 'x'), (2, 'y'), (3, 'conv1_quant'), (4, 'QLinearConv'))
    return proto((1, 8), (2, 'onnx.quantize'), (7, proto((1, node), (2, 'bvlc_alexnet'))), (8, proto((2, 12))))


SAVED_MODEL = proto((1, 1), (2, proto((1, proto((2, b''), (4, 'serve'), (5, '2.21.0'))), (2, bytes(300)))))
CORE_ML = proto((1, 4), (2, proto((1, proto((1, 'image'), (3, bytes(20)))))), (500, bytes(90)))
GRAPH_DEF = proto((1, proto((1, 'input'), (2, 'Placeholder'), (5, bytes(40)))), (1, proto((1, 'conv1'), (2, 'Conv2D'))))
MATLAB = (
    b'MATLAB 5.0 MAT-file, Platform: GLNXA64, Created on: Tue Apr  1 10:00:00 2014'.ljust(124) + b'\0\1IM' + bytes(50)
)
MODULE = pickle.dumps({'a': 1}, 2)[:2] + b'ctorchvision.models.alexnet\nAlexNet\n)\x81}b.'
TENSOR = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n()K\x00))tR.'
BLOB = caffe_files.old_blob(np.ones((3, 4, 4), np.float32))

OTHERS = {
    **{form: (picture(form), 'picture|image') for form in ('PNG', 'GIF', 'TIFF')},
    'empty': (b'', 'empty'),
    'page': (b'\n<!DOCTYPE html><html><title>404</title></html>', 'web page'),
    'xml': (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'XML'),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 244\n', 'Git LFS'),
    'keras': (hdf5(), 'HDF5'),
    'keras 3': (zipped({'metadata.json': b'{}', 'model.weights.h5': hdf5()}), 'Keras'),
    'quantized onnx': (onnx_of_quantized(), "'bvlc_alexnet' .*quantized.*QLinearConv 'conv1_quant'.*float file"),
    'onnx without operators': (proto((1, 8), (2, 'pytorch'), (7, proto((2, 'main_graph')))), 'without operators'),
    'saved model': (SAVED_MODEL, 'SavedModel'),
    'frozen graph': (GRAPH_DEF, 'TensorFlow graph'),
    'tflite': (b'\x1c\0\0\0TFL3' + bytes(60), 'TensorFlow Lite'),
    'core ml': (CORE_ML, 'Core ML'),
    'matlab': (MATLAB, 'MATLAB'),
    'matlab 7.3': (MATLAB.replace(b'5.0', b'7.3').ljust(512) + hdf5(), 'MATLAB'),
    'gguf': (b'GGUF\3\0\0\0' + bytes(60), 'GGUF'),
    'flax': (b'\x81\xa6params\x81\xa5conv1' + bytes(60), 'MessagePack'),
    'mxnet': (b'\x12\1\0\0\0\0\0\0' + bytes(60), 'MXNet'),
    'bvlc_alexnet.npy': (
        numpy_file(np.save, np.array({'conv1': [np.zeros(3)]}, object)),
        r'bvlc_alexnet\.npy.*caffemodel',
    ),
    'npz': (numpy_file(np.savez, np.zeros(3)), r'\.npz'),
    'npy': (numpy_file(np.save, np.zeros(3)), 'NumPy'),
    'gzip': (gzip.compress(ZIP), 'compressed'),
    'tar': (tar(), 'tar'),
    'zip': (zipped({'readme.txt': b'x'}), "ZIP .*'readme.txt'"),
    'packed zip': (zipped(entries(ZIP), zipfile.ZIP_DEFLATED), 'compressed'),
    'json': (b'{"a": 1}', 'JSON'),
    'prototxt': (b'# net\nname: "AlexNet"\nlayer {\n', 'prototxt'),
    'text': (b'what is this\n', "'what is this '"),
    'noise': (np.random.default_rng(3).bytes(4000), 'known'),
    'module': (as_zip(MODULE), r'module .torchvision.models.alexnet.AlexNet.'),
    'old module': (as_legacy(MODULE), r'module .torchvision.models.alexnet.AlexNet.'),
    'user module': (as_zip(MODULE.replace(b'torchvision.models.alexnet', b'nets')), 'nets.AlexNet.*state_dict'),
    'torch.export': (zipped({'net/archive_format': b'pt2', 'net/models/model.json': b'{}'}), r'\.pt2'),
    'torchscript': (zipped({'net/constants.pkl': b'', 'net/data.pkl': MODULE}), 'TorchScript'),
    'tensor': (as_zip(TENSOR), 'tensor.*state dict'),
    'list': (as_zip(pickle.dumps([1], 2)), 'list.*state dict'),
    'no tensors': (as_zip(pickle.dumps({'epoch': 3}, 2)), 'named tensors'),
    'pickle': (pickle.dumps({'epoch': 3}, 4), 'pickle.*torch.save'),
    'arrays': (pickle.dumps({'a': np.zeros(3)}, 2), r'numpy\._?core\.multiarray'),
    'big-endian': (zipped({**entries(ZIP), 'torchvision_zip/byteorder': b'big'}), 'big-endian'),
    'mean': (BLOB, '--mean'),
    'no weights': (caffe_files.net('AlexNet', {}), 'Caffe'),
    'twice': (2 * caffe_files.net('', {'conv1': [np.ones(3)]}), "'conv1'"),
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_file_kinds_are_named(name, tmp_path):
    content, reason = OTHERS[name]
    path = tmp_path / 'file'
    path.write_bytes(content)
    with pytest.raises(FormatError, match=reason):
        read(path)


# Corrupt files


def corrupt_copies(content: bytes, generator: np.random.Generator, count: int):
    """Yields truncated copies, and copies with one to three changed bytes."""
    for cut in np.linspace(1, len(content) - 1, count // 2).astype(int):
        yield content[:cut]
    for _ in range(count // 2):
        copy = bytearray(content)
        for place in generator.integers(0, len(copy), generator.integers(1, 4)):
            copy[place] = generator.integers(0, 256)
        yield bytes(copy)


def wire(is_old: bool) -> bytes:
    layers = caffe_files.random_layers(np.random.default_rng(0), (2, 2, 2, 2, 2, 2, 2, 2))
    return (caffe_files.old_net if is_old else caffe_files.net)('AlexNet', layers)


GOOD = {
    'zip': ZIP,
    'legacy': LEGACY,
    'views': (FIXTURES / 'views.pth').read_bytes(),
    'views_legacy': (FIXTURES / 'views_legacy.pth').read_bytes(),
    'training': (FIXTURES / 'training.pth').read_bytes(),
    'caffe': wire(is_old=False),
    'old caffe': wire(is_old=True),
    'safetensors': save({'a': np.zeros((3, 4), np.float32), 'b': np.zeros(5, np.float16)}, {'format': 'pt'}),
}


@pytest.mark.parametrize('name', GOOD)
def test_corrupt_files_raise_or_are_read(name, tmp_path):
    """A corrupt file never raises another error, and a truncated file is never read."""
    path, content = tmp_path / 'file', GOOD[name]
    refusals = []
    for copy in corrupt_copies(content, np.random.default_rng(1), 300):
        path.write_bytes(copy)
        try:
            read(path)
        except FormatError as error:
            refusals.append((len(copy), str(error)))
    assert all(reason.isprintable() for _, reason in refusals)
    assert sum(length < len(content) for length, _ in refusals) == 150
    path.write_bytes(content)
    assert read(path)


def test_changed_number_is_detected_in_zip_format(tmp_path):
    place = ZIP.index(entries(ZIP)['torchvision_zip/data/10']) + 1001
    changed = bytearray(ZIP)
    changed[place] ^= 1
    assert 'torchvision_zip/data/10' in refusal(bytes(changed), tmp_path)


def test_legacy_format_storages(tmp_path):
    """The number of storages and the length of each are checked."""
    reader = io.BytesIO(LEGACY)
    for _ in range(4):
        all(pickletools.genops(reader))
    before = reader.tell()
    keys = pickle.load(reader)
    behind = last = place = reader.tell()
    while place < len(LEGACY):
        last, (count,) = place, struct.unpack_from('<q', LEGACY, place)
        place += 8 + 4 * count
    cases = {
        LEGACY[:last] + struct.pack('<q', count - 1) + LEGACY[last + 8 :]: f"at storage '{keys[-1]}'",
        LEGACY[:last] + struct.pack('<q', -1) + LEGACY[last + 8 :]: f"at storage '{keys[-1]}'",
        LEGACY[:-1]: f"at storage '{keys[-1]}'",
        LEGACY[:before] + pickle.dumps(keys[:-1], 2) + LEGACY[behind:]: f"storage '{keys[-1]}'",
        LEGACY[:before] + pickle.dumps([*keys, '7'], 2) + LEGACY[behind:]: "storage '7'",
    }
    for content, reason in cases.items():
        assert reason in refusal(content, tmp_path)
