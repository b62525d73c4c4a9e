"""The report page: its content against the files that it shows, and its layout in Chromium on a desktop and a phone."""

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

import numpy as np
import pytest
from helpers import largest_file, read_json, read_lines, run_command, usage_error
from PIL import Image

from alexnet_jax.config import resolve
from alexnet_jax.data import dataset
from alexnet_jax.evaluate import predictions
from alexnet_jax.inference import trained_model
from alexnet_jax.report import model_section
from alexnet_jax.report.config_diff import published
from alexnet_jax.report.page import run_page
from alexnet_jax.runtime.workdir import read_dataset_statistics, write_dataset_statistics
from configs import imagenet, quickstart

CHROMEDRIVER = '/usr/bin/chromedriver'  # of Debian, whose chromium has the same version
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_programs')]

# Over the settings of the quickstart; narrow, because compilation takes longest.
SETTINGS = {
    'seed': 3,
    'model.conv1_stride': 8,
    'model.widths': (16, 0, 0, 0, 32, 0, 64),
    'model.conv_ops': ('activation lrn', '', '', '', 'activation pool'),
    'model.kernel_std': (0.05,) * 8,
    'data.std': (64.0,),
    'optimizer.learning_rate': 0.02,
    'optimizer.schedule': 'constant',
    'train.steps': 40,
    'train.log_every': 10,
    'eval.every': 10,
}
HOSTILE = {
    'astronaut': '<script>document.title = "taken"</script>',
    'camera': '<img src="http://example.com/x.png" onerror="document.title = 1">',
    'coins': '"><h1 style="position: fixed; width: 4000px">&amp; \u4f60\u597d \U0001f600 \u05e9\u05dc\u05d5\u05dd',
    'page': ' '.join(['W' * 300, *['many words'] * 40]),
}
NAMES = {'run': 'run', 'sweep': 'sweep', 'bare': 'bare', 'hostile': '<b>run & "co"'}
SCREENS = {'desktop': (1280, 900, False), 'phone': (360, 740, True)}
SECTIONS = ['What was run', 'Result', 'Curves', 'Kernels of conv1', 'Predictions', 'Neighbors', 'Layers', 'Throughput']
SECTIONS += ['Hardware and versions']
VOID = {'meta', 'link', 'img', 'br', 'wbr'}  # elements without an end tag


def report(*arguments) -> subprocess.CompletedProcess:
    return run_command('-m', 'alexnet_jax.report', *arguments)


class Page(HTMLParser):
    """The elements of a page. Its tags must be balanced."""

    def __init__(self, content: bytes):
        super().__init__()
        self.root = Element('document')
        self.open = [self.root]
        self.feed(content.decode())
        assert self.open == [self.root]
        self.sections = {words(each.find('h2')): each for each in self.root.iter('section')}

    def handle_starttag(self, tag, attributes):
        element = SubElement(self.open[-1], tag, dict(attributes))
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, text):
        parent = self.open[-1]
        if len(parent):
            parent[-1].tail = (parent[-1].tail or '') + text
        else:
            parent.text = (parent.text or '') + text

    def text(self, section: str) -> str:
        return words(self.sections[section])

    def rows(self, section: str) -> list[list[str]]:
        return [[words(cell) for cell in row] for row in self.sections[section].iter('tr')]

    def images(self, section: str) -> list[Element]:
        return list(self.sections[section].iter('img'))

    def header(self) -> str:
        return words(self.root.find('.//header'))

    def explained(self) -> list[str]:
        """The sections with an explanation of missing content."""
        return [name for name in self.sections if self.sections[name].find('p[@class="missing"]') is not None]


def words(element: Element) -> str:
    return ' '.join(''.join(element.itertext()).split())


def pixels(image: Element) -> np.ndarray:
    png = base64.b64decode(image.get('src').removeprefix('data:image/png;base64,'), validate=True)
    return np.asarray(Image.open(io.BytesIO(png)))


def page_of(workdir: Path, data_dir: str | None = None, neighbors: bool = True) -> Page:
    return Page(run_page(str(workdir), data_dir, neighbors, 'command'))


