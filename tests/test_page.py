"""The report page in a real Chromium, on a desktop and on a phone; what it says against the files it is made of."""

import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.config import resolve
from alexnet_jax.data import dataset
from alexnet_jax.evaluate import summary
from alexnet_jax.inference import trained_model
from alexnet_jax.report import model_section, run_page
from alexnet_jax.report.config_diff import differences, published
from alexnet_jax.runtime.workdir import read_dataset_statistics, write_dataset_statistics
from configs import imagenet, quickstart

ROOT = Path(__file__).parent.parent
CHROMEDRIVER = '/usr/bin/chromedriver'  # of Debian, whose chromium is of the same version
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('compiled_programs')]

# Over the quickstart's settings; narrow, for the compiler takes the longest.
SETTINGS = {
    'seed': 3,
    'model.conv1_stride': 8,
    'model.widths': (16, 0, 0, 0, 32, 0, 64),
    'model.conv_ops': ('activation lrn', '', '', '', 'activation pool'),
    'model.kernel_std': (0.05,) * 8,
    'model.dropout': 0.0,
    'data.color': 'none',
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
    'gravel': 'W' * 300,
    'page': ' '.join(['many words'] * 40),
}
NAMES = {'run': 'run', 'sweep': 'sweep', 'bare': 'bare', 'hostile': '<b>run & "co"'}
SCREENS = {'desktop': (1280, 900, False), 'phone': (360, 740, True)}


def execute(*command, **environment: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1', **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300
    )


def report(*arguments, **environment: str) -> subprocess.CompletedProcess:
    return execute('-m', 'alexnet_jax.report', *arguments, **environment)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope='module')
def folders(photos_dir, tmp_path_factory) -> dict[str, Path]:
    """A trained run; the same with hostile names; a sweep of it with made-up errors; one that has not begun."""
    folder = tmp_path_factory.mktemp('runs')
    made = {name: folder / directory for name, directory in NAMES.items()}  # in this order the pages are made
    fields = {**SETTINGS, 'data.data_dir': photos_dir}
    flags = [f'--config.{name}={fields[name]}' for name in fields]
    done = execute('launch.py', f'--workdir={made["run"]}', *flags)
    assert done.returncode == 0, done.stderr

    shutil.copytree(made['run'], made['hostile'])
    statistics, names = read_dataset_statistics(str(made['run']))
    write_dataset_statistics(str(made['hostile']), statistics, [HOSTILE.get(name, name) for name in names])

    made['bare'].mkdir()
    shutil.copy(made['run'] / 'config.json', made['bare'])

    # Top-1 errors in percent: 10 and 14 of the base, 20 and 24 without normalisation, of which one run is under way.
    errors = {'base/seed_0': 0.10, 'base/seed_1': 0.14, '<i>no_lrn&/seed_0': 0.20, '<i>no_lrn&/seed_1': 0.24}
    for directory, error in errors.items():
        shutil.copytree(made['run'], made['sweep'] / directory)
        result = read_json(made['run'] / 'result.json')
        result['views']['10'] = {'loss': 1.0, 'top1_error': error, 'top5_error': 0.01, 'examples': 1600}
        write_json(made['sweep'] / directory / 'result.json', result)
    running = made['sweep'] / '<i>no_lrn&' / 'seed_2'
    running.mkdir()
    shutil.copy(made['run'] / 'metrics.jsonl', running)
    environment = made['sweep'] / 'base' / 'seed_1' / 'environment.json'
    write_json(environment, {**read_json(environment), 'processor': 'another one'})
    variants = [
        {'name': 'base', 'overrides': {}, 'published': None, 'source': '', 'note': ''},
        {
            'name': '<i>no_lrn&',
            'overrides': {'model.lrn': False},
            'published': [1.37, None],
            'source': 'net #148 <u>against</u> #145',
            'note': 'a note',
        },
        {'name': 'half', 'overrides': {'model.towers': 1}, 'published': None, 'source': '', 'note': ''},
    ]
    runs = [
        {'variant': name, 'seed': seed, 'directory': f'{name}/seed_{seed}', 'overrides': {}}
        for name, seeds in (('base', 2), ('<i>no_lrn&', 3), ('half', 1))
        for seed in range(seeds)
    ]
    plan = {'config': 'configs/ablations.py:photos', 'base': 'base', 'variants': variants, 'runs': runs}
    write_json(made['sweep'] / 'sweep.json', plan)
    return made


@pytest.fixture(scope='module')
def pages(folders, tmp_path_factory) -> dict[str, Path]:
    """What the command makes of each folder."""
    folder = tmp_path_factory.mktemp('pages')
    files = {name: folder / f'{name}.html' for name in folders}

    def make(name: str) -> subprocess.CompletedProcess:
        return report(folders[name], f'--html={files[name]}')

    assert files['run'].write_text('what was there before')
    with ThreadPoolExecutor(2) as pool:
        for name, done in zip(folders, pool.map(make, folders), strict=True):
            assert done.returncode == 0, done.stderr
            assert 'Traceback' not in done.stderr
            assert f'{files[name]} is written' in done.stderr
    assert set(folder.iterdir()) == set(files.values())
    return files


