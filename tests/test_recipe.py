"""Recipes: what is written is what is read, and everything else is refused with a way out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from had_pipe.errors import RecipeError
from had_pipe.recipe import Recipe, Section, read_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = f"""
[teacher]
name = "org/model"
revision = "{COMMIT}"

[[genome]]
name = "g"
path = "g.fa"
splits = {{ valid = ["chr8"] }}

[windows]
bases = 510
stride = 510

[cache]
path = "cache"

[train]
out = "runs/x"
steps = 100
batch = 16
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, "utf-8")
    return path


def faults(folder: Path, text: str) -> list[str]:
    """What is said of a recipe, the file's name taken off each line."""
    path = written(folder, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_a_recipe_says_both_stages_and_takes_the_documented_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, WHOLE))
    assert recipe.teacher is not None
    assert recipe.windows is not None
    assert recipe.train is not None
    assert recipe.teacher.input == "masked"
    assert recipe.teacher.layer == -1
    assert (recipe.windows.kmers, recipe.windows.masked, recipe.windows.stored) == (85, 13, 72)
    assert recipe.genome[0].splits == {"valid": ("chr8",)}
    assert recipe.cache.codec == "int8"
    assert recipe.student.head_dim == 32
    assert recipe.objective.align == recipe.objective.reconstruct == 1.0


def test_a_lab_that_only_distils_leaves_the_first_tables_out(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, '[cache]\npath = "given"\n'))
    assert recipe.teacher is None
    assert recipe.genome == ()
    assert recipe.train is None


@pytest.mark.parametrize("url", ["https://host/caches/one", "s3://bucket/one", "HTTP://[::1]:80/"])
def test_a_cache_may_be_a_url_where_it_is_only_read(tmp_path: Path, url: str) -> None:
    recipe = read_recipe(written(tmp_path, f'[cache]\npath = "{url}"\n'))
    assert recipe.cache.path == url
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(RecipeError, match=r"\[cache\] path is a URL: .* only read, by distill"):
        recipe.cache.folder  # noqa: B018


def test_a_folder_with_a_colon_is_no_url(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, '[cache]\npath = "a:b//c"\n'))
    assert recipe.cache.path == recipe.cache.folder == tmp_path / "a:b" / "c"


def test_weights_are_positive_numbers_one_a_cache(tmp_path: Path) -> None:
    train = read_recipe(written(tmp_path, WHOLE + "weights = [3, 0.5]\n")).train
    assert train is not None
    assert train.weights == (3.0, 0.5)
    for value, said in (
        ("[3, 0]", "weights = 0: must be more than 0.0"),
        ("[3, '1']", "weights = '1': must be a number, not str"),
        ("[3, inf]", "weights = inf: must be finite"),
        ("3", "weights = 3: must be a list of numbers, not int"),
        ("[]", "weights = []: must be a list of at least one"),
    ):
        assert faults(tmp_path, WHOLE + f"weights = {value}\n") == [f"[train] {said}"]


def test_paths_are_relative_to_the_recipe_and_not_to_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, WHOLE.replace('path = "cache"', 'path = "../caches/x"'))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = read_recipe(path)
    assert recipe.cache.path == tmp_path.parent / "caches" / "x"
    assert recipe.genome[0].path == tmp_path / "g.fa"
    assert read_recipe(Path("..") / "x.toml") == recipe


def test_a_folder_as_teacher_is_resolved_and_has_no_revision(tmp_path: Path) -> None:
    text = WHOLE.replace('"org/model"', '"./model"').replace(f'revision = "{COMMIT}"', "")
    teacher = read_recipe(written(tmp_path, text)).teacher
    assert teacher is not None
    assert teacher.is_folder
    assert teacher.name == str(tmp_path / "model")


def test_an_integer_is_a_number_where_a_number_is_wanted(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, WHOLE + "lr = 2\n"))
    assert recipe.train is not None
    assert recipe.train.lr == 2.0