@pytest.fixture(scope='module')
def folders(photos_dir, tmp_path_factory) -> dict[str, Path]:
    """A trained run; the same with hostile names; a sweep of copies with made-up errors; a run that has not started."""
    folder = tmp_path_factory.mktemp('runs')
    made = {name: folder / directory for name, directory in NAMES.items()}
    flags = [f'--config.{name}={value}' for name, value in {**SETTINGS, 'data.data_dir': photos_dir}.items()]
    done = run_command('launch.py', f'--workdir={made["run"]}', *flags)
    assert done.returncode == 0, done.stderr

    shutil.copytree(made['run'], made['hostile'])
    statistics, names = read_dataset_statistics(str(made['run']))
    write_dataset_statistics(str(made['hostile']), statistics, [HOSTILE.get(name, name) for name in names])

    made['bare'].mkdir()
    shutil.copy(made['run'] / 'config.json', made['bare'])

    errors = {'base/seed_0': 0.10, 'base/seed_1': 0.14, '<i>no_lrn&/seed_0': 0.20, '<i>no_lrn&/seed_1': 0.24}
    for directory, error in errors.items():
        shutil.copytree(made['run'], made['sweep'] / directory)
        result = read_json(made['run'] / 'result.json')
        result['views']['10'] = {'loss': 1.0, 'top1_error': error, 'top5_error': 0.01, 'examples': 1600}
        (made['sweep'] / directory / 'result.json').write_text(json.dumps(result))
    shutil.copytree(made['run'], made['sweep'] / '<i>no_lrn&/seed_2', ignore=shutil.ignore_patterns('result.json'))
    environment = made['sweep'] / 'base/seed_1/environment.json'
    environment.write_text(json.dumps({**read_json(environment), 'processor': 'another one'}))
    (made['sweep'] / 'sweep.json').write_text(json.dumps(sweep_plan()))
    return made


def sweep_plan() -> dict:
    plain = {'overrides': {}, 'published': None, 'source': '', 'note': ''}
    no_lrn = {'overrides': {'model.lrn': False}, 'published': [1.37, None], 'source': 'net #148 <u>against</u> #145'}
    variants = [plain | {'name': 'base'}, plain | {'name': '<i>no_lrn&'} | no_lrn, plain | {'name': 'half'}]
    runs = [
        {'variant': name, 'seed': seed, 'directory': f'{name}/seed_{seed}', 'overrides': {}}
        for name, seeds in (('base', 2), ('<i>no_lrn&', 3), ('half', 1))
        for seed in range(seeds)
    ]
    return {'config': 'configs/ablations.py:photos', 'base': 'base', 'variants': variants, 'runs': runs}


@pytest.fixture(scope='module')
def files(folders, tmp_path_factory) -> dict[str, Path]:
    """The page that the command writes for each folder."""
    folder = tmp_path_factory.mktemp('pages')
    files = {name: folder / f'{name}.html' for name in folders}
    files['run'].write_text('replaced by the page')
    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(lambda name: report(folders[name], f'--html={files[name]}'), folders))
    assert [done.stderr for done in written if done.returncode or 'Traceback' in done.stderr] == []
    assert set(folder.iterdir()) == set(files.values())
    return files


@pytest.fixture(scope='module')
def pages(files) -> dict[str, Page]:
    return {name: Page(file.read_bytes()) for name, file in files.items()}


# In Chromium.


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not (os.path.exists(CHROMEDRIVER) and shutil.which('chromium')):
        (pytest.fail if os.environ.get('CI') else pytest.skip)(
            'chromium and chromedriver are not installed: make chromium installs them (Debian, as root)'
        )
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    switches = 'headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking'
    for switch in f'{switches} disable-sync disable-dev-shm-usage disable-component-update'.split():
        options.add_argument(f'--{switch}')
    options.add_argument(f'--user-data-dir={tmp_path_factory.mktemp("chromium")}')
    options.binary_location = shutil.which('chromium')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def show(browser, file: Path, screen: str, scheme: str = 'light') -> None:
    """Loads the page, with the logs of earlier pages cleared."""
    width, height, mobile = SCREENS[screen]
    metrics = {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': mobile}
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)
    feature = {'name': 'prefers-color-scheme', 'value': scheme}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [feature]})
    browser.get('about:blank')
    for log in ('browser', 'performance'):
        browser.get_log(log)
    browser.get(file.as_uri())