class Page(HTMLParser):
    """Sections by their headings: the text, the tables' cells, the images with their alternative texts."""

    def __init__(self, content: bytes):
        super().__init__()
        self.tags: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.text: dict[str, str] = {}
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.images: dict[str, list[tuple[str, bytes]]] = {}
        self.rows_of_others: list[list[str]] = []
        self.section, self.open, self.words = '', [], ''
        self.feed(content.decode())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        if tag in ('h1', 'h2', 'h3', 'td', 'th'):
            self.words = ''
        elif tag == 'table':
            self.tables.setdefault(self.section, []).append([])
        elif tag == 'tr':
            self.tables[self.section][-1].append([])
            if given.get('class') == 'published':
                self.rows_of_others.append(self.tables[self.section][-1][-1])
        elif tag == 'img':
            png = base64.b64decode(given['src'].removeprefix('data:image/png;base64,'), validate=True)
            self.images.setdefault(self.section, []).append((given['alt'], png))

    def handle_endtag(self, tag):
        if tag in ('h1', 'h2', 'h3'):
            self.headings.append((tag, self.words))
            if tag == 'h2':
                self.section = self.words
        elif tag in ('td', 'th'):
            self.tables[self.section][-1][-1].append(self.words)

    def handle_data(self, text):
        self.words += text
        self.text[self.section] = self.text.get(self.section, '') + text

    def cells(self, section: str, which: int = 0) -> list[list[str]]:
        return self.tables[section][which]


@pytest.fixture(scope='module')
def parsed(pages) -> dict[str, Page]:
    return {name: Page(file.read_bytes()) for name, file in pages.items()}


SECTIONS = [
    'What was run',
    'Result',
    'Curves',
    'Kernels of conv1',
    'Predictions',
    'Neighbours',
    'Layers',
    'Time',
    'Hardware and versions',
]


# In Chromium.


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not (os.path.exists(CHROMEDRIVER) and shutil.which('chromium')):
        (pytest.fail if os.environ.get('CI') else pytest.skip)(
            'no chromium and chromedriver on this machine: make chromium installs them (Debian, as root)'
        )
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    for argument in (
        'headless=new',
        'no-sandbox',
        'disable-gpu',
        'disable-quic',
        'no-first-run',
        'disable-background-networking',
        'disable-component-update',
        'disable-sync',
        'disable-dev-shm-usage',
        f'user-data-dir={tmp_path_factory.mktemp("chromium")}',
    ):
        options.add_argument(f'--{argument}')
    options.binary_location = shutil.which('chromium')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def show(browser, file: Path, screen: str, scheme: str = 'light') -> None:
    """Load the page on a screen, with the logs of earlier ones gone."""
    width, height, mobile = SCREENS[screen]
    metrics = {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': mobile}
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)
    feature = {'name': 'prefers-color-scheme', 'value': scheme}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [feature]})
    browser.get('about:blank')
    for log in ('browser', 'performance'):
        browser.get_log(log)
    browser.get(file.as_uri())


# What is not to be seen whole. A box that scrolls shows all that is in it, when it itself is on the page.
UNSEEN = """
const width = document.documentElement.clientWidth, problems = [];
const scrolling = (element) => {
  for (let e = element; e; e = e.parentElement) if (getComputedStyle(e).overflowX === 'auto') return e;
};
const name = (e) => `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`;
const check = (r, e) => {
  const box = scrolling(e), edges = box ? box.getBoundingClientRect() : {left: 0, right: width};
  const room = box ? box.scrollWidth - box.clientWidth : 0;
  if (r.left < edges.left - 1 || r.right > edges.right + room + 1) problems.push(`outside: ${name(e)}`);
};
for (const e of document.querySelectorAll('section, header, footer, h1, h2, h3, p, ul, dl, dt, dd, li, pre, table, '
    + 'figure, figcaption, img, .scroll, .sheet, .cards')) {
  const r = e.getBoundingClientRect(), s = getComputedStyle(e);
  if (r.width < 1 || r.height < 1 || s.visibility !== 'visible' || s.opacity !== '1') problems.push(`none: ${name(e)}`);
  if (scrolling(e) === e) {
    if (r.left < -1 || r.right > width + 1) problems.push(`outside: ${name(e)}`);
  } else check(r, e);
  if (s.overflowX === 'hidden' || s.position === 'fixed' || s.position === 'sticky') problems.push(`hides: ${name(e)}`);
}
for (const e of document.images) {
  const r = e.getBoundingClientRect();
  if (!e.complete || !e.naturalWidth || !e.alt) problems.push(`no picture: ${e.alt}`);
  if (Math.abs(r.width / r.height / e.naturalWidth * e.naturalHeight - 1) > 0.04) problems.push(`bent: ${e.alt}`);
  if (r.width < (e.closest('.wide') ? 600 : 60)) problems.push(`small: ${e.alt}`);
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let texts = 0;
while (walker.nextNode()) {
  const node = walker.currentNode, range = document.createRange();
  if (!node.data.trim()) continue;
  range.selectNodeContents(node);
  texts += 1;
  const rectangles = [...range.getClientRects()];
  if (!rectangles.length) problems.push(`no text: ${node.data}`);
  for (const r of rectangles) check(r, node.parentElement);
  if (parseFloat(getComputedStyle(node.parentElement).fontSize) < 11) problems.push(`small: ${node.data}`);
}
return [problems, texts, document.images.length, document.documentElement.scrollWidth, width];
"""


