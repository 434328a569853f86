"""Runs side by side: what is put into one table, what is not, and what must be said."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from written_runs import FLOORS, STEPS, Page, a_run, train_row, validation_row, write_run

from had_pipe.compare import compare, headings, rows, write_comparison
from had_pipe.errors import InputError, RecipeError


def test_runs_stand_under_the_keys_in_which_they_differ(tmp_path: Path) -> None:
    had = a_run(tmp_path / "had")
    alone = a_run(tmp_path / "alone", objective={"reconstruct": 0.0}, lr=1e-3, align=0.5)
    found = compare([had, alone])
    assert found.keys == ("objective.reconstruct", "train.lr")
    (table,) = found.tables
    assert table.held_out == f"the first 128 windows of split 'valid' of cache {'5f' * 6}"
    assert table.notes == (
        "objective.reconstruct differs: total losses weigh their terms differently",
    )
    assert found.notes == ()
    heads = headings(found)
    lines = [dict(zip(heads, cells, strict=True)) for _, cells in rows(found, table)]
    assert [line["run"] for line in lines] == [
        *("had", "alone", "floor: k-mer table", "floor: the mean", "floor: base frequencies"),
    ]
    assert [line["objective.reconstruct"] for line in lines[:2]] == ["1.0", "0.0"]
    assert [line["train.lr"] for line in lines[:2]] == ["0.002", "0.001"]
    assert [line["alignment error"] for line in lines] == [
        "0.6000",
        "0.5000",
        "0.8000",
        "1.0000",
        "",
    ]
    # Of the k-mer table's 0.8.
    assert [line["of the k-mer table's"] for line in lines[:2]] == ["75.0 %", "62.5 %"]
    assert lines[0]["windows/s"] == "10.7"
    assert lines[4]["cross-entropy"] == "1.3858"


def test_seeds_of_one_recipe_are_one_setting_with_mean_and_spread(tmp_path: Path) -> None:
    aligned = [0.5, 0.6, 0.64]
    seeds = [a_run(tmp_path / f"had-{i}", seed=i, align=x) for i, x in enumerate(aligned)]
    # Neither where a run lies nor how often it told of itself makes another recipe.
    seeds.append(a_run(tmp_path / "had-3", seed=3, align=0.7, log_every=7, keep=9))
    found = compare([*seeds, a_run(tmp_path / "other", objective={"target": "normalised"})])
    assert found.keys == ("objective.target",)
    had, other = found.tables[0].settings
    assert [run.seed for run in had.runs] == [0, 1, 2, 3]
    assert had.mean["align"] == pytest.approx(statistics.fmean([*aligned, 0.7]))
    assert had.spread["align"] == pytest.approx(statistics.stdev([*aligned, 0.7]))
    assert other.spread == {}
    kinds = [kind for kind, _ in rows(found, found.tables[0])]
    assert kinds == ["", "", "", "", "mean", "", "floor", "floor", "floor"]
    (line,) = [cells for kind, cells in rows(found, found.tables[0]) if kind == "mean"]
    assert line[0] == "mean ± sd of 4 seeds"
    assert "0.6100 ± 0.0841" in line
    assert found.notes == ()


def test_an_older_run_differs_not_by_keys_that_it_does_not_know(tmp_path: Path) -> None:
    old = a_run(tmp_path / "old", seed=1)
    new = a_run(tmp_path / "new", objective={"pool": "mean", "align_on": "visible"})
    masked = a_run(tmp_path / "masked", objective={"align_on": "masked", "pool": "mean"})
    assert compare([old, new]).keys == ()
    assert len(compare([old, new]).tables[0].settings) == 1
    found = compare([old, masked])
    assert found.keys == ("objective.align_on",)
    assert [row.values["objective.align_on"] for row in found.tables[0].settings] == [
        *("visible", "masked"),
    ]
    assert "objective.align_on differs" in found.tables[0].notes[0]


@pytest.mark.parametrize("other", [{"cache": "60"}, {"windows": 64}, {"validation_split": "test"}])
def test_runs_measured_on_other_windows_never_share_a_table(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    found = compare([a_run(tmp_path / "a"), a_run(tmp_path / "b", **other)])
    assert [[row.label for row in table.settings] for table in found.tables] == [["a"], ["b"]]
    assert "were not measured on the same windows" in found.notes[0]
    # Which cache it was stands above a table, not in it.
    assert "cache" not in headings(found)


def test_floors_of_other_units_are_told_of_whom_they_are(tmp_path: Path) -> None:
    raw = a_run(tmp_path / "raw", floors={"kmer_align": 0.4, "mean_align": 0.5})
    own = a_run(tmp_path / "own", objective={"target": "normalised"})
    found = compare([raw, own])
    names = [cells[0] for kind, cells in rows(found, found.tables[0]) if kind == "floor"]
    assert names == [
        "floor: k-mer table (raw)",
        "floor: k-mer table (own)",
        "floor: the mean (raw)",
        "floor: the mean (own)",
        "floor: base frequencies",
    ]
    assert found.tables[0].notes == (
        "objective.target differs: alignment errors are in different units",
    )


def test_what_would_mislead_is_said(tmp_path: Path) -> None:
    once, again = a_run(tmp_path / "x" / "had"), a_run(tmp_path / "y" / "had")
    half = write_run(tmp_path / "half", [FLOORS, train_row(10), validation_row(55), train_row(60)])
    found = compare([once, again, half])
    assert [run.name for run in found.tables[0].settings[0].runs] == ["x/had", "y/had"]
    said = " ".join(found.notes)
    assert "x/had, y/had: of one recipe and one seed" in said
    assert "half is not finished: 60 of 110 steps so far" in said
    blind = write_run(tmp_path / "blind", [train_row(10), train_row(STEPS)])
    found = compare([once, blind])
    assert found.tables[1].held_out == "nothing was held out or measured yet"
    assert set(found.tables[1].settings[0].mean) == {"windows_per_second"}


def test_one_run_twice_and_what_is_no_run_are_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    with pytest.raises(RecipeError, match="name two or more"):
        compare([run])
    with pytest.raises(RecipeError, match="given twice"):
        compare([run, tmp_path / "." / "run"])
    with pytest.raises(InputError, match="not a run"):
        compare([run, tmp_path])


def test_the_page_holds_table_plot_and_notes_and_loads_nothing(tmp_path: Path) -> None:
    hostile = '<script>alert("1")</script>'
    runs = [
        a_run(tmp_path / "one" / hostile.replace("/", "-"), objective={"target": hostile}),
        a_run(tmp_path / "had-0"),
        a_run(tmp_path / "had-1", seed=1, align=0.5),
    ]
    found = compare(runs)
    write_comparison(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page(text)
    assert "<script" not in text
    assert hostile in page.said
    assert page.tags.count("table") == 1 == page.tags.count("figure")
    assert page.tags.count("svg") == 4
    assert "0.5500 ± 0.0707" in page.said
    assert "alignment errors are in different units" in page.said
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    links = [v for name, v in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert all(link.startswith("#") for link in links)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    write_comparison(compare(runs), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()
