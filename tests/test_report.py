"""The page of one run: complete, honest beside its floors, escaped, and alone in one file."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_runs import (
    FLOORS,
    STEPS,
    Page,
    some_features,
    train_row,
    validation_row,
    whole_run,
    write_run,
)

from had_pipe.errors import InputError, RecipeError
from had_pipe.report import recipe_text, write_report
from had_pipe.run import read_run
from had_pipe.verdicts import verdicts


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


def test_a_run_before_its_first_validation_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "young", [FLOORS, train_row(10)])
    said = " ".join(verdicts(read_run(run)))
    assert "The student was not measured on held-out windows yet" in said
    assert "No windows" not in said


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


def test_a_folder_is_no_place_for_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", [train_row(10)])
    with pytest.raises(RecipeError, match=r"is a folder; name a file in it, such as .*page\.html"):
        write_report(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


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


def test_the_recipe_on_the_page_is_toml_that_says_the_same() -> None:
    recipe = {
        "student": {"hidden_size": 128},
        "objective": {"align": 0.5, "target": "raw"},
        "train": {
            "lr": 1e-5,
            "weights": [3.0, 1.0],
            "ema": None,
            "track": [],
            "direct": True,
            "validation_split": 'held "out"\\ \x7f\n\u00e9',
        },
    }
    del (expected := json.loads(json.dumps(recipe)))["train"]["ema"]
    assert tomllib.loads(recipe_text(recipe)) == expected


def test_what_was_aligned_and_how_stands_in_the_sentences(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "demo")
    run = json.loads((folder / "run.json").read_text("utf-8"))
    run["recipe"]["objective"] |= {"align_on": "masked", "error": "smooth_l1"}
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    said = " ".join(verdicts(read_run(folder)))
    # A share of the variance only squares can leave.
    assert "variance" not in said
    assert "on masked k-mers is 40.0 % below that of their plain mean" in said
    assert "It is 25.0 % below that of a k-mer table" in said
    page = Page(write_report(folder).read_text("utf-8"))
    assert "Error on masked k-mers" in page.said
    assert "smooth L1 error, doubled" in page.said


def test_figures_that_are_nothing_have_an_axis_all_the_same(tmp_path: Path) -> None:
    row = {**ONE, "lr": 0.0, "grad_norm": 1e-300, "bases_per_second": 0.0, "wait_share": 0.0}
    page = Page(write_report(write_run(tmp_path / "demo", [row])).read_text("utf-8"))
    assert page.tags.count("svg") == 5


def test_a_record_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    for key, value in (("recipe", 7), ("caches", [{}]), ("recipe", {"train": {}})):
        folder = whole_run(tmp_path / f"{key}-{len(str(value))}", **{key: value})
        with pytest.raises(InputError, match="is not the record of a run"):
            write_report(folder)


def test_features_stand_beside_the_teachers_in_every_colour(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo")
    (run / "student").mkdir()
    text = write_report(run, features=some_features()).read_text("utf-8")
    page = Page(text)
    # Four more pictures of two panels each.
    assert page.tags.count("figure") == 11
    assert page.tags.count("svg") == 17
    for said in (
        "on 64 held-out windows of cache " + "5f" * 32,
        "The two planes agree at 0.87",
        "explains 31.0 % of the variance of the teacher's groups and 27.0 % of the student's; "
        "shifted along the genome, 0.1 % and 0.2 %.",
        "90 6-mers lie correlates with the teacher's at 0.71",
        "differ gives 0.33, without any model: the student holds 6-mers alike",
        "<gene>",
    ):
        assert said in page.said, said
    assert "<gene>" not in text
    labels = [v for name, v in page.attributes if name == "aria-label"]
    assert "Groups by feature: teacher" in labels
    assert "Learned 6-mer structure: student" in labels
    assert len(text) < 2_000_000
    again = write_report(run, tmp_path / "again.html", features=some_features())
    assert again.read_text("utf-8") == text


def test_every_group_is_drawn_once_in_each_picture(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "demo")
    plain = some_features(feature_P=None, feature=None, kmers=None, soft_level_P=np.zeros(300))
    text = write_report(run, features=plain).read_text("utf-8")
    page = Page(text)
    assert "Nothing is coloured by soft-masking" in page.said
    assert page.tags.count("figure") == 8
    clouds = text.split('aria-label="Groups by their G and C')[1:]
    for cloud in clouds:
        paths = [v for name, v in Page(cloud.split("</svg>")[0]).attributes if name == "d"]
        # A dot is a stroke without length.
        dots = [piece for path in paths for piece in path.split("M")[1:]]
        alike = [d for d in dots if len(p := d.replace("L", " ").split()) == 4 and p[:2] == p[2:]]
        assert len(alike) == 300


ONE = {"kind": "train", "step": STEPS, "seconds": 9.0, "loss": 1.5}


@pytest.mark.parametrize(
    ("rows", "student", "said"),
    [
        ([ONE], False, "Shown once the run is finished"),
        ([ONE], True, "Left out: no windows were held out."),
        ([ONE, validation_row(STEPS)], True, "report RUN --cache PATH"),
    ],
)
def test_where_features_are_left_out_the_page_says_why(
    tmp_path: Path, rows: list[dict[str, Any]], student: bool, said: str
) -> None:
    run = write_run(tmp_path / "demo", rows)
    if student:
        (run / "student").mkdir()
    assert said in Page(write_report(run).read_text("utf-8")).said
