"""The frame of a report: one HTML document, and the parts that its sections are made of."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

import dde_ds
from dde_ds.untrusted import open_regular


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return the whole document, made of (heading, HTML) sections. Its policy forbids the browser to load anything at all."""
    links = "".join(f'<a href="#s{n}">{escape(heading)}</a>' for n, (heading, _) in enumerate(sections))
    body = "".join(f'<section id="s{n}"><h2>{escape(heading)}</h2>{html}</section>' for n, (heading, html) in enumerate(sections))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><nav>{links}</nav></header><main>{body}</main>"
        f"<footer>dde_ds {escape(dde_ds.__version__)}</footer></body></html>\n"
    )


STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5c6670;--line:#d6dbe0;--back:#fff;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b1;--line:#3a424b;--back:#14171a;--card:#1d2226}}
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);overflow-wrap:anywhere}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 16px}
h1{font-size:1.6rem;margin:24px 0 8px}h2{font-size:1.2rem;margin:40px 0 12px;border-bottom:1px solid var(--line);padding-bottom:4px}
h3{font-size:1rem;margin:24px 0 8px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px}a{color:#0072b2}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
figure{margin:0;padding:12px;background:var(--card);border-radius:8px;min-width:0}
.wide{grid-column:1/-1}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:4px}
figure p{margin:4px 0 0;font-size:.85rem;color:var(--soft)}
svg{display:block;width:100%;height:auto;font:13px system-ui,sans-serif;fill:var(--soft)}
svg .rule{stroke:var(--line)}svg .axis{stroke:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.8rem;color:var(--soft)}
.legend i{display:inline-block;width:12px;height:8px;margin-right:5px;border:1px solid var(--line)}
.scroll{overflow-x:auto;margin-bottom:16px}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
td,th{padding:4px 12px 4px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
@media(max-width:600px){td:nth-child(2){white-space:normal;overflow-wrap:anywhere;min-width:7em}}
td.long,.facts th{white-space:normal;overflow-wrap:anywhere}.facts th{min-width:8.5em}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:6px}.pair div{min-width:0;font-size:.8rem;color:var(--soft)}
img{display:block;width:100%;height:auto;border-radius:4px}.pixels{image-rendering:pixelated}
pre{overflow-x:auto;background:var(--card);padding:12px;border-radius:8px;font-size:.8rem}
details{margin-top:12px}summary{cursor:pointer}.note{color:var(--soft)}footer{margin:48px auto 24px;font-size:.8rem;color:var(--soft)}
"""


def data_uri(path: Path, side: int) -> tuple[str, bool]:
    """Return a PNG file as an inline image of at most ``side`` pixels a side, and whether the file's image is small.

    An image is small below 128 pixels. It stays a PNG, so that its pixels can be shown sharply; larger images become JPEGs.

    Raises:
        OSError: the file is not there, or is no readable PNG.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # Pillow may raise anything on a damaged or enormous image; so may a bad path
        raise OSError(f"{path}: no readable image: {error}") from None
    small = max(image.size) < 128
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if small:
        image.save(file, format="PNG")
    else:
        image.save(file, format="JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", small


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