REFUSED = [
    (
        "stride = 510",
        "stride = 510\nstrid = 1",
        "[windows] unknown key 'strid'; did you mean 'stride'?",
    ),
    (
        "bases = 510",
        "bases = 6145",
        "[windows] bases = 6145: must be a multiple of 6, the teacher's k-mer",
    ),
    ("steps = 100", "steps = '100_000'", "[train] steps = '100_000': must be int, not str"),
    ("batch = 16", "batch = 16\nlr = nan", "[train] lr = nan: must be finite"),
    ("batch = 16", "batch = 16\nlr = -inf", "[train] lr = -inf: must be finite"),
    ("batch = 16", "", "[train] missing key 'batch'"),
    (
        "[cache]",
        "[cache]\ncodec = 'bf16'",
        "[cache] codec = 'bf16': must be one of 'int8', 'exact', 'compact', 'tiny'",
    ),
    (f'"{COMMIT}"', '"main"', "[teacher] revision = 'main': must be a 40-digit commit hash"),
    (
        "[train]",
        "[train",
        "not valid TOML: Expected ']' at the end of a table declaration (at line 18, column 7)",
    ),
    ("[train]", "[trian]", "unknown table 'trian'; did you mean 'train'?"),
    (
        "[teacher]",
        "frob = 1\n[teacher]",
        "unknown key 'frob'; known are teacher, genome, windows, cache, student, objective, train",
    ),
    ('[cache]\npath = "cache"', "", "missing table [cache]"),
    ("[cache]", "[[cache]]", "cache = [{'path': 'cache'}]: must be a table, not list"),
    ("[[genome]]", "[genome]", "[genome] must be a list of tables, not dict: write [[genome]]"),
    (
        f'revision = "{COMMIT}"',
        "",
        "[teacher] revision: missing; a hub name needs its 40-digit commit",
    ),
    (
        '"org/model"',
        '"./model"',
        "[teacher] revision: a folder has none (its weights are identified by SHA-256)",
    ),
    (
        '"org/model"',
        '"model"',
        "[teacher] name = 'model': must be a hub name such as 'org/model', or a folder such as "
        "'./model'",
    ),
    (
        'name = "g"',
        'name = "a b"',
        "[[genome]] number 1: name = 'a b': must be letters, digits, '.', '_' and '-'",
    ),
    ('path = "g.fa"', "", "[[genome]] number 1: missing key 'path'"),
    (
        'path = "g.fa"',
        "path = 'http://me:secret@x/g.fa'",
        "[[genome]] number 1: path = 'http://...': must be a path on this machine: only [cache] "
        "path may be a URL",
    ),
    ('path = "g.fa"', "path = 3", "[[genome]] number 1: path = 3: must be a path in quotes"),
    (
        '{ valid = ["chr8"] }',
        '{ train = ["chr1"] }',
        "[[genome]] number 1: splits: split 'train' is what the others leave: do not name it",
    ),
    (
        '{ valid = ["chr8"] }',
        '{ valid = "chr8" }',
        "[[genome]] number 1: splits: split 'valid' must be a list of contig names",
    ),
    (
        '{ valid = ["chr8"] }',
        "{ blocks = 0.5, valid = 0.1 }",
        "[[genome]] number 1: splits: blocks = 0.5: must be a number of bases",
    ),
    (
        '{ valid = ["chr8"] }',
        "{ blocks = 50, valid = 0.6, test = 0.5 }",
        "[[genome]] number 1: splits: the share of each split must be between 0 and 1, and all "
        "below 1",
    ),
    (
        '{ valid = ["chr8"] }',
        "{ blocks = 50 }",
        "[[genome]] number 1: splits: blocks without a split: add the share of one, such as "
        "valid = 0.1",
    ),
    (
        '{ valid = ["chr8"] }',
        '{ Valid = ["chr8"] }',
        "[[genome]] number 1: splits: split 'Valid': a name is lower-case letters, digits and _",
    ),
    (
        '[[genome]]\nname = "g"',
        '[[genome]]\nname = "g"\npath = "h"\n[[genome]]\nname = "g"',
        "genome: two [[genome]] tables are named 'g'",
    ),
    (
        "bases = 510",
        "bases = 6",
        "[windows] mask_ratio = 0.15 masks 0 of 1 groups: at least one must be masked and one "
        "visible",
    ),
    ("bases = 510", "bases = 0", "[windows] bases = 0: must be more than 0"),
    ("bases = 510", "bases = 6_291_456", "[windows] bases = 6291456: must be at most 1048576"),
    ("stride = 510", "stride = 510\nviews = true", "[windows] views = True: must be int, not bool"),
    ("stride = 510", "stride = 510\nseed = -1", "[windows] seed = -1: must be at least 0"),
    (
        "stride = 510",
        "stride = 510\nmask_ratio = '15 %'",
        "[windows] mask_ratio = '15 %': must be a number, not str",
    ),
    ("[cache]", "[cache]\nlicence = 'MIT'", "[cache] licence and licence_reason go together"),
    (
        "batch = 16",
        "batch = 16\nwarmup = 100",
        "[train] warmup = 100: must be less than steps = 100",
    ),
    (
        "batch = 16",
        "batch = 16\nlr = 1e-5",
        "[train] lr_final = 0.0001: must not exceed lr = 1e-05",
    ),
    (
        "batch = 16",
        "batch = 16\n[student]\nattention_heads = 5",
        "[student] attention_heads = 5: must divide hidden_size = 128",
    ),
    (
        "batch = 16",
        "batch = 16\n[objective]\ndecoder_heads = 5",
        "[objective] decoder_heads = 5: must divide [student] hidden_size = 128",
    ),
    (
        "batch = 16",
        "batch = 16\n[objective]\nalign = 0\nreconstruct = 0.0",
        "[objective] align and reconstruct are both 0: nothing would be learnt",
    ),
    (
        "batch = 16",
        "batch = 16\n[objective]\nmask_tokens = 'dropped'\nalign_on = 'all'",
        "[objective] mask_tokens = 'dropped' leaves masked groups without features, so align_on = "
        "'all' has nothing to align: use align_on = 'visible', or mask_tokens = 'kept'",
    ),
    (
        "batch = 16",
        "batch = 16\n[objective]\nmask_tokens = 'dropped'\nmasking = 'base'",
        "[objective] mask_tokens = 'dropped' leaves whole groups out, but masking = 'base' hides "
        "single bases: use masking = 'group', or mask_tokens = 'kept'",
    ),
]


