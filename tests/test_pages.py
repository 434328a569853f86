"""Pages as a browser shows them: in the light and in the dark, on a phone, with all they draw."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from written_runs import a_run, some_features, whole_run

from had_pipe import page
from had_pipe.compare import compare, write_comparison
from had_pipe.page import Cloud, Curve, Dots, Level, Panel, Picture
from had_pipe.report import write_report

PHONE = 400
PROBE = """<!doctype html><body><script>
const told = {};
const look = (name, frame) => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const box = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
  const letters = [...page.querySelectorAll("svg text")].map(t => {
    const to = t.getScreenCTM();
    return parseFloat(view.getComputedStyle(t).fontSize) * Math.hypot(to.a, to.b);
  });
  told[name] = {
    width: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight,
    paper: view.getComputedStyle(page.body).backgroundColor,
    ink: view.getComputedStyle(page.body).color,
    drawn: view.getComputedStyle(page.querySelector("svg text")).fill,
    pictures: [...page.querySelectorAll("svg")].map(box),
    swatches: [...page.querySelectorAll(".legend i")].map(box),
    smallest: Math.min(...letters),
    text: page.body.innerText,
  };
};
const waiting = PAGES.map(([name, code]) => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style = "width: PHONEpx; height: 900px; border: 0";
  frame.onload = () => { look(name, frame); done(); };
  const bytes = Uint8Array.from(atob(code), c => c.charCodeAt(0));
  frame.srcdoc = new TextDecoder().decode(bytes);
  document.body.append(frame);
}));
Promise.all(waiting).then(() => {
  const pre = document.createElement("pre");
  pre.id = "told";
  pre.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(told))));
  document.body.replaceChildren(pre);
});
</script></body>"""


def browse(tmp_path: Path, *options: str) -> str:
    """What a headless browser prints; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no chromium on this machine to look at pages with")
    done = subprocess.run(
        [
            *(found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'browser'}", "--force-device-scale-factor=1"),
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A report with everything on it, and a comparison of runs with long names."""
    folder = tmp_path_factory.mktemp("runs")
    report = write_report(whole_run(folder / "demo"), features=some_features())
    runs = [
        a_run(folder / f"a-run-of-a-rather-long-name-{i}", seed=i, align=0.5 + i / 20)
        for i in range(2)
    ]
    runs.append(a_run(folder / "other", objective={"target": "normalised", "reconstruct": 0.5}))
    write_comparison(compare(runs), folder / "compare.html")
    return {
        "report": report.read_text("utf-8"),
        "compare": (folder / "compare.html").read_text("utf-8"),
    }


def brightness(colour: str) -> float:
    red, green, blue = (int(number) for number in re.findall(r"\d+", colour)[:3])
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_pages_read_on_a_phone_in_the_light_and_in_the_dark(
    tmp_path: Path, pages: dict[str, str], scheme: str
) -> None:
    coded = [[name, base64.b64encode(text.encode()).decode()] for name, text in pages.items()]
    probe = tmp_path / "probe.html"
    probe.write_text(
        PROBE.replace("PAGES", json.dumps(coded)).replace("PHONE", str(PHONE)), "utf-8"
    )
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    told = browse(tmp_path, preferred, "--virtual-time-budget=60000", "--dump-dom", probe.as_uri())
    code = re.search(r'<pre id="told">([^<]+)</pre>', told)
    assert code is not None, told[:500]
    seen: dict[str, Any] = json.loads(base64.b64decode(code[1]))
    assert set(seen) == set(pages)
    for name, of in seen.items():
        # Nothing but tables is wider than the screen, and these scroll in themselves.
        assert of["width"] <= PHONE, name
        assert of["height"] > 2000
        light, dark = (of["paper"], of["ink"])[:: 1 if scheme == "light" else -1]
        assert brightness(light) > 0.75
        assert brightness(dark) < 0.25
        assert of["drawn"] == of["ink"]
        assert len(of["pictures"]) == pages[name].count("<svg")
        assert all(width > 280 and height > 150 for width, height in of["pictures"])
        assert all(width > 5 and height > 1 for width, height in of["swatches"])
        assert of["smallest"] > 8
        assert "step" in of["text"]
    assert "Learned 6-mer structure" in seen["report"]["text"]


def test_curves_floors_and_dots_appear_in_their_colours(tmp_path: Path) -> None:
    at_P2 = np.random.default_rng(0).uniform(-1, 1, size=(60, 2))
    panel = Panel(
        label="loss",
        curves=[Curve(x=[0, 1], y=[0, 1], colour=page.TRAIN, label="a")],
        levels=[Level(y=0.5, colour=page.FLOOR_KMER, label="b")],
    )
    cloud = Cloud(
        label="teacher", dots=[Dots(at_P2=at_P2, colour=page.RAMP[0], label="few")], limit=1
    )
    pictures = [
        Picture(name=f"p{i}", title="t", caption="c", panels=[one])
        for i, one in enumerate((panel, cloud))
    ]
    html = tmp_path / "page.html"
    write_comparison_of(pictures, html)
    shot = tmp_path / "page.png"
    browse(
        *(tmp_path, "--blink-settings=preferredColorScheme=1", "--window-size=900,900"),
        *(f"--screenshot={shot}", html.as_uri()),
    )
    pixel_HWC = image.imread(shot)[..., :3]
    for colour, share, least in (
        ("#2b6cb0", 1.0, 100),
        ("#0f766e", 1.0, 100),
        ("#1e4f9c", 0.75, 400),  # dots let a quarter of the paper through
    ):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        near_HW = np.abs(pixel_HWC - (share * rgb + 1 - share)).max(axis=-1) < 0.04
        assert near_HW.sum() > least, colour


def write_comparison_of(pictures: list[Picture], html: Path) -> None:
    drawn = [page.drawn(one) for one in pictures]
    table = {"held_out": "x", "notes": [], "heads": ["run"], "rows": [], "pictures": drawn}
    page.write_page(html, "compare.html.j2", names=[], notes=[], tables=[table], runs=[])


def test_no_stand_in_of_a_colour_is_left_on_a_page(pages: dict[str, str]) -> None:
    for text in pages.values():
        assert "#0101" not in text
        assert "var(--train)" in text or "var(--kind-0)" in text
        # Every variable that is used is one that is set, in both schemes and on paper.
        for name in set(re.findall(r"var\((--[a-z0-9-]+)\)", text)):
            assert text.count(f"{name}:") >= 2, name
