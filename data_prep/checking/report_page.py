"""The page of check_shards.py's report: one HTML file, light and dark, which loads nothing."""

from __future__ import annotations

from html import escape
from math import ceil

STYLE = """
:root{color-scheme:light dark;--paper:#f6f5f2;--card:#fff;--ink:#1d1d1f;--soft:#6b6a67;--line:#e4e2dc;--bar:#3f6b8f;
--bar2:#b9cddd;--good:#2f7d4f;--bad:#b3372f;--warn:#b97a12}
@media (prefers-color-scheme:dark){:root{--paper:#141416;--card:#1d1d20;--ink:#ececea;--soft:#9a9a98;--line:#303034;
--bar:#7fb2dc;--bar2:#33485a;--good:#6cc28f;--bad:#f0857c;--warn:#e3b05c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-font-smoothing:antialiased}
main{max-width:1180px;margin:0 auto;padding:44px 28px 80px}
header{display:flex;flex-wrap:wrap;gap:12px 24px;align-items:flex-end;justify-content:space-between;margin-bottom:28px}
h1{font-size:30px;line-height:1.15;letter-spacing:-.02em;margin:0;overflow-wrap:anywhere}
header p{margin:6px 0 0;color:var(--soft)}
h2{font-size:13px;letter-spacing:.06em;text-transform:uppercase;color:var(--soft);margin:0 0 16px;font-weight:600}
.verdict{font-weight:600;padding:7px 15px;border-radius:999px;border:1px solid currentColor;white-space:nowrap}
.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:flex;flex-wrap:wrap;gap:1px;background:var(--line);
border:1px solid var(--line);border-radius:14px;overflow:hidden;margin-bottom:20px}
.tile{flex:1 1 120px;background:var(--card);padding:16px 20px}
.tile b{display:block;font-size:25px;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums;font-weight:600}
.tile span{color:var(--soft);font-size:13px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:20px;align-items:start}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px 22px 22px;margin-bottom:20px;
min-width:0}
.grid section{margin:0}.grid{margin-bottom:20px}.stack{display:grid;gap:20px;min-width:0}
.rows{display:grid;grid-template-columns:auto auto 1fr auto;gap:5px 12px;align-items:center;
font-variant-numeric:tabular-nums;font-size:14px}
.rows.plain{grid-template-columns:minmax(150px,max-content) 1fr auto}
.rows .n{text-align:right;color:var(--soft)}
.track{height:11px;border-radius:3px;background:linear-gradient(var(--bar),var(--bar)) 0/var(--w) 100% no-repeat}
.warn .track{--bar:var(--warn)}
.shape{width:26px;height:26px;display:grid;place-items:center}
.shape i{display:block;border:1.5px solid var(--bar);background:var(--bar2);border-radius:2px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg rect{fill:var(--bar)}svg rect:hover{fill:var(--ink)}
svg text{fill:var(--soft);font-size:11px}svg line{stroke:var(--line)}
.none{color:var(--soft);margin:0}
.note{color:var(--soft);font-size:13px;margin:14px 0 0}
.sheet{display:flex;flex-wrap:wrap;gap:14px}
.sheet:after{content:"";flex:1000 1 0}
figure{margin:0;min-width:0}
figure img{display:block;width:100%;height:auto;border-radius:8px;background:var(--line)}
figcaption{font-size:12.5px;line-height:1.4;margin-top:7px;display:-webkit-box;-webkit-line-clamp:3;
-webkit-box-orient:vertical;overflow:hidden;overflow-wrap:anywhere}
figure small{color:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
details{margin-top:12px}summary{cursor:pointer;color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
td,th{text-align:left;padding:5px 10px 5px 0;border-top:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
tr:first-child>*{border-top:0}th{font-weight:500;color:var(--soft);white-space:nowrap}
.stack th{white-space:normal;max-width:16em}
code{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
ul{margin:0;padding-left:18px;overflow-wrap:anywhere}
"""