@pytest.mark.parametrize('screen', SCREENS)
@pytest.mark.parametrize('name', NAMES)
def test_all_is_seen_and_nothing_is_loaded(browser, pages, name, screen):
    show(browser, pages[name], screen)
    problems, texts, images, scroll_width, width = browser.execute_script(UNSEEN)
    assert problems == []
    assert 0 < scroll_width <= width <= SCREENS[screen][0]
    assert texts > 50
    assert images == {'run': 3 + 1 + 8 + 5 * 7, 'hostile': 3 + 1 + 8 + 5 * 7, 'sweep': 1 + 2 * 2, 'bare': 1}[name]
    assert browser.title == f'{NAMES[name]}: report'
    assert [line for line in browser.get_log('browser') if line['level'] in ('SEVERE', 'WARNING')] == []
    events = [json.loads(line['message'])['message'] for line in browser.get_log('performance')]
    urls = {event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent'}
    assert {url.split(':')[0] for url in urls} <= {'file', 'data'}
    assert pages[name].as_uri() in urls


# Contrast as WCAG 2 defines it, of each text with what lies behind it.
CONTRASTS = """
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => {
  const [r, g, b] = parts(colour).map((v) => v / 255).map((v) =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, other) => {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode;
  if (!node.data.trim()) continue;
  const colour = getComputedStyle(node.parentElement).color;
  let e = node.parentElement;
  while (e && (parts(getComputedStyle(e).backgroundColor)[3] ?? 1) === 0) e = e.parentElement;
  const behind = [getComputedStyle(e || document.body).backgroundColor];
  const bar = node.parentElement.closest('li')?.querySelector('.bar');
  if (bar) behind.push(getComputedStyle(bar).backgroundColor);
  for (const each of behind) found.push([contrast(colour, each), node.data.slice(0, 40)]);
}
const sheets = [...document.querySelectorAll('.sheet')].map((e) => getComputedStyle(e).backgroundColor);
return [found, sheets, luminance(getComputedStyle(document.body).backgroundColor)];
"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name', ['run', 'sweep', 'bare'])
def test_text_can_be_read_in_light_and_in_the_dark(browser, pages, name, scheme):
    show(browser, pages[name], 'desktop', scheme)
    found, sheets, ground = browser.execute_script(CONTRASTS)
    assert [pair for pair in found if pair[0] < 4.5] == []
    assert max(pair[0] for pair in found) > 12
    assert (ground > 0.9) == (scheme == 'light')
    assert (ground < 0.02) == (scheme == 'dark')
    assert set(sheets) == {'rgb(255, 255, 255)'}  # drawings have dark lines in both


def test_hostile_names_are_text(browser, pages):
    show(browser, pages['hostile'], 'desktop')
    text = browser.execute_script('return document.body.textContent')
    for name in HOSTILE.values():
        assert name in text
    assert browser.execute_script('return document.scripts.length') == 0
    assert browser.execute_script('return document.querySelector("h1").textContent') == NAMES['hostile']
    assert browser.execute_script('return document.querySelectorAll("h1").length') == 1
    cut = browser.execute_script(
        'return [...document.querySelectorAll(".bars li, .cards figcaption")].map(e => e.innerText)'
    )
    assert any(f'{"W" * 47}\u2026' in words for words in cut)
    assert max(len(words.replace('\n', '')) for words in cut) < 70
    alternatives = browser.execute_script('return [...document.images].map((image) => image.alt)')
    assert any(HOSTILE['camera'] in alternative for alternative in alternatives)
    # What is in the file against all that escaping may overlook.
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x.png\">')")
    refused = [line['message'] for line in browser.get_log('browser')]
    assert any('Content Security Policy' in line for line in refused)


# What it says.


@pytest.mark.parametrize('name', NAMES)
def test_the_file_is_one_whole_document(pages, parsed, name):
    content = pages[name].read_text()
    assert len(content) < 3e6
    assert content.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert content.endswith('</html>\n')
    page = parsed[name]
    assert {'script', 'link', 'iframe', 'a', 'object'} & set(page.tags) == {'link'}  # that of an empty icon
    assert re.findall('<link [^>]*>', content) == ['<link rel="icon" href="data:,">']
    if name != 'hostile':
        assert re.findall('(?:https?|file)://', content) == []
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    if name != 'sweep':
        assert [words for tag, words in page.headings if tag == 'h2'] == SECTIONS


def test_the_errors_are_those_of_the_run(folders, parsed):
    result, page = read_json(folders['run'] / 'result.json'), parsed['run']
    head, *rows = page.cells('Result')
    assert head == ['', 'views', 'loss', 'top-1 error', 'top-5 error', 'images']
    assert [row[1] for row in rows] == ['1', '10']
    for row in rows:
        values = result['views'][row[1]]
        assert float(row[2]) == pytest.approx(values['loss'], abs=5e-5)
        for cell, name in zip(row[3:5], ('top1_error', 'top5_error'), strict=True):
            assert cell.endswith(' %')
            assert float(cell[:-2]) == pytest.approx(100 * values[name], abs=5e-3)
        assert row[5] == '1,600'
    assert (
        f'Done at step 40. Validation: top-1 error {rows[1][3]}, top-5 error {rows[1][4]} with 10 views.'
        in (page.text[''])
    )
    text = page.text['Result']
    assert 'Published for the preset paper: top-1 error 40.7 %, top-5 error 18.2 % with 10 views (table 2' in text
    assert 'Not comparable with this run: data.source is photos and not tfds:imagenet2012;' in text
    assert page.rows_of_others == []


def test_settings_are_those_that_were_changed(folders, parsed):
    page = parsed['run']
    head, *rows = page.cells('What was run')
    assert head == ['setting', 'preset', 'this run']
    own = {name: value for name, value in SETTINGS.items() if name != 'seed'}
    of_quickstart = {'data.source', 'data.image_size', 'data.crop_size', 'model.num_classes', 'train.batch_size'}
    of_quickstart |= {'train.epochs', 'train.stall_after', 'optimizer.milestones', 'eval.batch_size'}
    found = {row[0]: row[1:] for row in rows}
    assert set(found) == set(own) | of_quickstart
    assert found['model.widths'] == ['(96, 256, 384, 384, 256, 4096, 4096)', '(16, 0, 0, 0, 32, 0, 64)']
    assert found['model.dropout'] == ['0.5', '0']
    assert found['train.steps'] == ['None', '40']
    text = page.text['What was run']
    assert 'alexnet train --workdir=' in text
    assert f'--workdir={folders["run"]} --config.seed=3 --config.model.conv1_stride=8 ' in text
    for words in ('presetpaper', 'photos, 16 classes; images of 72 x 72 pixels', 'sees 64 x 64', 'seed3'):
        assert words in text
    assert '40 steps of 64 images: 0.4 epochs of 6,400 training images' in text
    assert 'astronaut, brick, camera' in text


def test_layers_time_and_machine(folders, parsed):
    page, run = parsed['run'], folders['run']
    last = json.loads((run / 'layers.jsonl').read_text().splitlines()[-1])
    assert last['step'] == 40
    assert 'At step 40: ' in page.text['Layers']
    _, *rows = page.cells('Layers')
    assert [row[0] for row in rows] == ['conv1', 'conv5', 'fc7', 'fc8']
    for name, weight, update, bias, bias_update, dead in rows:
        values = last[name]
        assert float(weight) == pytest.approx(values['kernel'], rel=5e-3)
        assert float(update) == pytest.approx(values['kernel_update'] / values['kernel'], rel=0.05)
        assert float(bias) == pytest.approx(values['bias'], rel=5e-3)
        assert float(bias_update) == pytest.approx(values['bias_update'] / values['bias'], rel=0.05)
        assert float(dead[:-2]) == pytest.approx(100 * values['dead'], abs=5e-3)
    rate = read_json(run / 'result.json')['images_per_second']
    assert f'{rate:,.1f} images/s' in page.text['Time']
    assert f'{2560 / rate:.1f} seconds for 2,560 images at that rate' in page.text['Time']
    environment = read_json(run / 'environment.json')
    for name, version in environment['versions'].items():
        assert f'{name} {version}' in page.text['Hardware and versions']
    assert environment['processor'] in page.text['Hardware and versions']


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.fixture(scope='module')
def network(folders):
    return trained_model.load_model(trained_model.parse_checkpoint_ref(str(folders['run'])))


@pytest.fixture(scope='module')
def store(photos_dir):
    directory = next(Path(photos_dir).glob('prepared/*/prepared.json')).parent
    return dataset.open_store(str(directory), resolve(quickstart.get_config()).data)


def test_kernels_and_their_saturation(network, parsed):
    kernel = np.asarray(network.state.params['conv1']['kernel'], np.float64)
    images = parsed['run'].images['Kernels of conv1']
    assert len(images) == 2
    for tower, (alternative, png) in enumerate(images):
        part = kernel[..., 8 * tower : 8 * tower + 8]
        colour = sum((part[..., c, :] - part.mean(2)) ** 2 for c in range(3)).sum() / (part**2).sum()
        words = f'ower {tower + 1}: 8 kernels at step 40, colour saturation {colour:.2f}'
        assert alternative == f'kernels of conv1, t{words}'
        assert f'T{words}' in parsed['run'].text['Kernels of conv1']
        sheet = pixels(png)
        times = sheet.shape[1] // (8 * 12 - 1)
        assert times > 5
        np.testing.assert_array_equal(sheet, sheet[::times, ::times].repeat(times, 0).repeat(times, 1))
        for i in range(8):
            own = part[..., i]
            scaled = 255 * (own - own.min()) / (own.max() - own.min())
            found = sheet[::times, ::times][:11, 12 * i : 12 * i + 11]
            np.testing.assert_allclose(found, scaled, atol=0.51)


def test_predictions_are_those_of_the_evaluation(folders, store, pages, parsed):
    _, scores, labels = summary.predict(trained_model.parse_checkpoint_ref(str(folders['run'])), store, 10)
    content = pages['run'].read_text()
    cards = re.findall(
        r'alt="validation image (\d+) of class (\w+)"><figcaption>(.*?)</figcaption><ol(.*?)</ol>', content
    )
    assert len(cards) == 8
    assert len({label for _, label, _, _ in cards}) == 8
    for (number, label, caption, bars), (_, png) in zip(cards, parsed['run'].images['Predictions'], strict=True):
        row = np.exp(scores[int(number)].astype(np.float64))
        assert label == store.class_names[labels[int(number)]] == caption.replace('<wbr>', '')
        np.testing.assert_array_equal(pixels(png), store.validation[int(number)]['image'])
        items = re.findall(r'<li(.*?)>.*?width:(\d+)%.*?<span>(.*?)</span><span class="number">(\d+)&nbsp;%', bars)
        shown = [name.replace('<wbr>', '').removeprefix('\u2713\u00a0') for _, _, name, _ in items]
        assert shown == [store.class_names[i] for i in np.argsort(-row, kind='stable')[:5]]
        for (kind, width, name, percent), each in zip(items, shown, strict=True):
            assert width == percent
            assert int(percent) == pytest.approx(100 * row[store.class_names.index(each)], abs=0.51)
            assert ('\u2713' in name) == (each == label) == ('true' in kind)


def test_neighbours_are_the_nearest_of_all_training_images(network, store, folders, pages, parsed):
    from alexnet_jax.training.eval_step import make_activation_fn

    (file,) = (folders['run'] / 'features').glob('fc7_*/features.npy')
    known = np.load(file).astype(np.float64)
    assert known.shape == (6400, 64)
    step = make_activation_fn(network.config, network.mesh, 'fc7')
    content = pages['run'].read_text()
    rows = content.split('<div class="cards small">')[1:]
    assert len(rows) == 5
    images = iter(parsed['run'].images['Neighbours'])
    for row in rows:
        number, label = re.match(r'.*?alt="validation image (\d+) of class (\w+)"', row).groups()
        query = store.validation[int(number)]
        np.testing.assert_array_equal(pixels(next(images)[1]), query['image'])
        (output,) = network.predict_batches(step, [query['image']], network.batch_size(1))
        distances = np.sqrt(((known - output) ** 2).sum(-1))
        found = re.findall(
            r'<figure( class="same")?><img [^>]*alt="training image (\d+) of class (\w+)">.*?quiet">([\d.]+)<', row
        )
        assert [int(place) for _, place, _, _ in found] == np.argsort(distances, kind='stable')[:6].tolist()
        for same, place, other, distance in found:
            example = store.train[int(place)]
            assert other == store.class_names[example['label']]
            assert bool(same) == (other == label)
            assert float(distance) == pytest.approx(distances[int(place)], rel=1e-3)
            np.testing.assert_array_equal(pixels(next(images)[1]), example['image'])
    assert next(images, None) is None


def test_the_table_of_a_sweep(parsed):
    page = parsed['sweep']
    kinds = [
        f'{top} {name}' for top in ('top-1', 'top-5') for name in ('error, %', 'difference', 'difference, published')
    ]
    head, base, no_lrn, half = page.cells('Errors by variant')
    assert head == ['variant', 'runs', *kinds]
    # Deviations from the mean are 2 either way: 2.83. Two runs on either side, so two degrees of freedom, whose t is
    # 4.303, and a standard error of sqrt(8 / 2 + 8 / 2).
    half_width = 4.303 * 8**0.5
    assert base == ['base', '2/2', '12.00 \u00b1 2.83', '', '', '1.00 \u00b1 0.00', '', '']
    assert no_lrn[:3] == ['<i>no_lrn&', '2/3', '22.00 \u00b1 2.83']
    assert no_lrn[3] == f'+10.00 [{10 - half_width:+.2f}, {10 + half_width:+.2f}]'
    assert no_lrn[4:] == ['+1.37', '1.00 \u00b1 0.00', '+0.00', '']
    assert half == ['half', '0/1', *[''] * 6]
    text = page.text['Errors by variant']
    assert '<i>no_lrn&: net #148 <u>against</u> #145' in text
    assert 'Published differences are figures of others' in text
    assert '<i>no_lrn& seed 2 (at step 40)' in text
    assert 'half seed 0 (not begun)' in text
    assert 'A sweep of configs/ablations.py:photos: 3 variants, 4 of 6 runs done.' in page.text['']
    assert page.cells('What was run')[1:] == [
        ['base', '', '0, 1'],
        ['<i>no_lrn&', 'model.lrn=false', '0, 1, 2'],
        ['half', 'model.towers=1', '0'],
    ]


def test_curves_kernels_and_machines_of_a_sweep(parsed):
    page = parsed['sweep']
    assert 'half/seed_0/metrics.jsonl is missing or has no line' in page.text['Curves']
    assert [words for tag, words in page.headings if tag == 'h3'][-5:] == [
        'base (base/seed_0)',
        '<i>no_lrn& (<i>no_lrn&/seed_0)',
        '3 runs: base/seed_0, <i>no_lrn&/seed_0, <i>no_lrn&/seed_1',
        '1 run: base/seed_1',
        '2 runs: <i>no_lrn&/seed_2, half/seed_0',
    ]
    own = [png for _, png in parsed['run'].images['Kernels of conv1']]
    assert [png for _, png in page.images['Kernels of conv1']] == own * 2
    assert 'half: no run is done' in page.text['Kernels of conv1']
    assert 'another one' in page.text['Hardware and versions']
    assert 'No readable environment.json' in page.text['Hardware and versions']


def full_size(preset: str, **changes):
    config = imagenet.get_config(preset)
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    return resolve(config)


@pytest.mark.parametrize(
    ('preset', 'changes', 'line'),
    [
        ('paper', {}, ['published', '10', '', '40.7 %', '18.2 %', '']),
        ('torchvision', {'train__epochs': 1.0, 'seed': 5}, ['published', '1', '', '43.478 %', '20.934 %', '']),
        ('d2l', {}, ['published', '1', '', '12 %', '', '']),
        ('paper', {'model__dtype': 'bfloat16'}, ['published', '10', '', '40.7 %', '18.2 %', '']),
        ('half', {}, []),  # is of other images than its settings
        ('paper', {'model__lrn': False}, []),
        ('paper', {'data__source': 'tfds:imagenette'}, []),
        ('paper', {'data__source': 'folder:/imagenet'}, []),
    ],
)
def test_what_was_published_is_shown_beside_the_same_network_and_images_only(preset, changes, line):
    found, remark = published(full_size(preset, **changes))
    assert found == line
    assert remark.startswith(f'Published for the preset `{preset}`')
    assert ('Not comparable' in remark) == (not line)


def test_a_preset_differs_in_nothing_from_itself():
    for preset in ('paper', 'krizhevsky2012', 'owt', 'cifar10_11pct'):
        assert differences(full_size(preset)) == []


def test_published_errors_have_a_line_of_their_own(tmp_path):
    config = full_size('krizhevsky2012')
    write_json(tmp_path / 'config.json', config.to_dict())
    views = {'10': {'loss': 2.0, 'top1_error': 0.405, 'top5_error': 0.181, 'examples': 50000}}
    write_json(tmp_path / 'result.json', {'status': 'done', 'step': 900_000, 'views': views})
    page = Page(run_page.page(str(tmp_path), None, True, 'command'))
    assert page.cells('Result')[1:] == [
        ['this run', '10', '2.0000', '40.50 %', '18.10 %', '50,000'],
        ['published', '10', '', '40.664 %', '18.21 %', ''],
    ]
    assert page.rows_of_others == page.cells('Result')[2:]
    assert 'not measured here: layer-params-145.cfg, ILSVRC-2012 validation' in page.text['Result']
    assert 'Settings that differ from those of the preset krizhevsky2012:None.' in (
        page.text['What was run'].replace('\n', '')
    )


# What is missing.


def test_a_run_that_has_not_begun(folders, parsed):
    text, workdir = parsed['bare'].text, folders['bare']
    command = f'alexnet train --config=... --workdir={workdir}'
    assert 'Not done: begun, no step logged.' in text['']
    for section in ('Result', 'Curves', 'Kernels of conv1', 'Predictions', 'Neighbours', 'Layers', 'Time'):
        assert command in text[section]
    assert 'No validation errors: begun, no step logged' in text['Result']
    assert f'{workdir}/metrics.jsonl is missing or has no line' in text['Curves']
    assert f'{workdir} has no checkpoints.' in text['Predictions']
    assert 'layers.jsonl is missing' in text['Layers']
    assert 'dataset_statistics.npz cannot be read' in text['What was run']
    assert 'No readable environment.json' in text['Hardware and versions']
    assert '40 steps of batches of 64 images' in text['What was run']


def test_a_log_without_settings():
    page = Page(run_page.page(str(ROOT / 'docs' / 'logs' / 'ablations' / 'base' / 'seed_0'), None, True, 'command'))
    assert 'no readable config.json' in page.text['What was run']
    assert [row[3] for row in page.cells('Result')[1:]] == ['14.81 %', '14.37 %']
    assert len(page.images['Curves']) == 1
    assert 'Published' not in page.text['Result']


def test_a_run_under_way_shows_its_last_errors(folders, tmp_path):
    for name in ('config.json', 'environment.json'):
        shutil.copy(folders['run'] / name, tmp_path)
    lines = (folders['run'] / 'metrics.jsonl').read_text().splitlines(keepends=True)
    written = [line for line in lines if json.loads(line)['step'] <= 30]
    (tmp_path / 'metrics.jsonl').write_text(''.join(written) + '{"step": 40, "spl')
    page = Page(run_page.page(str(tmp_path), None, True, 'command'))
    first, *_, validation = [json.loads(line) for line in written if json.loads(line)['split'] == 'validation']
    assert validation['loss'] < first['loss'] - 1e-3
    assert 'Not done: at step 30. Validation: top-1 error' in page.text['']
    (row,) = page.cells('Result')[1:]
    assert row[:3] == ['this run, step 30', '1', f'{validation["loss"]:.4f}']
    assert float(row[3][:-2]) == pytest.approx(100 * validation['top1_error'], abs=5e-3)
    write_json(tmp_path / 'result.json', {'status': 'preempted', 'step': 30, 'views': {'1': validation}})
    page = Page(run_page.page(str(tmp_path), None, True, 'command'))
    assert 'Preempted, at step 30.' in page.text['']
    assert 'The run is preempted, at step 30; these are its last errors so far.' in page.text['Result']


GARBAGE = [
    '{',
    '[]',
    '{"step": null, "split": 3, "views": [1], "status": "done", "versions": 4, "command": {"a": 1}, "model": 2}',
    '{"step": 1e999, "views": {"10": "x", "<b>": {"loss": []}}, "images_per_second": NaN, "split": "train", "fc8": 1}',
    f'{{"step": {"9" * 400}, "split": "validation", "top1_error": "a", "loss": {"9" * 400}, "fc8": {{"kernel": "x"}}}}',
    '{"step": true, "split": [], "status": "preempted", "views": {}, "stalled_step": "x", "command": []}',
    '\udcff',
]


@pytest.mark.parametrize('text', GARBAGE)
def test_files_of_garbage_leave_a_page(tmp_path, text):
    names = ('config.json', 'result.json', 'metrics.jsonl', 'layers.jsonl', 'environment.json')
    for name in (*names, 'dataset_statistics.npz'):
        (tmp_path / name).write_text(text, errors='surrogateescape')
    page = Page(run_page.page(str(tmp_path), None, True, 'command'))
    assert [words for tag, words in page.headings if tag == 'h2'] == SECTIONS
    assert 'no readable config.json' in page.text['What was run'] or 'config.' in page.text['What was run']
    assert 'layers.jsonl is missing or has no line' in page.text['Layers'] or len(page.cells('Layers')) == 2


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders['run'], tmp_path / 'copy'))


def test_without_the_images_there_are_kernels_and_what_makes_the_rest(copy, tmp_path):
    settings = read_json(copy / 'config.json')
    settings['data']['data_dir'] = f'{tmp_path}/else where'
    write_json(copy / 'config.json', settings)
    page = Page(run_page.page(str(copy), None, True, 'command'))
    assert len(page.images['Kernels of conv1']) == 2
    for section in ('Predictions', 'Neighbours'):
        assert f'there is no {tmp_path}/else where/prepared/photos_72px' in page.text[section]
        made_by = f"alexnet prepare --source=photos --image_size=72 '--data_dir={tmp_path}/else where'"
        assert f'{made_by} makes them, or --data_dir names where they lie' in page.text[section]


def test_neighbours_are_left_out_where_that_is_asked_for(copy, photos_dir):
    shutil.rmtree(copy / 'features')
    page = Page(run_page.page(str(copy), photos_dir, False, 'command'))
    assert len(page.images['Predictions']) == 8
    assert 'Left out by --noneighbours' in page.text['Neighbours']
    assert not (copy / 'features').exists()


@pytest.mark.parametrize('lost', ['dataset_statistics.npz', 'checkpoint'])
def test_lost_weights_and_inputs_are_named(copy, tmp_path, lost):
    if lost == 'checkpoint':
        part = max((copy / 'checkpoints' / '40' / 'state').rglob('*'), key=lambda p: p.stat().st_size * p.is_file())
        part.write_bytes(b'x' * part.stat().st_size)
    else:
        (copy / lost).unlink()
    # By a process: where a checkpoint is damaged Orbax leaves coroutines behind, which is a warning, and an error here.
    done = report(copy, f'--html={tmp_path}/page.html')
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / 'page.html').read_bytes())
    reasons = {
        'dataset_statistics.npz': 'dataset_statistics.npz cannot be read (',
        'checkpoint': f'checkpoint {copy}/checkpoints/40 is corrupt (',
    }
    for section in ('Kernels of conv1', 'Predictions', 'Neighbours'):
        assert reasons[lost] in page.text[section]
        assert section not in page.images
    assert len(page.images['Curves']) == 1


class Labels:
    """A split of images that show their numbers; those in `damaged` cannot be read."""

    def __init__(self, labels, damaged=()):
        self.labels, self.corrupt = labels, damaged

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return None if index in self.corrupt else {'image': index, 'label': self.labels[index]}


def chosen(split, count):
    return [(place, example['label']) for place, example in model_section.choose(split, count)]


def test_images_are_spread_over_the_classes():
    labels = np.repeat(np.arange(1000), 50)
    found = chosen(Labels(labels), 8)
    assert [label for _, label in found] == sorted({label for _, label in found})
    assert (found[0][1], found[-1][1]) == (0, 999)
    assert len(found) == 8
    assert found == chosen(Labels(labels), 8)
    # Two classes: of each half, in turn.
    assert [label for _, label in chosen(Labels([0] * 90 + [1] * 10), 6)] == [0, 1, 0, 1, 0, 1]
    # Fewer images than are wanted; damaged ones are not among them.
    assert chosen(Labels([4, 2, 2]), 8) == [(1, 2), (0, 4), (2, 2)]
    assert chosen(Labels([4, 2, 2], damaged={1}), 8) == [(2, 2), (0, 4)]


# The command.


def refusal(run: subprocess.CompletedProcess) -> str:
    assert (run.returncode, run.stdout) == (2, ''), run.stderr
    assert run.stderr.startswith('alexnet_jax: ')
    assert run.stderr.count('\n') == 1, run.stderr
    return run.stderr.removeprefix('alexnet_jax: ').rstrip('\n')


def test_a_run_is_summarised_on_the_terminal(folders):
    done = report(folders['run'])
    assert (done.returncode, done.stderr) == (0, '')
    first, one, ten = done.stdout.splitlines()
    assert first == f'{folders["run"]}: done at step 40'
    views = read_json(folders['run'] / 'result.json')['views']
    assert one.split() == ['1', 'view', 'loss', f'{views["1"]["loss"]:.4f}', 'top-1', 'error', *one.split()[6:]]
    assert f'top-1 error {100 * views["10"]["top1_error"]:.2f} %' in ten


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (['{run}', '--html={tmp}/page.txt'], "--html: '{tmp}/page.txt' does not end with .html or .htm"),
        (['{run}', '--html={tmp}/no/page.html'], "--html: '{tmp}/no/page.html' cannot be written; name a file in"),
        (['{run}', '--views=10'], '--views: {run} is a run and no sweep; leave it out, --html makes a page'),
        (['{tmp}', '--html={tmp}/page.html'], '{tmp}: no run and no sweep; name the folder'),
    ],
)
def test_wrong_arguments_are_refused(folders, tmp_path, arguments, reason):
    names = {'run': folders['run'], 'tmp': tmp_path}
    assert refusal(report(*(each.format(**names) for each in arguments))).startswith(reason.format(**names))
    assert list(tmp_path.iterdir()) == []


def test_jax_is_tuned_and_imported_only_for_weights(folders, tmp_path):
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules' / 'jax.py').write_text("import os, sys; sys.exit(os.environ['XLA_FLAGS'])")
    tuned = execute(
        '-c',
        'from alexnet_jax.runtime.backend import configure_cpu_backend; configure_cpu_backend();'
        "import os; print(os.environ['XLA_FLAGS'])",
        XLA_FLAGS='',
    )
    page = tmp_path / 'page.html'
    environment = {'PYTHONPATH': str(tmp_path / 'modules'), 'XLA_FLAGS': ''}
    without = report(folders['bare'], f'--html={page}', **environment)
    assert without.returncode == 0, without.stderr
    page.write_text('kept')
    done = report(folders['run'], f'--html={page}', **environment)
    assert (done.returncode, done.stderr.strip()) == (1, tuned.stdout.strip())
    assert page.read_text() == 'kept'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['page.html']
