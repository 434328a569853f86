"""What benchmarks/stream.py measured, as text, as the tables of docs/benchmarks.md and its plot.

    python benchmarks/stream_report.py RESULT [RESULT ...] [--page docs/benchmarks.md]

RESULT holds what `stream.py --json` printed: its last line is taken; sections of the same windows
that were measured one by one are put together. With --page the tables are
put into the page, between its lines `<!-- stream: begin -->` and `<!-- stream: end -->`, and the
plot of the first result into img/stream.svg beside it; without, they are printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

GOALS = {"stream": "0.90", "stream, always": "0.60"}


def tables(result: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Captions, and rows of cells under a first row of headings."""
    found: list[tuple[str, list[list[str]]]] = []
    for name, part in result.get("local", {}).items():
        rows = [["reader", "GB/s", "CPU s a GB", "against raw read", "range", "goal"]]
        for reader, told in part["against_raw_read"].items():
            rows.append([reader, *_rates(told), *_ratio(told), _goal(name, reader)])
        held = part.get("still_in_memory")
        note = "" if held is None else f", {held:.1%} of the files still in memory"
        found.append((f"{name}, {part['buffers']} buffers{note}", rows))
    if "peers" in result:
        rows = [["loader", "GB/s", "CPU s a GB", "the stream is faster", "range", "versions"]]
        for peer, told in sorted(result["peers"].items(), key=lambda item: item[1]["ratio"]):
            versions = ", ".join(f"{k} {v}" for k, v in told["versions"].items() if k != "numpy")
            rows.append([peer, *_rates(told), *_ratio(told, "x"), versions])
        absent = "; ".join(f"{name} ({why})" for name, why in result["absent"].items())
        found.append((f"epochs of other loaders{'; absent: ' + absent if absent else ''}", rows))
    if "wait" in result:
        rows = [["device", "batch", "s a step", "on a batch in memory", "ratio", "range", "waits"]]
        for device, told in result["wait"].items():
            seconds = (f"{told[key]:.3f}" for key in ("step_seconds", "step_seconds_in_memory"))
            low, high = told["range"]
            share = f"{told['wait_share']:.2%}"
            slower = (f"{told['ratio_in_memory']:.3f}", f"{low:.3f} to {high:.3f}")
            rows.append([device, str(told["batch"]), *seconds, *slower, share])
        found.append(("training steps", rows))
    if "remote" in result:
        part = result["remote"]
        rows = [["link", "plain GETs, GB/s", "first epoch", "second epoch", "of a local cache's"]]
        for link, told in part["links"].items():
            first, second = told["first epoch"], told["second epoch"]
            rows.append(
                [
                    link,
                    f"{told['link']['gigabytes_per_second']:.2f}",
                    f"{first['gigabytes_per_second']:.2f} ({first['ratio_link']:.2f})",
                    f"{second['gigabytes_per_second']:.2f}",
                    f"{second['ratio_local']:.2f}",
                ]
            )
        caption = f"{part['objects']:,} objects, {part['latency_seconds'] * 1e3:.0f} ms each"
        found.append((f"behind a link, {caption}", rows))
    if "growth" in result:
        part = result["growth"]
        rows = [["shards", "ms a batch"]]
        rows += [[n, f"{s * 1e3:.2f}"] for n, s in part["batch_seconds"].items()]
        ratio = f"100 against 10: {part['ratio_100_to_10']:.2f}, 1: {part['ratio_100_to_1']:.2f}"
        caption = f"batches of {part['batch']} small windows ({part['window_nbytes']:,} bytes)"
        found.append((f"{caption}; {ratio}", rows))
    return found


def _rates(told: dict[str, Any]) -> list[str]:
    return [f"{told['gigabytes_per_second']:.2f}", f"{told['cpu_seconds_per_gigabyte']:.2f}"]


def _ratio(told: dict[str, Any], sign: str = "") -> list[str]:
    low, high = told["range"]
    return [f"{told['ratio']:.2f}{sign}", f"{low:.2f} to {high:.2f}"]


def _goal(section: str, reader: str) -> str:
    return GOALS.get(reader, "") if section.startswith("warm") else ""


def headline(result: dict[str, Any]) -> str:
    hardware = result["hardware"]
    return (
        f"{result['nbytes'] / 1e9:.2f} GB in {result['windows']:,} windows, {result['threads']} "
        f"threads, medians of {result['rounds']} rounds; {hardware['cores']} cores of "
        f"{hardware['cpu']}, load {hardware['load']:.1f}; commit {result['commit']}"
    )


def text(result: dict[str, Any]) -> str:
    lines = [headline(result)]
    for caption, rows in tables(result):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", caption]
        for row in rows:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    lines = [headline(result)]
    for caption, rows in tables(result):
        lines += ["", f"{caption[0].upper()}{caption[1:]}:", ""]
        head, *body = (f"| {' | '.join(row)} |" for row in rows)
        lines += [head, "|" + "---|" * len(rows[0]), *body]
    return "\n".join(lines)


