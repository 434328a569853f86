"""`had-pipe teachers`: what lies here is told without loading it, and fetching trusts nobody."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import safetensors.torch
from conftest import REPOSITORY
from huggingface_hub import constants as hub_constants
from typer.testing import CliRunner, Result

from had_pipe import cli
from had_pipe.errors import InputError, NetworkError, RecipeError
from had_pipe.teachers.hub import fetch
from had_pipe.teachers.listing import FAMILIES, find
from had_pipe.teachers.ntv2 import NTv2Config, random_model
from had_pipe.teachers.ntv2_checkpoint import save_checkpoint
from had_pipe.teachers.teacher import load_teacher

COMMIT = "81b29e5786726d891dbf929404ef20adca5b36f1"
NAME = "someone/dna"
SHAPE = NTv2Config(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=43,
)


def had_pipe(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="had-pipe")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "dna"
    save_checkpoint(random_model(SHAPE, seed=1, head="language"), folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test of these sees what the machine's own hub cache holds."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# --- a hub of one's own --------------------------------------------------------------------------


@dataclass
class Hub:
    """A repository of files at one commit, told as the hub tells it, with faults on demand."""

    files: dict[str, bytes]
    url: str = ""
    asked: list[str] = field(default_factory=list)
    """Paths of GET requests."""
    served: dict[str, bytes] = field(default_factory=dict)
    """What comes in place of a file."""

    def described(self) -> dict[str, Any]:
        entries = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
            if name.endswith((".safetensors", ".bin")):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": entries, "tags": []}


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def ask(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Have the hub client speak to this host and to no other, without waits between its tries."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", url)
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    here = Hub({path.name: path.read_bytes() for path in checkpoint.iterdir()})
    # What lies beside it on the hub and is no concern of ours.
    here.files |= {"modeling_esm.py": b"raise SystemExit", "jax_model/weights.bin": bytes(1000)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if self.command == "GET":
                here.asked.append(path)
            if path == f"/api/models/{NAME}/revision/{COMMIT}":
                self.answer(json.dumps(here.described()).encode(), {})
                return
            prefix = f"/{NAME}/resolve/{COMMIT}/"
            name = path.removeprefix(prefix)
            if path.startswith(prefix) and name in here.files:
                data = here.files[name]
                known = hashlib.sha256(data).hexdigest()
                headers = {"ETag": f'"{known}"', "X-Repo-Commit": COMMIT}
                self.answer(here.served.get(name, data), headers)
                return
            self.send_response(404)
            kind = "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
            self.send_header("X-Error-Code", kind)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def answer(self, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        here.url = f"http://127.0.0.1:{server.server_port}"
        ask(monkeypatch, here.url)
        try:
            yield here
        finally:
            server.shutdown()
            thread.join()


NEEDED = {"config.json", "README.md", "model.safetensors"}


def test_a_fetched_teacher_is_whole_and_loads_without_network(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fetch(f"{NAME}@{COMMIT}")
    assert (made.name, made.revision, made.licence) == (NAME, COMMIT, "MIT")
    assert set(made.files) == NEEDED
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert made.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert not any("modeling_esm" in path or "jax" in path for path in hub.asked)

    ask(monkeypatch, "http://127.0.0.1:9")
    teacher = load_teacher(NAME, revision=COMMIT, layer=-1, device="cpu", offline=True)
    assert (teacher.name, teacher.revision) == (NAME, COMMIT)
    assert teacher.weights_sha256 == made.weights_sha256
    (found,) = find()
    assert (found.name, found.revision, found.problem) == (NAME, COMMIT, None)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_download_that_was_stopped_is_no_teacher_and_goes_on_where_there_is_network(
    hub: Hub, missing: str
) -> None:
    made = fetch(f"{NAME}@{COMMIT}")
    (made.path / missing).resolve().unlink()
    (made.path / missing).unlink()
    with pytest.raises(NetworkError, match=r"not whole in the local hub.* teachers fetch"):
        load_teacher(NAME, revision=COMMIT, layer=-1, device="cpu", offline=True)
    hub.asked.clear()
    teacher = load_teacher(NAME, revision=COMMIT, layer=-1, device="cpu")
    assert teacher.weights_sha256 == made.weights_sha256
    assert [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path] == [missing]


def test_fetching_again_asks_for_no_file_again(hub: Hub, tmp_path: Path) -> None:
    for folder in (None, tmp_path / "plain"):
        first = fetch(f"{NAME}@{COMMIT}", folder=folder)
        hub.asked.clear()
        assert fetch(f"{NAME}@{COMMIT}", folder=folder) == first
        assert not [path for path in hub.asked if "/resolve/" in path]


def test_a_folder_gets_the_files_and_nothing_else(
    hub: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    made = fetch(f"{NAME}@{COMMIT}", folder=tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == NEEDED
    for name in NEEDED:
        assert (tmp_path / "plain" / name).read_bytes() == (checkpoint / name).read_bytes()
    teacher = load_teacher(str(tmp_path / "plain"), revision=None, layer=-1, device="cpu")
    assert teacher.weights_sha256 == made.weights_sha256
    # A file that was damaged since comes again, the others stay.
    (tmp_path / "plain" / "model.safetensors").write_bytes(b"damaged")
    hub.asked.clear()
    assert fetch(f"{NAME}@{COMMIT}", folder=tmp_path / "plain") == made
    assert [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path] == [
        "model.safetensors"
    ]


def test_weights_in_several_files_are_fetched_by_their_index(hub: Hub, tmp_path: Path) -> None:
    stored = safetensors.torch.load(hub.files.pop("model.safetensors"))
    holds = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(stored)}
    for name in set(holds.values()):
        some = {key: stored[key] for key in stored if holds[key] == name}
        hub.files[name] = safetensors.torch.save(some)
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": holds}).encode()
    made = fetch(f"{NAME}@{COMMIT}")
    assert set(holds.values()) < set(made.files)
    teacher = load_teacher(NAME, revision=COMMIT, layer=-1, device="cpu", offline=True)
    assert teacher.weights_sha256 == made.weights_sha256
    # Loading from the hub without fetching first brings the same.
    shutil.rmtree(Path(hub_constants.HF_HUB_CACHE))
    assert load_teacher(NAME, revision=COMMIT, layer=-1, device="cpu").channels == 16


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("plain", [True, False], ids=["folder", "hub-cache"])
def test_what_is_not_what_the_hub_says_is_removed_and_named(
    hub: Hub, tmp_path: Path, name: str, plain: bool
) -> None:
    folder = tmp_path / "plain" if plain else None
    other = bytearray(hub.files[name])
    other[-1] ^= 1
    hub.served[name] = bytes(other)
    with pytest.raises(InputError, match=rf"{name} is not what the hub says it is \((SHA|git)"):
        fetch(f"{NAME}@{COMMIT}", folder=folder)
    hub.served.clear()
    assert set(fetch(f"{NAME}@{COMMIT}", folder=folder).files) == NEEDED


@pytest.mark.parametrize(
    "reference",
    [NAME, f"{NAME}@main", f"{NAME}@v1.0", f"{NAME}@{COMMIT[:12]}", f"dna@{COMMIT}", "@", ""],
)
def test_a_branch_or_part_of_a_name_is_refused_with_how_to_find_the_commit(
    hub: Hub, reference: str
) -> None:
    with pytest.raises(RecipeError, match=r"expected NAME@COMMIT.*git ls-remote http\S+ lists"):
        fetch(reference)
    assert not hub.asked


def drop(*names: str) -> Callable[[Hub], None]:
    def change(hub: Hub) -> None:
        for name in names:
            del hub.files[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("config.json"), r"holds no config\.json"),
        (drop("model.safetensors"), r"holds no weights, neither model\.safetensors nor"),
    ],
    ids=["config", "weights"],
)
def test_a_repository_without_a_model_is_refused(
    hub: Hub, change: Callable[[Hub], None], message: str
) -> None:
    change(hub)
    with pytest.raises(InputError, match=message):
        fetch(f"{NAME}@{COMMIT}")


def test_a_model_or_commit_that_the_hub_lacks_is_an_input_error(hub: Hub) -> None:
    for reference in (f"nobody/nothing@{COMMIT}", f"{NAME}@{COMMIT[::-1]}"):
        with pytest.raises(InputError, match="the hub knows no such model or commit"):
            fetch(reference)


def test_a_hub_that_cannot_be_reached_is_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=rf"{NAME} at 81b29e578672"):
        fetch(f"{NAME}@{COMMIT}")


def test_a_folder_of_something_else_is_not_written_to(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"which is no checkpoint's; name an empty"):
        fetch(f"{NAME}@{COMMIT}", folder=tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        fetch(f"{NAME}@{COMMIT}", folder=tmp_path / "notes.txt")
    assert not hub.asked


def test_the_verb_says_what_was_fetched_and_what_a_recipe_needs(hub: Hub, tmp_path: Path) -> None:
    result = had_pipe("teachers", "fetch", f"{NAME}@{COMMIT}")
    assert result.exit_code == 0, result.output
    assert f'name = "{NAME}"' in result.stdout
    assert f'revision = "{COMMIT}"' in result.stdout
    assert (
        "NT-v2, 16 channels, 2 layers, tokens of 6 bases, windows of at most 240" in result.stdout
    )
    result = had_pipe("teachers", "fetch", f"{NAME}@{COMMIT}", "--folder", tmp_path / "a", "--json")
    told = json.loads(result.stdout)
    assert (told["path"], told["licence"], told["problem"]) == (str(tmp_path / "a"), "MIT", None)
    assert had_pipe("teachers", "fetch", f"{NAME}@main").exit_code == RecipeError.exit_code


# --- what lies here ------------------------------------------------------------------------------


def test_teachers_of_folders_and_of_the_hub_cache_are_listed(
    checkpoint: Path, hub_cache: Path
) -> None:
    home = hub_cache / "models--someone--dna"
    shutil.copytree(checkpoint, home / "snapshots" / COMMIT)
    demo = REPOSITORY / "pipelines" / "demo" / "teacher"
    first, second, third = find([checkpoint.parent, demo])
    assert (first.name, first.revision, first.model) == (str(checkpoint), None, "NT-v2")
    assert (first.k, first.channels, first.layers, first.context) == (6, 16, 2, 40)
    assert (first.licence, first.token_bases, first.problem) == ("MIT", 6, None)
    assert first.weights_nbytes == (checkpoint / "model.safetensors").stat().st_size
    assert (second.channels, second.licence) == (128, "Apache-2.0")
    assert (third.name, third.revision, third.channels) == (NAME, COMMIT, 16)


def test_what_cannot_be_loaded_is_listed_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("whole", "empty", "foreign", "pointer"):
        shutil.copytree(checkpoint, tmp_path / "all" / name)
    (tmp_path / "all" / "empty" / "model.safetensors").unlink()
    (tmp_path / "all" / "foreign" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "all" / "pointer" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    found = {Path(one.name).name: one.problem for one in find([tmp_path / "all"])}
    assert found["whole"] is None
    assert "no weights" in found["empty"]
    assert "no masked language model" in found["foreign"]
    assert "Git LFS pointer" in found["pointer"]
    listed = had_pipe("teachers", "--in", tmp_path / "all")
    assert listed.exit_code == 0
    assert listed.stdout.count("cannot be loaded: ") == 3


def test_folders_without_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"neither it nor a folder in it holds a config\.json"):
        find([tmp_path])


def test_a_file_in_the_place_of_the_hub_cache_is_told_as_such(hub_cache: Path) -> None:
    hub_cache.write_text("no folder")
    listed = had_pipe("teachers")
    assert listed.exit_code == InputError.exit_code
    told = f"{hub_cache}: expected the folder of the local hub cache, found a file; name a folder"
    assert told in listed.stderr


def test_the_list_as_json_holds_families_and_what_was_found(checkpoint: Path) -> None:
    told = json.loads(had_pipe("teachers", "--in", checkpoint, "--json").stdout)
    assert [family["name"] for family in told["families"]] == [family.name for family in FAMILIES]
    (found,) = told["found"]
    assert (found["channels"], found["k"], found["licence"]) == (16, 6, "MIT")


def test_without_any_checkpoint_the_families_are_listed_alone() -> None:
    listed = had_pipe("teachers")
    assert listed.exit_code == 0
    assert "No checkpoint lies in the local hub cache." in listed.stdout
    assert all(family.name in listed.stdout for family in FAMILIES)