# Text outside the page or outside the content of its scrolling box, tiny text, and broken, distorted or tiny images.
LAYOUT_PROBLEMS = """
const width = document.documentElement.clientWidth, problems = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode, parent = text.parentElement, box = parent.closest('.scroll, pre');
  if (!text.data.trim()) continue;
  const range = document.createRange();
  range.selectNodeContents(text);
  const edges = box ? box.getBoundingClientRect() : {left: 0, right: width};
  const hidden = box ? box.scrollWidth - box.clientWidth : 0;
  for (const r of range.getClientRects())
    if (r.left < edges.left - 1 || r.right > edges.right + hidden + 1) problems.push(`outside: ${text.data}`);
  if (edges.left < -1 || edges.right > width + 1) problems.push(`box outside: ${text.data}`);
  if (!range.getClientRects().length) problems.push(`invisible: ${text.data}`);
  if (parseFloat(getComputedStyle(parent).fontSize) < 11) problems.push(`small: ${text.data}`);
}
for (const e of document.images) {
  const r = e.getBoundingClientRect();
  if (!e.complete || !e.naturalWidth || !e.alt) problems.push(`no image: ${e.alt}`);
  if (Math.abs(r.width / r.height / e.naturalWidth * e.naturalHeight - 1) > 0.04) problems.push(`distorted: ${e.alt}`);
  if (r.width < (e.closest('.wide') ? 600 : 60)) problems.push(`small: ${e.alt}`);
}
return [problems, document.images.length, document.documentElement.scrollWidth];
"""


