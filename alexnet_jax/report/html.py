"""HTML of the report page: escaped text, tables, embedded images, and the style sheet.

Functions take plain text and escape it; `words` between backticks become code. Content wider than a phone scrolls in
its own box. The page loads no resources and runs no scripts, which its content security policy enforces.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

MAX_PIXELS = 144  # maximum side of a photograph; larger ones are scaled down
_LONGEST = 48  # maximum characters of a name below a photograph

_STYLE = """
:root {
  --ground: #fcfcfa; --text: #1b1d21; --quiet: #565b63; --line: #d5d5cf; --panel: #f2f2ed;
  --bar: #c3dcef; --true: #f3cf86; --mark: #b04a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15171a; --text: #e6e6e3; --quiet: #a9afb8; --line: #3a4048; --panel: #1f2328;
    --bar: #23506f; --true: #70501a; --mark: #ffa45c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--text);
  font: 1.0625rem/1.6 Charter, 'Bitstream Charter', 'Source Serif 4', 'Noto Serif', Georgia, serif;
  overflow-wrap: anywhere;
}
main { max-width: 54rem; margin: 0 auto; }
h1, h2, h3 { line-height: 1.25; font-weight: 600; text-wrap: balance; }
h1 { margin: 0 0 0.5rem; font-size: 2rem; }
h2 { margin: 3rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line); font-size: 1.35rem; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 1.1rem; }
p, ul, dl, figure, pre { margin: 0.75rem 0; }
ul { padding-left: 1.25rem; }
.lead { font-size: 1.15rem; }
.missing { padding: 0.6rem 0.9rem; border-left: 3px solid var(--mark); background: var(--panel); }
code, pre { font-family: ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; font-size: 0.86em; }
code span { display: inline-block; max-width: 100%; }
pre { padding: 0.7rem 0.9rem; background: var(--panel); border-radius: 4px; overflow-x: auto; }
dl { display: grid; grid-template-columns: 9rem 1fr; gap: 0.3rem 1rem; }
dt { color: var(--quiet); }
dd { margin: 0; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font: 0.8125rem/1.5 system-ui, 'DejaVu Sans', sans-serif; }
th, td {
  padding: 0.35rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: normal; font-variant-numeric: tabular-nums;
}
td.free { min-width: 8rem; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--quiet); }
tbody th { font-weight: 500; }
th code, td code { font-size: 0.95em; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
tr.published { background: var(--panel); }
img { display: block; max-width: 100%; height: auto; }
.sheet { padding: 0.5rem; border: 1px solid var(--line); border-radius: 4px; background: #fff; }
.sheet img { width: 100%; }
.sheet.wide img { max-width: none; min-width: 38rem; }
figcaption { margin-top: 0.35rem; }
.cards {
  display: grid; gap: 1.5rem 1rem; grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 50% - 0.5rem), 1fr));
}
.cards.small { gap: 0.75rem 0.6rem; grid-template-columns: repeat(7, minmax(0, 1fr)); margin: 1.5rem 0; }
.cards > figure { margin: 0; font: 0.8125rem/1.35 system-ui, 'DejaVu Sans', sans-serif; }
.cards img { width: 100%; border: 2px solid transparent; border-radius: 3px; }
.cards figcaption { font-size: inherit; line-height: inherit; color: var(--text); }
.quiet { color: var(--quiet); }
.cards .same img { border-color: var(--mark); }
.bars { margin: 0.4rem 0 0; padding: 0; list-style: none; }
.bars li { position: relative; display: flex; justify-content: space-between; gap: 0.5rem; padding: 0.1rem 0.3rem; }
.bars .bar { position: absolute; inset: 1px auto 1px 0; background: var(--bar); border-radius: 2px; }
.bars .true .bar { background: var(--true); }
.bars span + span { position: relative; }
.bars .number { font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
footer, figcaption, p.quiet { color: var(--quiet); font-size: 0.94rem; line-height: 1.45; }
@media (max-width: 36rem) {
  body { padding: 1.5rem 1rem 3rem; font-size: 1rem; }
  h1 { font-size: 1.6rem; }
  th, td { padding: 0.35rem 0.4rem; }
  .cards.small { grid-template-columns: repeat(4, minmax(0, 1fr)); margin: 2rem 0; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd + dt { margin-top: 0.5rem; }
}
"""

# Forbids network access and scripts, even if a name in a file contains HTML.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escape(text: object) -> str:
    """Escapes `text` for elements and attributes."""
    return html.escape(str(text), quote=True)


def prose(text: str) -> str:
    """Escapes `text`; `words` between backticks become code, which wraps between words and not at hyphens."""
    return re.sub('`([^`]+)`', lambda match: f'<code>{_unbroken(match[1])}</code>', escape(text))


def _unbroken(text: str) -> str:
    return ' '.join(f'<span>{word}</span>' for word in text.split(' '))


def paragraph(text: str, kind: str = '') -> str:
    """Returns a paragraph. `kind`: 'lead', 'quiet', 'missing' (explains missing content), or '' for plain text."""
    return f'<p{_kind(kind)}>{prose(text)}</p>'


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ''


def command(text: str) -> str:
    """Returns a shell command in a box."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def listing(items: Iterable[str]) -> str:
    """Returns a bulleted list."""
    return f'<ul>{"".join(f"<li>{prose(item)}</li>" for item in items)}</ul>'


def facts(values: dict[str, str]) -> str:
    """Returns a list of names with their values, without empty values."""
    rows = [f'<dt>{escape(name)}</dt><dd>{prose(value)}</dd>' for name, value in values.items() if value]
    return f'<dl>{"".join(rows)}</dl>' if rows else ''


def table(lines: Sequence[Sequence[str]], label: str, numbers: bool = True, published: Sequence[int] = ()) -> str:
    """Returns a table in a scrollable box.

    Args:
      lines: the column names, then the rows; the first cell of each row is its name.
      label: a description for screen readers.
      numbers: whether the other columns contain numbers.
      published: the rows, counted from 1, that contain published figures of others.
    """
    kind = _kind('number' if numbers else 'free')
    first, *names = lines[0]
    head = f'<th scope="col">{prose(first)}</th>'
    head += ''.join(f'<th scope="col"{kind if numbers else ""}>{prose(name)}</th>' for name in names)
    rows = []
    for i, (name, *cells) in enumerate(lines[1:], 1):
        row = f'<th scope="row">{prose(name)}</th>' + ''.join(f'<td{kind}>{prose(cell)}</td>' for cell in cells)
        rows.append(f'<tr{_kind("published" if i in published else "")}>{row}</tr>')
    body = f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{body}</div>'


def as_png(pixels: np.ndarray) -> bytes:
    """Returns a PNG file of (H, W, 3) or (H, W, 1) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, 'png', optimize=True)
    return file.getvalue()


def photograph(pixels: np.ndarray, alt: str) -> str:
    """Returns an image element of (S, S, 3) or (S, S, 1) uint8, scaled down to at most MOST_PIXELS."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, 'png', optimize=True)
    return picture(file.getvalue(), alt)


def picture(png: bytes, alt: str) -> str:
    """Returns an image element with an embedded PNG file; `alt` describes it."""
    width, height = Image.open(io.BytesIO(png)).size
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'


def sheet(png: bytes, alt: str, caption: str, wide: bool = False) -> str:
    """Returns a drawing on white with a caption; a `wide` one keeps a readable size and scrolls."""
    box = f' scroll wide" role="region" tabindex="0" aria-label="{escape(alt)}' if wide else ''
    image = f'<div class="sheet{box}">{picture(png, alt)}</div>'
    return f'<figure>{image}<figcaption>{prose(caption)}</figcaption></figure>'


def card(image: str, name: str, remark: str = '', below: str = '', same: bool = False) -> str:
    """Returns a photograph for cards() with its class name, a remark and more HTML below; `same` adds a frame."""
    remark = f'<br><span class="quiet">{escape(remark)}</span>' if remark else ''
    return (
        f'<figure{_kind("same" if same else "")}>{image}<figcaption>{label(name)}{remark}</figcaption>{below}</figure>'
    )


def label(name: str) -> str:
    """Escapes a class name for little space: cuts a long name, and allows line breaks after underscores."""
    return escape(name if len(name) <= _LONGEST else f'{name[: _LONGEST - 1]}\u2026').replace('_', '_<wbr>')


def cards(each: Iterable[str], small: bool = False) -> str:
    """Arranges cards side by side, as many as fit."""
    return f'<div class="cards{" small" * small}">{"".join(each)}</div>'


def bars(values: Iterable[tuple[str, float]], true: str) -> str:
    """Returns bars of names with probabilities (0 to 1); the bar of `true` has another color and a check mark."""
    rows = []
    for name, probability in values:
        share = f'{100 * probability:.0f}' if probability == probability else '0'
        words = '\u2713\u00a0' * (name == true) + label(name)
        rows.append(
            f'<li{_kind("true" if name == true else "")}><span class="bar" style="width:{share}%"></span>'
            f'<span>{words}</span><span class="number">{share}&nbsp;%</span></li>'
        )
    return f'<ol class="bars">{"".join(rows)}</ol>'


def section(title: str, *parts: str) -> str:
    """Returns a section of the page with a heading."""
    return f'<section><h2>{prose(title)}</h2>\n{chr(10).join(part for part in parts if part)}\n</section>\n'


def subsection(title: str, *parts: str) -> str:
    """Returns part of a section with a heading."""
    return f'<h3>{prose(title)}</h3>\n' + '\n'.join(parts)


def document(title: str, lead: str, sections: Iterable[str], made_by: str) -> bytes:
    """Returns the whole page as a file's content; `made_by` is the command that wrote it."""
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}: report</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
{paragraph(lead, 'lead')}
</header>
{''.join(sections)}
<footer>{prose(f'Written by `{made_by}`.')}</footer>
</main>
</body>
</html>
"""
    return text.encode('utf-8', 'replace')  # file names may contain surrogates
