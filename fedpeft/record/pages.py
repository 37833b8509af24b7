"""Parts of our HTML pages: one self-contained file each, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html

from fedpeft.record.drawing import GRID, INK

PAGE_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #f3f3f3; --shade: #8888; }
@media (prefers-color-scheme: dark) { :root { --soft: #222222; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; } td { min-width: 3.6rem; } summary { cursor: pointer; }
h1, h2, h3, p, li, figcaption { overflow-wrap: anywhere; }
/* What is wider than the page scrolls; a shadow stands at the edge beyond which there is more. */
.wide { overflow-x: auto; background:
  linear-gradient(to right, Canvas 30%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, Canvas 30%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .8rem 100% no-repeat scroll; }
:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem 2rem; }
img { display: block; width: 100%; max-width: 36rem; }
img.whole { width: auto; max-width: max(100%, 40rem); }
pre { background: var(--soft); padding: 1rem; border-radius: 6px; overflow-x: auto; }
.lead { font-size: 1.1rem; } .note { border-left: 3px solid #d55e00; padding-left: .8rem; }
"""
FIGURE_STYLE = "svg{color:#262626;--grid:#e4e4e4}@media(prefers-color-scheme:dark){svg{color:#e6e6e6;--grid:#3c3c3c}}"


def html_page(title: str, body: list[str], style: str = PAGE_STYLE, more_head: str = "") -> str:
    """A whole page that needs no other file; the title is escaped, `body` and `more_head` are HTML already."""
    title = html.escape(title)
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{style}</style>",
        *([more_head] if more_head else []),
    ]
    top = ["<!doctype html>", '<html lang="en"><head>', *head, "</head><body><main>", f"<h1>{title}</h1>"]
    return "\n".join([*top, *body, "</main></body></html>"]) + "\n"


def html_table(heads: list[str], rows: list[list[str]]) -> str:
    """Heads and cells are plain text; they are escaped here."""
    lines = [_html_cells("th", heads)] if heads else []
    lines += [_html_cells("td", row) for row in rows]
    # A key moves what is wider than the page only where it has the focus.
    return '<div class="wide" tabindex="0"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _html_cells(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(_html_cell(tag, cell) for cell in cells)}</tr>"


def _html_cell(tag: str, cell: str) -> str:
    if not cell:
        return "<td></td>"  # a heading without text would be read out as one
    # A number and its error stay on one line.
    return f"<{tag}>{html.escape(cell).replace(' ± ', '&nbsp;±&nbsp;')}</{tag}>"


def html_note(text: str) -> str:
    """A paragraph set apart by a coloured bar; the text is escaped."""
    return f'<p class="note">{html.escape(text)}</p>'


def html_whole(name: str, data: bytes) -> str:
    """An SVG file in its own size, which scrolls where the page is narrower; `name` is read out in its place."""
    image = f'<img class="whole" alt="{html.escape(name)}" src="{_inline_svg(data)}">'
    return f'<div class="wide" tabindex="0">{image}</div>'


def html_figures(images: dict[str, bytes]) -> str:
    """SVG files by what they show, which is read out in their place; beside each other where the page is wide."""
    shown = (f'<img alt="{html.escape(name)}" src="{_inline_svg(data)}">' for name, data in images.items())
    return f'<div class="figures">{"".join(shown)}</div>'


def _inline_svg(data: bytes) -> str:
    """A figure as the address of an image, with its ink and grid in the colours of a light or a dark page."""
    text = data.decode().replace(INK, "currentColor").replace(GRID, "var(--grid)")
    head, tag, rest = text.partition("<svg ")
    opened, end, inside = rest.partition(">")
    both = f"{head}{tag}{opened}{end}<style>{FIGURE_STYLE}</style>{inside}"
    return f"data:image/svg+xml;base64,{base64.b64encode(both.encode()).decode()}"


def html_list(lines: list[str]) -> str:
    """A bullet for each line; the lines are escaped."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def html_folded(title: str, inner: str, opened: bool = False) -> str:
    """`inner` is HTML; the title is plain text."""
    return f"<details{' open' * opened}><summary>{html.escape(title)}</summary>{inner}</details>"
