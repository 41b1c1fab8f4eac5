"""A report as one self-contained HTML page: no network, no files beside it; pictures and videos are inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hma_gym.judges.videos import write_video as write_video

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p.dim, footer { color: var(--dim); font-size: .9rem; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); }
td.yes { color: #1a7f37; } td.no { color: #c0392b; font-weight: 600; }
video, img { max-width: 100%; border-radius: 4px; display: block; margin: .5rem 0; }
pre { background: #8881; padding: .8rem; overflow-x: auto; border-radius: 4px; }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Table:
    """A table; a cell that reads "yes" or "no" is coloured."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """The table element."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    mark = f' class="{text}"' if text in ("yes", "no") else ""
    return f"<td{mark}>{html.escape(text)}</td>"


@dataclass(frozen=True)
class Text:
    """A paragraph; ``dim`` for notes, ``code`` for a block of code."""

    text: str
    dim: bool = False
    code: bool = False

    def html(self) -> str:
        """The paragraph element."""
        if self.code:
            return f"<pre><code>{html.escape(self.text)}</code></pre>"
        return f'<p class="{"dim" if self.dim else "text"}">{html.escape(self.text)}</p>'


@dataclass(frozen=True)
class Heading:
    """A heading inside the page."""

    text: str

    def html(self) -> str:
        """The heading element."""
        return f"<h2>{html.escape(self.text)}</h2>"


@dataclass(frozen=True)
class Picture:
    """A picture, embedded as PNG."""

    image: Image.Image
    description: str

    def html(self) -> str:
        """The image element."""
        stream = io.BytesIO()
        self.image.save(stream, format="PNG", optimize=True)
        return f'<img alt="{html.escape(self.description)}" src="{_data_uri("image/png", stream.getvalue())}">'


@dataclass(frozen=True)
class Video:
    """An mp4 file, embedded; it plays by itself, in a loop."""

    path: Path
    description: str

    def html(self) -> str:
        """The video element."""
        source = _data_uri("video/mp4", self.path.read_bytes())
        label = html.escape(self.description)
        return f'<video controls autoplay loop muted playsinline aria-label="{label}" src="{source}"></video>'


Element = Table | Text | Heading | Picture | Video


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def render_page(title: str, elements: Sequence[Element]) -> str:
    """The whole page."""
    body = "\n".join(element.html() for element in elements)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