def bars(result: dict[str, Any]) -> list[tuple[str, float, str]]:
    """What the plot shows: name, speed with the stream's as 1, kind."""
    against = result["local"]["warm, batches of 256"]["against_raw_read"]
    stream = against["stream"]["ratio"]
    found = [
        ("memcpy", against["memcpy"]["ratio"] / stream, "hardware"),
        ("raw sequential read", 1 / stream, "hardware"),
        ("stream", 1.0, "ours"),
        ("stream, CRC at every read", against["stream, always"]["ratio"] / stream, "ours"),
        ("np.memmap, same threads", against["np.memmap"]["ratio"] / stream, "peer"),
    ]
    peers = sorted(result.get("peers", {}).items(), key=lambda item: item[1]["ratio"])
    return found + [(name, 1 / told["ratio"], "peer") for name, told in peers]


def svg(result: dict[str, Any]) -> str:
    """Bars that are readable on white and on black, whatever page shows them."""
    found = bars(result)
    left, top, wide, step = 244, 54, 442, 26
    longest = max(value for _, value, _ in found)
    height = top + step * len(found) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img" '
        'aria-labelledby="title desc" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif\">",
        '  <title id="title">Speed of shuffled batches, the stream as 1</title>',
        f'  <desc id="desc">{escape(_described(found))}</desc>',
        "  <style>",
        "    text { fill: #20262c; font-size: 13px; }",
        "    .note { fill: #5c6670; }",
        "    .ours { fill: #2b6cb0; } .hardware { fill: #8a949e; } .peer { fill: #c2703a; }",
        "    @media (prefers-color-scheme: dark) {",
        "      text { fill: #e8eaed; } .note { fill: #a8b0b8; }",
        "      .ours { fill: #5a9bdc; } .hardware { fill: #8a949e; } .peer { fill: #d98a55; }",
        "    }",
        "  </style>",
        f'  <text x="14" y="20" font-weight="600">{escape(_title(result))}</text>',
        '  <text x="14" y="40" class="note">the stream as 1; grey: what the machine can do at '
        "most; warm page cache</text>",
    ]
    for number, (name, value, kind) in enumerate(found):
        y = top + step * number
        width = max(1.0, wide * value / longest)
        label = f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
        parts += [
            f'  <text x="{left - 10}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'  <rect class="{kind}" x="{left}" y="{y + 1}" width="{width:.1f}" height="18"/>',
            f'  <text x="{left + width + 8:.1f}" y="{y + 14}" class="note">{label}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _title(result: dict[str, Any]) -> str:
    window = result["nbytes"] / result["windows"] / 1e3
    return f"Shuffled batches of 256 windows of {window:.0f} kB, {result['threads']} threads"


def _described(found: Iterable[tuple[str, float, str]]) -> str:
    return "; ".join(f"{name} {value:.3f}" for name, value, _ in found)


def joined(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of the same windows as one, the first one's words on machine and commit kept."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for number, result in enumerate(results):
        key = (result["benchmark"], result.get("nbytes", number), result.get("threads", number))
        found[key] = {**result, **found.get(key, {})}
    return list(found.values())


def section(results: Sequence[dict[str, Any]]) -> str:
    """All that a page says of some results."""
    return "\n\n".join(
        soaked(result) if result["benchmark"] == "stream, soak" else markdown(result)
        for result in results
    )


def soaked(result: dict[str, Any]) -> str:
    per_minute = result["rss_slope_bytes_per_minute"]
    first, most, before = (result[f"rss_{key}"] / 1e6 for key in ("settled", "most", "before"))
    return (
        f"Soak of {result['seconds'] / 60:.1f} minutes: {result['batches']:,} decoded batches, "
        f"{result['gigabytes']:.0f} GB as stored. The process held {before:.0f} MB before, "
        f"{first:.0f} MB once it had settled, {most:.0f} MB at most, of which it may read ahead "
        f"{result['prefetch_nbytes'] / 1e6:.0f} MB; the line through it rises by "
        f"{per_minute / 1e6:+.2f} MB a minute. Commit {result['commit']}."
    )


def put(page: str, told: str) -> str:
    """A page with what stands between the two marks replaced."""
    before, begin, rest = page.partition("<!-- stream: begin -->\n")
    _, end, after = rest.partition("<!-- stream: end -->")
    if not (begin and end):
        raise SystemExit("the page has no lines <!-- stream: begin --> and <!-- stream: end -->")
    return f"{before}{begin}{told}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables and a plot of benchmarks/stream.py.")
    parser.add_argument("results", type=Path, nargs="+", help="what `stream.py --json` printed")
    parser.add_argument("--page", type=Path, help="where to put tables and plot")
    chosen = parser.parse_args(arguments)
    results = joined(
        json.loads(path.read_text("utf-8").strip().splitlines()[-1]) for path in chosen.results
    )
    if chosen.page is None:
        print(section(results))
        return
    plot = chosen.page.parent / "img" / "stream.svg"
    plot.parent.mkdir(exist_ok=True)
    plot.write_text(svg(results[0]), "utf-8")
    drawn = f"![Speed of shuffled batches, the stream as 1](img/{plot.name})"
    told = f"{drawn}\n\n{section(results)}"
    chosen.page.write_text(put(chosen.page.read_text("utf-8"), told), "utf-8")


if __name__ == "__main__":
    main()