def page(title: str, subtitle: str, problems: int, body: list[str]) -> str:
    """The whole document around its parts; `title` and `subtitle` are plain text, the parts HTML."""
    verdict = f'<span class="verdict bad">{problems} problem{"s" * (problems > 1)}</span>' if problems else (
        '<span class="verdict good">everything agrees</span>'
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><div><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></div>{verdict}</header>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def grid(*sections: str) -> str:
    return f'<div class="grid">{"".join(sections)}</div>'


def stack(*sections: str) -> str:
    return f'<div class="stack">{"".join(sections)}</div>'


def tiles(values: list[tuple[str, str]]) -> str:
    """Large numbers with what they count: (number, label)."""
    cells = "".join(
        f'<div class="tile"><b>{escape(number)}</b><span>{escape(label)}</span></div>' for number, label in values
    )
    return f'<div class="tiles">{cells}</div>'


def bucket_bars(buckets: list[tuple[int, int, int]]) -> str:
    """(width, height, count) as bars, each with its shape drawn to scale."""
    longest, most = max(max(w, h) for w, h, _ in buckets), max(count for *_, count in buckets)
    rows = []
    for width, height, count in buckets:
        sides = f"width:{ceil(24 * width / longest)}px;height:{ceil(24 * height / longest)}px"
        rows.append(
            f'<div class="shape"><i style="{sides}"></i></div><div>{width} × {height}</div>'
            f'<div class="track" style="--w:{100 * count / most:.1f}%"></div><div class="n">{count:,}</div>'
        )
    return f'<div class="rows">{"".join(rows)}</div>'


def reason_bars(reasons: list[tuple[str, int]]) -> str:
    if not reasons:
        return '<p class="none">Nothing was left out.</p>'
    most = max(count for _, count in reasons)
    rows = "".join(
        f'<div>{escape(reason)}</div><div class="track" style="--w:{100 * count / most:.1f}%"></div>'
        f'<div class="n">{count:,}</div>'
        for reason, count in reasons
    )
    return f'<div class="rows plain warn">{rows}</div>'


def histogram(counts: list[int], labels: list[str], ticks: list[tuple[float, str]]) -> str:
    """Bars of equal width; `labels` are shown under the pointer, ticks stand at positions from 0 to 1."""
    width, height, most = 520.0, 150.0, max(counts) or 1
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - max(1.5, height * count / most):.1f}" width="{max(1, step - 1.5):.1f}" '
        f'height="{max(1.5, height * count / most):.1f}" rx="1.5"><title>{escape(label)}: {count:,}</title></rect>'
        for i, (count, label) in enumerate(zip(counts, labels, strict=True))
        if count
    )
    anchor = {0.0: "start", 1.0: "end"}
    marks = "".join(
        f'<text x="{position * width:.1f}" y="{height + 17}" text-anchor="{anchor.get(position, "middle")}">'
        f"{escape(text)}</text>"
        for position, text in ticks
    )
    base = f'<line x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
    return f'<svg viewBox="0 -4 {width} {height + 26}" role="img">{bars}{base}{marks}</svg>'


def contact_sheet(pictures: list[tuple[str, float, str, str]]) -> str:
    """(data URL or nothing, width : height, caption, small print) in justified rows."""
    figures = []
    for url, ratio, caption, note in pictures:
        image = f'<img src="{url}" alt="" style="aspect-ratio:{ratio:.4f}">' if url else ""
        text = escape(caption) if caption else '<span class="none">(empty caption)</span>'
        figures.append(
            f'<figure style="flex:{ratio:.3f} 1 {ratio * 190:.0f}px">{image}'
            f'<figcaption title="{escape(caption)}">{text}</figcaption><small>{escape(note)}</small></figure>'
        )
    return f'<div class="sheet">{"".join(figures)}</div>'


def table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def items(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
