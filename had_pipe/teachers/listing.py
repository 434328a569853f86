"""Which teachers there are: families known to work, and checkpoints that lie on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from had_pipe.dna.kmers import K
from had_pipe.errors import HadPipeError, InputError
from had_pipe.teachers.folder import CONFIG_FILE, licence, read_config_file, weight_files


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints of one architecture, and what shows that they are computed rightly."""

    name: str
    channels: str
    token_bases: str
    context: str
    licence: str
    examples: Sequence[str]
    shown_by: str


FAMILIES = (
    Family(
        name="Nucleotide Transformer v2",
        channels="512 (50m, 100m), 768 (250m), 1,024 (500m)",
        token_bases="6",
        context="windows of at most 12,282 bases",
        licence="CC-BY-NC-SA-4.0",
        examples=[
            f"InstaDeepAI/nucleotide-transformer-v2-{size}-multi-species"
            for size in ("50m", "100m", "250m", "500m")
        ],
        shown_by="every layer and logit of random weights equals the reference implementation's; "
        "the published weights were not at hand",
    ),
    Family(
        name="masked language models of transformers' own classes",
        channels="hidden_size of config.json",
        token_bases="6, 3, 2 or 1",
        context="as its positions allow",
        licence="the model card's",
        examples=[],
        shown_by="ESM, BERT, RoFormer and ModernBERT of random weights equal transformers' own "
        "forward; others of these classes are checked when loaded",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint that lies here."""

    name: str
    """As [teacher] name takes it."""
    revision: str | None
    path: Path
    model: str | None
    """The class; None, as what follows, where it cannot be loaded."""
    channels: int | None
    layers: int | None
    token_bases: int | None
    context: int | None
    """Most 6-mers of a window."""
    weights_nbytes: int | None
    licence: str
    problem: str | None
    """Why it cannot be loaded."""

    @property
    def k(self) -> int:
        return K


def find(folders: Sequence[Path] = ()) -> list[Found]:
    """Checkpoints in folders, each one itself or a folder of such, and in the local hub cache.

    No weight is read, no host contacted. Raises InputError where a folder holds none.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; name one that holds checkpoints.")
        inside = (
            [folder] if _is_checkpoint(folder) else sorted(filter(_is_checkpoint, folder.iterdir()))
        )
        if not inside:
            raise InputError(
                f"{folder}: neither it nor a folder in it holds a {CONFIG_FILE}; name one that "
                "holds checkpoints."
            )
        found += [look(str(path.resolve()), None, path) for path in inside]
    return [*found, *(look(*place) for place in _in_hub_cache())]


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _in_hub_cache() -> Iterator[tuple[str, str, Path]]:
    from huggingface_hub import constants, errors, scan_cache_dir

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except errors.CacheNotFound:
        return
    except ValueError as error:
        raise InputError(
            f"{constants.HF_HUB_CACHE}: expected the folder of the local hub cache, found a file; "
            "name a folder in HF_HUB_CACHE or HF_HOME, or move the file away."
        ) from error
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model":
            for revision in sorted(repo.revisions, key=lambda one: one.commit_hash):
                if _is_checkpoint(revision.snapshot_path):
                    yield repo.repo_id, revision.commit_hash, revision.snapshot_path


def look(name: str, revision: str | None, path: Path) -> Found:
    """What a folder says of itself, or why it cannot be loaded."""
    try:
        said = licence(name, path)
        nbytes = sum(file.stat().st_size for file in weight_files(path))
        model, channels, layers, token_bases, context = _sizes(path)
    except HadPipeError as error:
        return Found(
            name=name,
            revision=revision,
            path=path,
            model=None,
            channels=None,
            layers=None,
            token_bases=None,
            context=None,
            weights_nbytes=None,
            licence="unknown",
            problem=str(error),
        )
    return Found(
        name=name,
        revision=revision,
        path=path,
        model=model,
        channels=channels,
        layers=layers,
        token_bases=token_bases,
        context=context,
        weights_nbytes=nbytes,
        licence=said,
        problem=None,
    )


def _sizes(path: Path) -> tuple[str, int, int, int, int]:
    """Class, channels, layers, bases of a token and context, by the folder's own word."""
    from had_pipe.teachers.ntv2_checkpoint import is_ntv2, read_config

    if is_ntv2(read_config_file(path)):
        config = read_config(path)
        return "NT-v2", config.hidden_size, config.num_hidden_layers, K, config.context
    from had_pipe.teachers.masked_lm import read_shape

    shape = read_shape(path)
    name = shape.model_class.__name__
    return name, shape.channels, shape.blocks, shape.vocabulary.bases, shape.context