@pytest.mark.parametrize('screen', SCREENS)
@pytest.mark.parametrize('name', NAMES)
def test_page_fits_screen_and_loads_nothing(browser, files, pages, name, screen):
    show(browser, files[name], screen)
    problems, images, scroll_width = browser.execute_script(LAYOUT_PROBLEMS)
    assert problems == []
    assert images == len(list(pages[name].root.iter('img'))) > 0
    assert scroll_width <= SCREENS[screen][0]
    assert browser.title == f'{NAMES[name]}: report'
    assert [line for line in browser.get_log('browser') if line['level'] in ('SEVERE', 'WARNING')] == []
    events = [json.loads(line['message'])['message'] for line in browser.get_log('performance')]
    urls = {event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent'}
    assert files[name].as_uri() in urls
    assert {url.split(':')[0] for url in urls} <= {'file', 'data'}


# Contrast, as WCAG 2 defines it, of each text with its background and with the bar behind it.
CONTRASTS = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = (color) => {
  const [r, g, b] = channels(color).map((v) => v / 255).map((v) =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode;
  if (!text.data.trim()) continue;
  let e = text.parentElement;
  while (e !== document.body && (channels(getComputedStyle(e).backgroundColor)[3] ?? 1) === 0) e = e.parentElement;
  const bar = text.parentElement.closest('li')?.querySelector('.bar');
  for (const behind of bar ? [e, bar] : [e]) {
    const pair = [getComputedStyle(text.parentElement).color, getComputedStyle(behind).backgroundColor].map(luminance);
    found.push([(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), text.data]);
  }
}
return [found, luminance(getComputedStyle(document.body).backgroundColor)];
"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name', ['run', 'sweep', 'bare'])
def test_text_has_contrast_in_light_and_dark(browser, files, name, scheme):
    show(browser, files[name], 'desktop', scheme)
    found, ground = browser.execute_script(CONTRASTS)
    assert len(found) > 20
    assert [pair for pair in found if pair[0] < 4.5] == []
    assert ground > 0.9 if scheme == 'light' else ground < 0.02


def test_hostile_names_are_shown_as_text(browser, files, pages):
    show(browser, files['hostile'], 'desktop')
    text = browser.execute_script('return document.body.textContent')
    assert [name for name in HOSTILE.values() if name not in text] == []
    assert [words(heading) for heading in pages['hostile'].root.iter('h1')] == [NAMES['hostile']]
    # The content security policy is the second defense.
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x.png\">')")
    assert any('Content Security Policy' in line['message'] for line in browser.get_log('browser'))


# Content.


@pytest.mark.parametrize('name', NAMES)
def test_page_is_one_document_with_ordered_headings(files, pages, name):
    content, root = files[name].read_text(), pages[name].root
    assert content.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not {'script', 'iframe', 'a', 'object'} & {element.tag for element in root.iter()}
    assert [link.get('href') for link in root.iter('link')] == ['data:,']  # an empty icon
    levels = [int(element.tag[1]) for element in root.iter() if element.tag in ('h1', 'h2', 'h3')]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    if name != 'sweep':
        assert list(pages[name].sections) == SECTIONS


def test_errors_and_settings_match_the_run(folders, pages):
    views, page = read_json(folders['run'] / 'result.json')['views'], pages['run']
    assert list(views) == ['1', '10']
    top1, top5 = (
        {name: f'{100 * e[error]:.2f} %' for name, e in views.items()} for error in ('top1_error', 'top5_error')
    )
    assert page.rows('Result')[1:] == [
        ['this run', name, f'{e["loss"]:.4f}', top1[name], top5[name], '1,600'] for name, e in views.items()
    ]
    assert page.header().endswith(f'Validation: top-1 error {top1["10"]}, top-5 error {top5["10"]} with 10 views.')
    settings = {row[0]: row[1:] for row in page.rows('What was run')[1:]}
    assert set(SETTINGS) - {'seed'} < set(settings)
    assert 'model.lrn' not in settings
    assert settings['train.steps'] == ['None', '40']
    for fact in ('photos, 16 classes', '72 x 72 pixels', '64 x 64', '0.4 epochs of 6,400', 'astronaut, brick, camera'):
        assert fact in page.text('What was run')
    assert f'--workdir={folders["run"]} --config.seed=3 --config.model.conv1_stride=8 ' in page.text('What was run')


def test_layers_throughput_and_versions(folders, pages):
    page, run = pages['run'], folders['run']
    last = read_lines(run / 'layers.jsonl')[-1]
    values = last['conv1']
    weight, bias = values['kernel'], values['bias']
    ratios = [f'{values["kernel_update"] / weight:.1e}', f'{values["bias_update"] / bias:.1e}']
    dead = f'{100 * values["dead"]:.2f} %'
    assert page.rows('Layers')[1] == ['conv1', f'{weight:.3g}', ratios[0], f'{bias:.3g}', ratios[1], dead]
    assert [row[0] for row in page.rows('Layers')[1:]] == ['conv1', 'conv5', 'fc7', 'fc8']
    rate = read_json(run / 'result.json')['images_per_second']
    assert f'{rate:,.1f} images/s' in page.text('Throughput')
    assert f'{2560 / rate:.1f} seconds for 2,560 images' in page.text('Throughput')
    environment = read_json(run / 'environment.json')
    for fact in (environment['processor'], *(f'{name} {each}' for name, each in environment['versions'].items())):
        assert fact in page.text('Hardware and versions')


@pytest.fixture(scope='module')
def store(photos_dir):
    directory = next(Path(photos_dir).glob('prepared/*/prepared.json')).parent
    return dataset.open_prepared(str(directory), resolve(quickstart.get_config()).data)


def test_kernels_are_shown_with_their_saturation(folders, pages):
    network = trained_model.load_model(trained_model.parse_checkpoint_ref(str(folders['run'])))
    kernel = np.asarray(network.state.params['conv1']['kernel'], np.float64)
    for image, part in zip(pages['run'].images('Kernels of conv1'), np.split(kernel, 2, -1), strict=True):
        saturation = ((part - part.mean(2, keepdims=True)) ** 2).sum() / (part**2).sum()
        assert image.get('alt').endswith(f': 8 kernels at step 40, color saturation {saturation:.2f}')


def test_predictions_match_the_evaluation(folders, store, pages):
    _, scores, labels = predictions.predict(trained_model.parse_checkpoint_ref(str(folders['run'])), store, 10)
    cards = [each for each in pages['run'].sections['Predictions'].iter('figure') if each.find('ol') is not None]
    assert len({words(card.find('figcaption')) for card in cards}) == len(cards) == 8
    for card in cards:
        *_, place, _, _, label = card.find('img').get('alt').split()  # validation image 3 of class coins
        probabilities = np.exp(scores[int(place)].astype(np.float64))
        assert label == store.class_names[labels[int(place)]] == words(card.find('figcaption'))
        np.testing.assert_array_equal(pixels(card.find('img')), store.validation[int(place)]['image'])
        best = np.argsort(-probabilities, kind='stable')[:5]
        for item, which in zip(card.iter('li'), best, strict=True):
            _, name, percent = item
            correct = store.class_names[which] == label
            assert words(name) == '\u2713 ' * correct + store.class_names[which]
            assert (item.get('class') == 'true') == correct
            assert int(words(percent).removesuffix(' %')) == pytest.approx(100 * probabilities[which], abs=0.51)


def test_neighbors_are_training_images_by_distance(store, pages):
    groups = [each for each in pages['run'].sections['Neighbors'] if each.get('class') == 'cards small']
    assert len(groups) == 5
    for query, *cards in groups:
        label = words(query.find('figcaption')).removesuffix('query')
        distances = [float(words(card.find('figcaption/span'))) for card in cards]
        assert len(distances) == 6
        assert distances == sorted(distances)
        for card in cards:
            *_, number, _, _, other = card.find('img').get('alt').split()
            assert other == store.class_names[store.train[int(number)]['label']]
            assert (card.get('class') == 'framed') == (other == label)


def test_sweep_page_shows_its_runs(pages):
    page = pages['sweep']
    _, base, no_lrn, half = page.rows('Errors by variant')
    assert base == ['base', '2/2', '12.00 \u00b1 2.83', '', '', '1.00 \u00b1 0.00', '', '']
    assert no_lrn[:3] == ['<i>no_lrn&', '2/3', '22.00 \u00b1 2.83']
    assert no_lrn[4] == '+1.37'
    assert half == ['half', '0/1', *[''] * 6]
    for fact in ('<i>no_lrn&: net #148 <u>against</u> #145', '<i>no_lrn& seed 2 (at step 40)', 'half seed 0 ('):
        assert fact in page.text('Errors by variant')
    settings = [['base', '', '0, 1'], ['<i>no_lrn&', 'model.lrn=false', '0, 1, 2'], ['half', '', '0']]
    assert page.rows('What was run')[1:] == settings
    assert len(page.images('Curves')) == 1
    assert 'half/seed_0/metrics.jsonl' in page.text('Curves')
    own = [image.attrib for image in pages['run'].images('Kernels of conv1')]
    assert [image.attrib for image in page.images('Kernels of conv1')] == own * 2  # of base and <i>no_lrn&
    assert 'half: ' in page.text('Kernels of conv1')
    machines = [words(heading) for heading in page.sections['Hardware and versions'].iter('h3')]
    assert [heading.split(':')[0] for heading in machines] == ['4 runs', '1 run', '1 run']
    assert 'another one' in page.text('Hardware and versions')


def full_size(preset: str, **changes):
    config = imagenet.get_config(preset)
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    return resolve(config)


def test_published_errors_need_equal_network_and_images(tmp_path):
    assert published(full_size('paper', model__dtype='bfloat16', seed=5))[0][3:5] == ['40.7 %', '18.2 %']
    # The errors of `half` were published for images other than those of its settings.
    for config in (full_size('paper', model__lrn=False), full_size('paper', data__crop_size=227), full_size('half')):
        row, remark = published(config)
        assert row == []
        assert 'Not comparable' in remark
    (tmp_path / 'config.json').write_text(json.dumps(full_size('krizhevsky2012').to_dict()))
    page = page_of(tmp_path)
    assert page.rows('Result')[1:] == [['published', '10', '', '40.664 %', '18.21 %', '']]
    assert page.rows('What was run') == []  # no settings differ from the preset


# Missing and corrupt files.


def test_run_that_has_not_started(folders, pages):
    page, command = pages['bare'], f'alexnet train --config=... --workdir={folders["bare"]}'
    assert page.explained() == SECTIONS
    assert [section for section in SECTIONS if command not in page.text(section)] == []


def test_unfinished_run_shows_its_latest_errors(folders, tmp_path):
    shutil.copy(folders['run'] / 'config.json', tmp_path)
    lines = (folders['run'] / 'metrics.jsonl').read_text().splitlines(keepends=True)
    written = [line for line in lines if json.loads(line)['step'] <= 30]
    (tmp_path / 'metrics.jsonl').write_text(''.join(written) + '{"step": 40, "spl')
    *_, validation = [json.loads(line) for line in written if json.loads(line)['split'] == 'validation']
    page = page_of(tmp_path)
    assert 'at step 30' in page.header()
    (row,) = page.rows('Result')[1:]
    assert row[:3] == ['this run, step 30', '1', f'{validation["loss"]:.4f}']
    assert row[3] == f'{100 * validation["top1_error"]:.2f} %'
    (tmp_path / 'result.json').write_text(json.dumps({'status': 'preempted', 'step': 30, 'views': {'1': validation}}))
    assert 'Preempted, at step 30' in page_of(tmp_path).header()


GARBAGE = [
    '{',
    '{"step": null, "split": 3, "views": [1], "status": "done", "versions": 4, "command": {"a": 1}, "model": 2}',
    '{"step": 1e999, "views": {"10": "x", "<b>": {"loss": []}}, "images_per_second": NaN, "split": "train", "fc8": 1}',
    f'{{"step": {"9" * 400}, "split": "validation", "top1_error": "a", "loss": {"9" * 400}, "fc8": {{"kernel": "x"}}}}',
    '\udcff',
]


@pytest.mark.parametrize('text', GARBAGE)
def test_page_of_garbage_explains_missing_parts(tmp_path, text):
    for name in (
        'config.json',
        'result.json',
        'metrics.jsonl',
        'layers.jsonl',
        'environment.json',
        'dataset_statistics.npz',
    ):
        (tmp_path / name).write_text(text, errors='surrogateescape')
    page = page_of(tmp_path)
    assert list(page.sections) == SECTIONS
    assert {'What was run', 'Curves', 'Kernels of conv1', 'Predictions', 'Neighbors'} <= set(page.explained())


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders['run'], tmp_path / 'copy'))


