"""The Python API: load(), create() and the methods of TrainedModel."""

import contextlib
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures.make_torch_fixture import pictures as torch_pictures
from flax import nnx
from helpers import ROOT, config_flags, refusal, run_command
from PIL import Image
from skimage import data as photographs
from small_runs import center_crop, make_run, small_config

import alexnet_jax
from alexnet_jax.convert import export
from alexnet_jax.data.images import UnreadableImage
from alexnet_jax.training.eval_step import make_activation_fn
from alexnet_jax.weights.formats import FormatError

FIXTURES = Path(__file__).parent / 'fixtures'
SMALL = {'model.widths': (8, 0, 0, 0, 16, 0, 32)}


@pytest.fixture(scope='module')
def run(photos_dir, tmp_path_factory) -> str:
    return make_run(tmp_path_factory.mktemp('api') / 'run', small_config(photos_dir))


@pytest.fixture(scope='module')
def network(run):
    return alexnet_jax.load(run)


@pytest.fixture(scope='module')
def new():
    return alexnet_jax.create('torchvision', num_classes=3, settings=SMALL)


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> list[Path]:
    """Pictures of several formats, modes and sizes."""
    folder = tmp_path_factory.mktemp('pictures')
    cat = Image.fromarray(photographs.chelsea())
    rotated = Image.Exif()
    rotated[0x0112] = 6
    transparent = cat.convert('RGBA')
    transparent.putalpha(Image.fromarray(np.indices(cat.size[::-1]).sum(0).astype(np.uint8)))
    cat.save(folder / 'turned.jpg', exif=rotated)
    transparent.save(folder / 'transparent.png')
    cat.convert('P').save(folder / 'palette.gif')
    cat.resize((30, 90)).convert('L').save(folder / 'small.png')
    Image.fromarray(np.asarray(cat.convert('L')).astype(np.uint16) << 8).save(folder / 'deep.png')
    Image.fromarray(photographs.coffee()).save(folder / 'coffee.webp')
    return sorted(folder.iterdir())


def rows(predicted) -> list:
    return [
        [(each['class'], pytest.approx(each['probability'], rel=1e-4, abs=1e-7)) for each in one] for one in predicted
    ]


@pytest.mark.slow
@pytest.mark.parametrize('views', [1, 10])
def test_predictions_equal_those_of_the_command(run, network, files, views):
    command = run_command('-m', 'alexnet_jax.predict', run, *files, '--json', f'--views={views}', '--top=3')
    expected = [
        [(each['class'], each['probability']) for each in json.loads(line)['top']]
        for line in command.stdout.splitlines()
    ]
    assert len(expected) == len(files), command.stderr
    assert rows(network.predict(files, views=views, top=3)) == expected
    assert rows(network.predict(map(str, files), views=views, top=3)) == expected
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(Image.open(file)) for file in files]
        assert rows(network.predict(opened, views=views, top=3)) == expected
        assert opened[-1].getexif()[0x0112] == 6  # turned.jpg
    assert rows([network.predict(files[0], views=views, top=3)]) == expected[:1]
    many = [network.predict([file] * 9, views=views, top=3)[8] for file in files[:1]]  # the second batch is padded
    assert rows(many) == expected[:1]


def test_pictures_as_arrays_files_and_images_are_the_same(new, tmp_path):
    cat = photographs.chelsea()
    Image.fromarray(cat).save(tmp_path / 'cat.png')
    expected = np.asarray(Image.fromarray(cat).resize((385, 256), Image.Resampling.BICUBIC))[:, 64:320]
    for picture in (cat, tmp_path / 'cat.png', str(tmp_path / 'cat.png'), Image.fromarray(cat)):
        np.testing.assert_array_equal(new.images(picture), expected[None])
    gray = photographs.camera()
    np.testing.assert_array_equal(new.images([gray, gray[..., None]]), new.images([np.stack([gray] * 3, -1)] * 2))
    np.testing.assert_array_equal(new.images(np.stack([cat, cat[::-1]])), new.images([cat, cat[::-1]]))
    np.testing.assert_array_equal(new.images(jax.numpy.asarray(cat)), expected[None])
    for pictures in ([tmp_path / 'cat.png', gray], jax.numpy.asarray(new.images([cat, gray]))):
        np.testing.assert_array_equal(new.logits(pictures), new.logits(new.images([cat, gray])))
    mean = np.array([123.675, 116.28, 103.53])
    inputs = (expected[16:240, 16:240] - mean) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(new.preprocess(cat)[0], inputs, atol=1e-5)


