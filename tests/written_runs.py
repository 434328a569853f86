"""Run folders of the documented form, with invented figures, and the pages read back."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from had_pipe.features import Explained, Features, KmerStructure, Likeness

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


def a_run(
    folder: Path,
    *,
    seed: int = 0,
    cache: str = "5f",
    align: float = 0.6,
    windows: int = 128,
    floors: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    **train: Any,
) -> Path:
    lines = [
        {**FLOORS, **(floors or {})},
        *(train_row(step) for step in range(10, STEPS + 1, 10)),
        validation_row(55, windows=windows),
        validation_row(STEPS, align=align, windows=windows),
    ]
    write_run(folder, lines)
    run = json.loads((folder / "run.json").read_text("utf-8"))
    run["recipe"]["objective"] |= objective or {}
    run["recipe"]["train"] |= {"seed": seed, "validation_split": "valid", **train}
    run["caches"][0]["id"] = cache * 32
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    return folder


def some_features(**changed: Any) -> Features:
    """Of an invented student: 300 groups of every GC content."""
    rng = np.random.default_rng(0)
    at_P2 = rng.normal(size=(300, 2))
    values: dict[str, Any] = {
        "caches": ("5f" * 32,),
        "windows": 64,
        "groups": 4608,
        "kind": "visible",
        "teacher_P2": at_P2,
        "student_P2": at_P2[::-1] * 0.9,
        "share": Likeness(0.4, 0.5),
        "agreement": 0.87,
        "gc_P": np.arange(300) % 7,
        "gc": Explained(Likeness(0.31, 0.27), Likeness(0.001, 0.002)),
        "soft_level_P": np.arange(300) % 5,
        "soft": Explained(Likeness(0.01, 0.02), Likeness(0.01, 0.01)),
        "features": ("<gene>", "exon", "another", "none"),
        "feature_P": np.arange(300) % 4,
        "feature": Explained(Likeness(0.03, 0.04), Likeness(0.01, 0.01)),
        "kmers": KmerStructure(
            gc_K=np.arange(90) % 7,
            teacher_K2=at_P2[:90],
            student_K2=at_P2[90:180],
            share=Likeness(0.6, 0.7),
            agreement=0.66,
            least=4,
            correlation=0.71,
            correlation_of_bases=0.33,
        ),
    }
    return Features(**{**values, **changed})