def test_page_without_images_names_the_prepare_command(copy, tmp_path):
    settings = read_json(copy / 'config.json')
    settings['data']['data_dir'] = f'{tmp_path}/else where'
    (copy / 'config.json').write_text(json.dumps(settings))
    page = page_of(copy)
    assert len(page.images('Kernels of conv1')) == 2
    for section in ('Predictions', 'Neighbors'):
        prepare = f"alexnet prepare --source=photos --image_size=72 '--data_dir={tmp_path}/else where'"
        assert prepare in page.text(section)


def test_neighbors_can_be_omitted(copy, photos_dir):
    shutil.rmtree(copy / 'features')
    page = page_of(copy, photos_dir, neighbors=False)
    assert len(page.images('Predictions')) == 8
    assert '--noneighbors' in page.text('Neighbors')
    assert not (copy / 'features').exists()


@pytest.mark.parametrize('lost', ['dataset_statistics.npz', 'checkpoints/40'])
def test_lost_weights_and_inputs_are_named(copy, tmp_path, lost):
    if lost == 'dataset_statistics.npz':
        (copy / lost).unlink()
    else:
        part = largest_file(copy / lost / 'state')
        part.write_bytes(b'x' * part.stat().st_size)
    # In a process, because Orbax leaves coroutines of a corrupt checkpoint behind, a warning that is an error here.
    done = report(copy, f'--html={tmp_path}/page.html')
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / 'page.html').read_bytes())
    for section in ('Kernels of conv1', 'Predictions', 'Neighbors'):
        assert f'{copy}/{lost}' in page.text(section)
        assert page.images(section) == []
    assert len(page.images('Curves')) == 1