def test_activations_of_several_layers_equal_those_of_one(network, caplog):
    size = network.config.data.image_size
    images = np.random.default_rng(0).integers(0, 256, (19, size, size, 3), np.uint8)
    outputs = network.activations(images, ('conv5', 'fc7', 'fc8'))
    assert {name: (each.shape, each.dtype) for name, each in outputs.items()} == {
        'conv5': ((19, 8, 8, 16), np.float32),
        'fc7': ((19, 32), np.float32),
        'fc8': ((19, 16), np.float32),
    }
    inputs = np.stack([center_crop(image, network.config, network.statistics) for image in images])
    by_module = network.module.activations(jax.numpy.asarray(inputs))
    for layer, values in outputs.items():
        step = make_activation_fn(network.config, network.mesh, layer)
        one = np.stack(list(network.predict_batches(step, images, 24)))
        np.testing.assert_allclose(values, one, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(values, by_module[layer], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs['fc8'], network.logits(images), rtol=1e-5, atol=1e-6)
    assert list(network.activations(images[:1], iter(['fc7', 'conv5', 'fc7']))) == ['fc7', 'conv5']
    with caplog.at_level('WARNING'), jax.log_compiles():
        for count in (1, 5, 8, 19):
            again = network.activations(images[:count], ['conv5', 'fc7', 'fc8'])
            np.testing.assert_allclose(again['fc7'], outputs['fc7'][:count], rtol=1e-5, atol=1e-5)
    assert not [each.message for each in caplog.records if 'activation_step' in each.message]


def test_integers_of_numpy_are_numbers(new):
    with pytest.raises(ValueError, match='views: True'):
        new.predict(CAT, views=True)
    assert new.predict(CAT, views=np.int64(1), top=np.uint8(2)) == new.predict(CAT, views=1, top=2)
    made = alexnet_jax.create('torchvision', num_classes=np.int64(3), seed=np.int32(0), settings=SMALL)
    assert (made.digest, made.class_names) == (new.digest, ['class 0', 'class 1', 'class 2'])
    assert made != new
    assert {made: 1, new: 2}[new] == 2


@pytest.mark.parametrize('kind', [str, Path])
def test_logits_of_a_file_of_torchvision(kind):
    network = alexnet_jax.load(kind(FIXTURES / 'torchvision_zip.pth'), class_names=list('abcde'))
    with np.load(FIXTURES / 'torch_expected.npz') as arrays:
        expected = arrays['logits']
    np.testing.assert_allclose(network.logits(torch_pictures()), expected, rtol=1e-4, atol=1e-4)
    inputs = network.preprocess(torch_pictures())
    np.testing.assert_allclose(network.module(inputs), expected, rtol=1e-4, atol=1e-4)
    assert network.predict(torch_pictures()[0], views=1, top=1)[0]['class'] == 'abcde'[expected[0].argmax()]
    assert (network.workdir, network.step, len(network.digest)) == ('', 0, 64)


@pytest.mark.slow
def test_the_gradient_equals_finite_differences(new):
    inputs = new.preprocess([photographs.chelsea(), photographs.coffee()])

    def score(x):
        return new.module(x)[:, 1].sum()

    gradient = np.asarray(jax.grad(score)(inputs), np.float64)
    slope = np.linalg.norm(gradient)  # along the gradient; in other directions, rounding exceeds the difference
    direction = (gradient / slope).astype(np.float32)
    difference = (float(score(inputs + 0.05 * direction)) - float(score(inputs - 0.05 * direction))) / 0.1
    np.testing.assert_allclose(slope, difference, rtol=0.02)


def test_the_module_can_be_used_first_inside_a_gradient():
    network = alexnet_jax.create('torchvision', num_classes=2, settings={'model.widths': (8, 0, 0, 0, 16, 0, 32)})
    inputs = network.preprocess(photographs.chelsea())
    slopes = jax.jit(jax.grad(lambda x: network.module(x)[0, 1]))(inputs)
    np.testing.assert_array_equal(slopes, jax.jit(jax.grad(lambda x: network.module(x)[0, 1]))(inputs))
    gradients = nnx.grad(lambda module: module(inputs)[0, 1])(network.module)  # refuses parameters of another trace
    assert gradients['conv1']['kernel'][...].shape == (11, 11, 3, 8)


def test_the_module_refuses_images_of_another_shape(new):
    with pytest.raises(ValueError, match=r'images: the shape is \(1, 256, 256, 3\), not \(B, 224, 224, 3\)'):
        new.module(jax.numpy.zeros((1, 256, 256, 3)))


@pytest.mark.slow
def test_create_has_the_weights_of_a_new_run(photos_dir, tmp_path):
    fields = {'model.preset': 'torchvision', 'model.widths': '(8,0,0,0,16,0,32)', 'model.num_classes': 16, 'seed': 7}
    still = {'data.source': 'photos', 'data.data_dir': photos_dir, 'data.image_size': 72, 'data.crop_size': 64}
    still |= {'train.steps': 1, 'train.batch_size': 8, 'optimizer.learning_rate': 1e-30, 'eval.views': 1}
    command = run_command('launch.py', f'--workdir={tmp_path}/run', *config_flags(fields | still))
    assert command.returncode == 0, command.stderr
    trained = alexnet_jax.load(tmp_path / 'run/checkpoints/1')
    settings = SMALL | {'data.image_size': 72, 'data.crop_size': 64}
    made = alexnet_jax.create('torchvision', num_classes=16, seed=7, settings=settings)
    assert set(made.state.params) == {'conv1', 'conv5', 'fc7', 'fc8'}
    jax.tree.map(np.testing.assert_array_equal, made.state.params, trained.state.params)
    other = alexnet_jax.create('torchvision', num_classes=16, seed=8, settings=settings)
    assert not np.array_equal(other.state.params['conv1']['kernel'], made.state.params['conv1']['kernel'])


@pytest.mark.slow
def test_devices_change_nothing():
    small = {'model.widths': (8, 8, 8, 8, 8, 16, 16), 'data.image_size': 72, 'data.crop_size': 64}
    small |= {'model.conv1_stride': 2, 'train.batch_size': 16}
    pictures = [photographs.chelsea(), photographs.coffee(), photographs.camera()]
    layers, results = ('conv1', 'conv2', 'conv5', 'fc6', 'fc7'), []
    for mesh in ({'data': 1, 'model': 1}, {'data': 4, 'model': 2}, {'data': 4, 'model': 2, 'layout': 'hybrid'}):
        settings = small | {f'mesh.{name}': value for name, value in mesh.items()}
        network = alexnet_jax.create('paper', num_classes=4, seed=1, settings=settings)
        assert network.mesh.size == mesh['data'] * mesh['model']
        images = network.images(pictures)
        probabilities = [sorted(each.items()) for one in network.predict(pictures, views=1) for each in one]
        outputs = network.activations(images, layers)
        module = network.module.activations(network.preprocess(pictures))
        assert module['fc8'].devices() == {jax.local_devices()[0]}
        for name in layers:
            np.testing.assert_allclose(outputs[name], module[name], rtol=1e-4, atol=1e-5)
        results.append((outputs | {'fc8': network.logits(images)}, probabilities))
    for outputs, probabilities in results[1:]:
        for name, values in outputs.items():
            np.testing.assert_allclose(values, results[0][0][name], rtol=1e-4, atol=1e-5)
        for ours, first in zip(probabilities, results[0][1], strict=True):
            assert (ours[0], ours[1][1]) == (first[0], pytest.approx(first[1][1], rel=1e-4))


def test_file_folder_and_checkpoint_are_the_same_network(run, network, tmp_path):
    export.write(network, f'{tmp_path}/model.safetensors')
    images = np.random.default_rng(0).integers(0, 256, (2, 72, 72, 3), np.uint8)
    for source in (tmp_path / 'model.safetensors', tmp_path, f'{run}/checkpoints/0', Path(run)):
        loaded = alexnet_jax.load(source)
        np.testing.assert_allclose(loaded.logits(images), network.logits(images), rtol=1e-5, atol=1e-6)
        assert loaded.class_names == network.class_names
        assert re.fullmatch(r'<TrainedModel .+: preset paper, 16 classes, step 0>', repr(loaded))
    (tmp_path / 'names.txt').write_text('\n'.join(f'name {label}' for label in range(16)))
    named = alexnet_jax.load(tmp_path / 'model.safetensors', class_names=tmp_path / 'names.txt')
    assert named.class_names[3] == 'name 3'


HUB = """
import pathlib
def snapshot_download(repository, allow_patterns):
    assert allow_patterns == ['*.safetensors', '*.json']
    return str(pathlib.Path(__file__).parent / repository)
"""


def test_a_repository_of_the_hub(new, tmp_path, monkeypatch):
    (tmp_path / 'org/alexnet').mkdir(parents=True)
    (tmp_path / 'org/empty').mkdir()
    export.write(new, f'{tmp_path}/org/alexnet/model.safetensors')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)  # as if it is not installed
    text = refusal(alexnet_jax.load, 'hf://org/alexnet')
    assert 'pip install huggingface_hub' in text
    assert 'hf download org/alexnet --local-dir DIR' in text
    monkeypatch.delitem(sys.modules, 'huggingface_hub')
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'huggingface_hub.py').write_text(HUB)
    assert alexnet_jax.load('hf://org/alexnet').class_names == ['class 0', 'class 1', 'class 2']
    assert 'hf://org/empty: the repository has no model.safetensors' in refusal(alexnet_jax.load, 'hf://org/empty')
    assert 'hf://ORG/NAME' in refusal(alexnet_jax.load, 'hf://org')