@pytest.mark.parametrize(("old", "new", "said"), REFUSED, ids=[said[:48] for _, _, said in REFUSED])
def test_a_fault_is_told_with_table_key_value_and_what_was_expected(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in WHOLE
    assert faults(tmp_path, WHOLE.replace(old, new, 1)) == [said]


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    text = WHOLE.replace("bases = 510", "bases = 511").replace("steps = 100", "steps = 0")
    assert faults(tmp_path, text) == [
        "[windows] bases = 511: must be a multiple of 6, the teacher's k-mer",
        "[train] steps = 0: must be more than 0",
    ]


def test_a_recipe_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe[\x00")
    with pytest.raises(RecipeError, match=r"x\.toml: not a TOML file: it is not UTF-8 text"):
        read_recipe(path)


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for name, table in tables.items():
        lines.append(f"[[{name}]]" if name == "genome" else f"[{name}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines)


TABLES: dict[str, dict[str, Any]] = {
    "teacher": {"name": "org/model", "revision": COMMIT},
    "genome": {"name": "g", "path": "g.fa", "splits": {"valid": ["chr8"]}},
    "windows": {"bases": 510, "stride": 510},
    "cache": {"path": "cache"},
    "student": {},
    "objective": {},
    "train": {"out": "runs/x", "steps": 100, "batch": 16},
}


def section(recipe: Recipe, table: str) -> Section:
    found = getattr(recipe, table)
    return found[0] if table == "genome" else found


KEYS = [
    (table, key)
    for table in TABLES
    for key in type(
        section(Recipe.model_validate({**TABLES, "genome": [TABLES["genome"]]}), table)
    ).model_fields
]
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12)
SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.sampled_from([0, 1, 2, 6, 12, 96, 510, 1020, 0.0, 0.15, 0.5, 1.0, 2e-3])
    | st.floats()
    | TEXT
    | st.sampled_from(
        ["masked", "full", "int8", "exact", "all", "raw", "float32", "a/b", "./m", "~x"]
    )
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(TEXT, SCALARS, max_size=2)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.sampled_from(KEYS), value=VALUES)
def test_any_value_is_refused_with_its_key_or_preserved(
    tmp_path: Path, where: tuple[str, str], value: Any
) -> None:
    table, key = where
    tables = {name: dict(old) for name, old in TABLES.items()}
    tables[table][key] = value
    path = written(tmp_path, toml(tables))
    refused = ""
    try:
        recipe = read_recipe(path)
    except RecipeError as error:
        refused = str(error)
    if refused:
        # A rule that ties several keys together may be told under another of them.
        assert refused.startswith(f"{path}: [")
        assert key in refused or table in refused
        return
    kept = getattr(section(recipe, table), key)
    if isinstance(kept, Path):
        assert kept == (tmp_path / value).resolve()
    elif key == "name" and table == "teacher" and value != kept:
        assert kept == str((tmp_path / value).resolve())
    elif isinstance(value, Mapping):
        assert {name: list(v) if isinstance(v, tuple) else v for name, v in kept.items()} == value
    elif isinstance(kept, tuple):
        assert kept == tuple(map(float, value))
    else:
        assert kept == (float(value) if isinstance(kept, float) else value)
        assert isinstance(kept, bool) == isinstance(value, bool)
        assert not isinstance(kept, float) or math.isfinite(kept)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(table=st.sampled_from(sorted(TABLES)), key=st.from_regex(r"[a-z_]{1,12}", fullmatch=True))
def test_any_unknown_key_is_refused(tmp_path: Path, table: str, key: str) -> None:
    known = [name for where, name in KEYS if where == table]
    if key in known:
        return
    tables = {name: dict(old) for name, old in TABLES.items()}
    tables[table][key] = 1
    path = written(tmp_path, toml(tables))
    with pytest.raises(RecipeError, match=f"unknown key '{key}'; (did you mean|known are)"):
        read_recipe(path)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "pipelines").rglob("*.toml")), ids=lambda path: path.name
)
def test_every_shipped_recipe_is_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.teacher is not None
    assert recipe.windows is not None
    assert recipe.train is not None