def test_chosen_images_are_spread_over_classes():
    class Split(list):
        def __getitem__(self, index):
            label = super().__getitem__(index)
            return None if label is None else {'label': label}  # None: a corrupt record

    thousand = model_section.choose(Split(np.repeat(np.arange(1000), 50)), 8)
    labels = [example['label'] for _, example in thousand]
    assert (len(set(labels)), labels[0], labels[-1]) == (8, 0, 999)
    two = model_section.choose(Split([0] * 90 + [1] * 10), 6)
    assert [example['label'] for _, example in two] == [0, 1, 0, 1, 0, 1]
    assert model_section.choose(Split([4, None, 2]), 8) == [(2, {'label': 2}), (0, {'label': 4})]


# The command.


def test_run_is_summarized_in_the_terminal(folders):
    done = report(folders['run'])
    assert (done.returncode, done.stderr) == (0, '')
    errors = read_json(folders['run'] / 'result.json')['views']['10']
    assert done.stdout.startswith(f'{folders["run"]}: done at step 40\n')
    assert f'top-1 error {100 * errors["top1_error"]:.2f} %' in done.stdout.splitlines()[2]


def test_wrong_arguments_are_refused(folders, tmp_path):
    refused = {
        (folders['run'], f'--html={tmp_path}/page.txt'): f"--html: '{tmp_path}/page.txt'",
        (folders['run'], '--views=10'): f'--views is a flag for sweeps, and {folders["run"]} is a run',
        (tmp_path, f'--html={tmp_path}/page.html'): f'{tmp_path} contains neither a run nor a sweep',
    }
    for arguments, reason in refused.items():
        assert usage_error(report(*arguments)).startswith(reason)
    assert list(tmp_path.iterdir()) == []