CAT = photographs.chelsea()


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda net: net.predict([]), 'pictures: the list is empty'),
        (lambda net: net.predict(CAT / 255), r'picture 0: the dtype is float64; give uint8 .*astype\(np.uint8\)'),
        (lambda net: net.predict([CAT, CAT[..., :2]]), r'picture 1: the shape is \(300, 451, 2\); give \(H, W, 3\)'),
        (lambda net: net.predict(CAT[0, 0]), r'picture 0: the shape is \(3,\)'),
        (lambda net: net.predict([1]), 'picture 0: int is not a picture; give a path'),
        (lambda net: net.predict(b'cat.jpg'), 'picture 0: bytes is not a picture; give a path'),
        (lambda net: net.predict(None), 'pictures: NoneType is not a picture; give a path'),
        (lambda net: net.predict(CAT, views=5), 'views: 5 is neither 1 nor 10'),
        (lambda net: net.predict(CAT, top=0), 'top: 0 is not a number of classes from 1'),
        (lambda net: net.predict(CAT, views=True), 'views: True is neither 1 nor 10'),
        (lambda net: net.predict(CAT, top=True), 'top: True is not a number of classes from 1'),
        (
            lambda net: net.predict(['none.jpg', CAT / 255]),
            'picture 1: the dtype is float64',
        ),  # before none.jpg is read
        (lambda net: net.predict('a\0b'), r"picture 0: 'a\\x00b' is not a path"),
        (lambda net: net.predict(CAT[None, None]), r'picture 0: the shape is \(1, 300, 451, 3\)'),
        (lambda net: net.logits(np.zeros((1, 256, 256, 3))), r'picture 0: the dtype is float64; give uint8'),
        (lambda net: net.logits(net.images(CAT)[:0]), 'pictures: the list is empty'),
        (lambda net: net.logits(np.moveaxis(net.images(CAT), -1, 1)), r'picture 0: the shape is \(3, 256, 256\); give'),
        (lambda net: net.activations(net.images(CAT), 'fc9'), "layers: 'fc9' is not a layer .*conv1, conv5, fc7, fc8"),
        (lambda net: net.activations(net.images(CAT), ['conv1', 3]), 'layers: 3 is not a layer'),
        (lambda net: net.activations(net.images(CAT), []), r'layers: \[\]: give at least one of conv1'),
        (lambda net: net.activations(net.images(CAT), None), 'layers: None is not a layer'),
        (lambda net: alexnet_jax.create('cafe'), "'cafe' is not one of .*; the nearest is 'caffe'"),
        (lambda net: alexnet_jax.create(None), "'None' is not one of paper, "),
        (
            lambda net: alexnet_jax.create('paper', settings=[('model.lrn', False)]),
            'settings: .* is not a dict by name',
        ),
        (lambda net: alexnet_jax.create('paper', settings={3: 4}), 'settings: {3: 4} is not a dict by name'),
        (lambda net: alexnet_jax.create('paper', settings={'model.preset': 'caffe'}), r"settings: 'model\.preset'"),
        (lambda net: alexnet_jax.create('paper', num_classes=1), 'config.model.num_classes: 1'),
        (lambda net: alexnet_jax.create('paper', num_classes='auto'), 'num_classes: a new network has no data'),
        (lambda net: alexnet_jax.create('paper', seed=-1), 'config.seed: -1'),
        (lambda net: alexnet_jax.create('paper', seed='a'), "config.seed: 'a' is str, not int"),
        (lambda net: alexnet_jax.create('paper', settings={'model.width': 3}), 'the nearest is config.model.widths'),
        (lambda net: alexnet_jax.load('no/run'), 'no/run: there is no such file or folder; name a file of weights'),
        (lambda net: alexnet_jax.load('no\nrun'), r"'no\\nrun': there is no such file or folder"),
        (lambda net: alexnet_jax.load(3), 'source: int is not a path'),
        (lambda net: alexnet_jax.load(''), 'source: the path is empty'),
        (lambda net: alexnet_jax.load('https://a.b/c.pth'), 'https://a.b/c.pth: URLs are not read; download the file'),
        (lambda net: alexnet_jax.load(FIXTURES), 'has no config.json; name a run'),
        (
            lambda net: alexnet_jax.load(FIXTURES / 'torchvision_zip.pth', class_names=['a', 'b']),
            '2 names; the network has 5',
        ),
        (
            lambda net: alexnet_jax.load(FIXTURES / 'torchvision_zip.pth', mean=(1, 2)),
            'mean=1.0,2.0: must be three numbers',
        ),
        (lambda net: alexnet_jax.load(FIXTURES / 'torchvision_zip.pth', mean=3), 'mean: 3 is neither a file nor'),
        (
            lambda net: alexnet_jax.load(FIXTURES / 'torchvision_zip.pth', mean=CAT),
            r'mean: array\(.* is neither a file',
        ),
        (lambda net: alexnet_jax.load(FIXTURES / 'torchvision_zip.pth', class_names=5), 'class_names: 5 is neither'),
        (lambda net: alexnet_jax.load(FIXTURES / 'torchvision_zip.pth', crop_size=9), 'ONNX file; omit the argument'),
        (lambda net: alexnet_jax.load(FIXTURES / 'torchvision_zip.pth', preset='caffe'), '^mean is missing'),
        (
            lambda net: alexnet_jax.load(FIXTURES / 'torchvision_zip.pth', preset='cafe'),
            "'cafe'.* the nearest is 'caffe'",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(new, call, message):
    text = refusal(call, new)
    assert re.search(message, text), text


def test_files_without_weights_and_arguments_of_files_are_refused(run, tmp_path):
    (tmp_path / 'cat.png').write_bytes(b'\x89PNG\r\n')
    with pytest.raises(FormatError, match=r'^\S+cat\.png: a picture; supported are [^\n]+$'):
        alexnet_jax.load(tmp_path / 'cat.png')
    assert 'mean: has no effect for' in refusal(alexnet_jax.load, run, mean=(1, 2, 3))


def test_unreadable_pictures_are_named(new, tmp_path):
    (tmp_path / 'bad.jpg').write_bytes(b'text')
    for pictures, message in [
        (tmp_path / 'bad.jpg', r'bad\.jpg: not an image, or in a format'),
        ([str(tmp_path / 'none.jpg')], r'none\.jpg: No such file or directory'),
        ([CAT, Image.new('F', (30, 30))], 'picture 1: 32 bits per pixel'),
        (Image.new('RGB', (0, 3)), 'picture 0: it has no pixels'),
        ('https://a.b/cat.jpg', 'https://a.b/cat.jpg: a URL, which is not read; download the picture'),
    ]:
        with pytest.raises(UnreadableImage, match=message):
            new.predict(pictures)


@pytest.mark.slow
def test_the_examples_of_the_docstrings(tmp_path):
    run = run_command(ROOT / 'tests/doctests.py', cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stdout
    assert re.search(r'^4\d examples of alexnet_jax [\d.]+, 0 failed$', run.stdout), run.stdout


def code_blocks(page: str) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```', (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_code_of_the_page(run, tmp_path):
    """The blocks of docs/python.md run in order, in a folder that has what the page presumes."""
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs/quickstart').symlink_to(run)
    (tmp_path / 'alexnet.pth').symlink_to(FIXTURES / 'torchvision_zip.pth')
    Image.fromarray(CAT).save(tmp_path / 'cat.jpg')
    (tmp_path / 'pictures').mkdir()
    for number in range(3):
        Image.fromarray(CAT[:, 40 * number :]).save(tmp_path / f'pictures/{number}.jpg')
    blocks = code_blocks('docs/python.md')
    assert len(blocks) >= 6
    (tmp_path / 'page.py').write_text('\n'.join(blocks))
    page = run_command('page.py', cwd=tmp_path, PYTHONPATH=str(ROOT), MPLBACKEND='agg')
    assert page.returncode == 0, page.stderr
    with np.load(tmp_path / 'features.npz') as features:
        assert features['fc7'].shape == (3, 32)
    assert np.asarray(Image.open(tmp_path / 'saliency.png')).std() > 1


SCRIPT = """
import alexnet_jax
from alexnet_jax import AlexNet, TrainedModel, create, load
network = load('runs/quickstart')
reveal_type(network)
reveal_type(network.predict('cat.jpg'))
reveal_type(network.predict(['cat.jpg'])[0][0]['probability'])
reveal_type(network.activations('cat.jpg')['fc7'])
reveal_type(alexnet_jax.create('paper').step)
alexnet_jax.laod
create(3)
"""


@pytest.mark.slow
def test_type_checkers_know_the_names(tmp_path):
    assert (ROOT / 'alexnet_jax/py.typed').exists()
    (tmp_path / 'script.py').write_text(SCRIPT)
    options = ['--config-file=pyproject.toml', '--follow-imports=silent', f'--cache-dir={tmp_path}']
    run = run_command('-m', 'mypy', *options, tmp_path / 'script.py', MYPYPATH=str(ROOT))
    lines = [re.sub(r'^.*script.py:|(\w+\.)+(?=\w)', '', line) for line in run.stdout.splitlines()]
    assert lines == [
        '5: note: Revealed type is "TrainedModel"',
        "6: note: Revealed type is \"list[TypedDict(ClassProbability, {'class': str, 'probability': float})]\"",
        '7: note: Revealed type is "float"',
        '8: note: Revealed type is "ndarray[tuple[Any, ...], dtype[Any]]"',
        '9: note: Revealed type is "int"',
        '10: error: Module has no attribute "laod"  [attr-defined]',
        '11: error: Argument 1 to "create" has incompatible type "int"; expected "str"  [arg-type]',
        'Found 2 errors in 1 file (checked 1 source file)',
    ]
