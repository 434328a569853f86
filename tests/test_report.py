"""The page of one run: complete, honest beside its floors, escaped, and alone in one file."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from had_pipe.errors import InputError
from had_pipe.report import write_report
from had_pipe.run import read_run
from had_pipe.verdicts import verdicts

STEPS = 110
FLOORS = {
    "kind": "floors",
    "mean_align": 1.0,
    "mean_cosine": 0.55,
    "kmer_align": 0.8,
    "kmer_cosine": 0.66,
    "base_frequency_accuracy": 0.2541,
    "base_frequency_cross_entropy": 1.3858,
    "windows": 128,
}


def train_row(step: int) -> dict[str, Any]:
    left = math.exp(-step / 40)
    return {
        "kind": "train",
        "step": step,
        "seconds": 1.5 * step,
        "loss": 2.0 + 1.1 * left,
        "align": 0.7 + 0.9 * left,
        "reconstruct": 1.36 + 0.05 * left,
        "accuracy": 0.31 - 0.05 * left,
        "cosine": 0.7 - 0.5 * left,
        "lr": 2e-3 * (step / 11 if step < 11 else math.cos(math.pi / 2 * (step - 11) / 99)),
        "grad_norm": 0.4 + left,
        "windows_per_second": 10.7,
        "kmers_per_second": 909.0,
        "bases_per_second": 5457.0,
        "wait_share": 0.011,
        "epoch": step * 16 / 8000,
    }


def validation_row(step: int, **changed: float) -> dict[str, Any]:
    row = {k: train_row(step)[k] for k in ("loss", "align", "reconstruct", "accuracy", "cosine")}
    return {"kind": "validation", "step": step, "windows": 128, **row, **changed}


def write_run(folder: Path, rows: list[dict[str, Any]], **changed: Any) -> Path:
    """A run folder of the documented form."""
    run = {
        "format": "had-run/1",
        "order": 1,
        "recipe": {
            "cache": {"codec": "int8", "part": 128},
            "student": {"hidden_size": 128, "layers": 4},
            "objective": {"align": 1.0, "reconstruct": 1.0, "target": "raw"},
            "train": {"steps": STEPS, "batch": 16, "lr": 2e-3, "seed": 0},
        },
        "caches": [
            {
                "id": "5f" * 32,
                "plan": {
                    "teacher": {
                        "name": "teacher-two-million",
                        "revision": None,
                        "weights_sha256": "ab" * 32,
                        "layer": -1,
                        "input": "masked",
                        "channels": 128,
                        "dtype": "float32",
                        "licence": "Apache-2.0",
                    },
                    "genomes": [
                        {
                            "name": "ecoli",
                            "digest": "SQC.abcdefgh",
                            "bases": 4_641_652,
                            "contigs": 1,
                            "sensitive": False,
                        }
                    ],
                    "windows": {
                        "bases": 510,
                        "stride": 510,
                        "kmers": 85,
                        "masked": 13,
                        "mask_ratio": 0.15,
                        "stored": 72,
                        "store": "visible",
                        "reverse_complement": 0.5,
                        "seed": 0,
                    },
                    "splits": {
                        "train": {"windows": 8191, "views": [0]},
                        "valid": {"windows": 910, "views": [0]},
                    },
                    "codec": "int8",
                    "licence": "Apache-2.0",
                    "licence_reason": None,
                },
                "fidelity": {"relative_error": 0.0061, "worst_token_cosine": 0.9998},
            }
        ],
        "student": {
            "parameters": 1_070_512,
            "config": {"hidden_size": 128, "layers": 4, "head_dim": 32},
        },
        "objective_parameters": 85_648,
        "device": "cpu",
        "kernel": {"name": "torch-chunked", "reason": "no CUDA device"},
        "versions": {"had-pipe": "0.1.0", "torch": "2.13.0"},
        **changed,
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return folder


def whole_run(folder: Path, **changed: Any) -> Path:
    rows = [train_row(step) for step in range(10, STEPS + 1, 10)]
    held = [validation_row(55), validation_row(STEPS, align=0.6, accuracy=0.31, reconstruct=1.3658)]
    return write_run(folder, [FLOORS, *rows, *held], **changed)


class Page(HTMLParser):
    """Every tag, attribute and piece of text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a whole run."""
    return write_report(whole_run(tmp_path_factory.mktemp("runs") / "demo")).read_text("utf-8")


def test_the_page_loads_nothing_from_anywhere(text: str) -> None:
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    links = [v for name, v in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text
    # Addresses are named in the namespaces of SVG only, which nobody loads.
    assert all("www.w3.org" in v for name, v in page.attributes if "http" in v)


def test_every_identifier_of_the_page_occurs_once(text: str) -> None:
    page = Page(text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10
    # Seven pictures; of learning rate and of speed there are two panels each.
    assert page.tags.count("figure") == 7
    assert page.tags.count("svg") == 9


def test_sentences_hold_the_student_against_its_floors(tmp_path: Path) -> None:
    said = " ".join(verdicts(read_run(whole_run(tmp_path / "demo"))))
    # 1 - 0.6 / 1.0, and 1 - 0.6 / 0.8.
    assert "explains 40.0 % of the variance" in said
    assert "explains 25.0 % of what a k-mer table" in said
    assert "accuracy 0.310, against 0.254 for always naming the commonest base" in said
    assert "cross-entropy 0.0200 nats below that of the base frequencies" in said
    assert "128 held-out windows after step 110" in said
    assert "not finished" not in said


def test_a_student_below_its_floors_is_not_praised(tmp_path: Path) -> None:
    held = validation_row(STEPS, align=1.2, accuracy=0.25, reconstruct=1.4)
    run = write_run(tmp_path / "weak", [FLOORS, train_row(10), train_row(STEPS), held])
    said = " ".join(verdicts(read_run(run)))
    assert "explains" not in said.replace("does not yet explain", "")
    assert "its error is 50.0 % larger" in said
    assert "its error is 20.0 % larger" in said
    assert "masked bases are not learnt yet" in said
    assert "0.0142 nats above" in said


def test_a_run_without_held_out_windows_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "blind", [train_row(10), train_row(STEPS)])
    said = " ".join(verdicts(read_run(run)))
    assert "No windows were held out" in said
    text = write_report(run).read_text("utf-8")
    assert "held out, step" not in text
    assert "floor:" not in text
    assert (run / "report.html").is_file()


def test_a_term_of_weight_0_has_no_chart_and_no_sentence(tmp_path: Path) -> None:
    rows = [train_row(10), validation_row(55), train_row(STEPS), validation_row(STEPS)]
    for row in rows:
        del row["align"], row["cosine"]
    run = write_run(tmp_path / "rec", [FLOORS, *rows])
    page = Page(write_report(run).read_text("utf-8"))
    assert page.tags.count("figure") == 5
    assert "Alignment with the teacher" not in page.said
    assert "Masked-base accuracy" in page.said
    assert "k-mer table (" not in page.said


def test_a_partial_run_says_how_far_it_got(tmp_path: Path) -> None:
    run = write_run(tmp_path / "half", [FLOORS, train_row(10), validation_row(55), train_row(60)])
    page = Page(write_report(run).read_text("utf-8"))
    assert "partial, 60 of 110 steps" in page.said
    assert "This run is not finished: 60 of 110 steps so far" in page.said


def test_a_run_that_measured_nothing_yet_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new", [])
    (run / "metrics.jsonl").unlink()
    page = Page(write_report(run).read_text("utf-8"))
    assert "Nothing has been measured yet." in page.said
    assert "svg" not in page.tags


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 120')
    assert read_run(run).step == STEPS


def test_a_broken_line_of_metrics_is_named(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo")
    lines = (run / "metrics.jsonl").read_text("utf-8").split("\n")
    lines[2] = lines[2][:30]
    (run / "metrics.jsonl").write_text("\n".join(lines), "utf-8")
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 3 is not a line of metrics"):
        write_report(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run: run\.json cannot be read"):
        write_report(tmp_path)
    run = whole_run(tmp_path / "later", format="had-run/9")
    with pytest.raises(InputError, match="format 'had-run/9', but this had-pipe reads 'had-run/1'"):
        write_report(run)


def test_what_strangers_wrote_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    hostile = "</pre><script>alert(1)</script>\"'&"
    folder = whole_run(tmp_path / "demo")
    run = json.loads((folder / "run.json").read_text("utf-8"))
    run["recipe"]["cache"]["licence"] = hostile
    run["caches"][0]["plan"]["teacher"]["name"] = hostile
    run["caches"][0]["plan"]["genomes"][0]["name"] = hostile
    run["caches"][0]["plan"]["splits"] = {hostile: {"windows": 1, "views": [0]}}
    run["caches"][0]["fidelity"] = {hostile: 1.0}
    run["student"]["config"][hostile] = hostile
    run["caches"][0]["url"] = hostile
    run["recipe"]["train"]["weights"] = [hostile]
    run["device"] = run["kernel"]["reason"] = run["versions"]["torch"] = hostile
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    page = Page(write_report(folder).read_text("utf-8"))
    assert "script" not in page.tags
    assert page.said.count("</pre><script>alert(1)</script>") >= 10


def test_many_lines_of_metrics_make_a_page_of_bounded_size(tmp_path: Path) -> None:
    rows = [train_row(step) for step in range(1, 6001)]
    run = write_run(tmp_path / "long", rows)
    text = write_report(run).read_text("utf-8")
    assert len(text) < 1_000_000
    assert "averaged to 800 points" in text


def test_the_page_goes_where_it_is_asked_and_equal_runs_give_equal_pages(
    tmp_path: Path, text: str
) -> None:
    run = whole_run(tmp_path / "demo")
    page = write_report(run, tmp_path / "elsewhere" / "page.html")
    assert page == tmp_path / "elsewhere" / "page.html"
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "run.json"]
    assert page.read_text("utf-8") == text
    assert sorted(p.name for p in page.parent.iterdir()) == ["page.html"]


def test_what_was_read_and_from_where_stands_on_the_page(tmp_path: Path) -> None:
    rows = [train_row(step) for step in range(10, STEPS + 1, 10)]
    for row in rows:
        row["read_bytes"], row["read_bytes_per_second"] = 30_000_000, 20_000_000.0
        row["mirror_hits"], row["mirror_misses"] = 98, 2
        row["mirror_downloaded_bytes"] = 1_000_000
    folder = write_run(tmp_path / "remote", [FLOORS, *rows])
    run = json.loads((folder / "run.json").read_text("utf-8"))
    run["caches"] = [
        {**run["caches"][0], "id": name * 32, "url": f"https://host/{name}"}
        for name in ("5f", "60")
    ]
    run["recipe"]["train"]["weights"] = [3.0, 1.0]
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    page = Page(write_report(folder).read_text("utf-8"))
    for said in (
        "read from the cache330 MB",
        "read a second, median20 MB",
        "objects found in the mirror98.0 %",
        "downloaded11 MB",
        "read fromhttps://host/5f",
        "weight among the caches3.0",
        "read fromhttps://host/60",
        "weight among the caches1.0",
        "MB read a second",
    ):
        assert said in page.said, said
    assert not [v for name, v in page.attributes if name == "href" and "host" in v]


def test_a_run_of_before_has_no_panel_of_what_was_not_measured(text: str) -> None:
    page = Page(text)
    assert "share waiting" in page.said
    assert "MB read a second" not in page.said
    assert "mirror" not in page.said
