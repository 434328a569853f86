"""One base, one token: the student's alphabet.

The ids are those of HyenaDNA and Caduceus, so that their downstream code fits.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = (
    "[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N",
)  # fmt: skip
MASK = VOCABULARY.index("[MASK]")
PAD = VOCABULARY.index("[PAD]")
FIRST_BASE = VOCABULARY.index("A")


class HADTokenizer(PreTrainedTokenizerFast):
    """Letters to ids, lower case as upper case; other letters are [UNK]; nothing is added."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        if "tokenizer_object" not in settings and "tokenizer_file" not in settings:
            settings["tokenizer_object"] = _alphabet()
        settings.setdefault("unk_token", "[UNK]")
        settings.setdefault("pad_token", "[PAD]")
        settings.setdefault("mask_token", "[MASK]")
        settings.setdefault("padding_side", "left")
        settings.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**settings)  # type: ignore[no-untyped-call]


def _alphabet() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(letter.lower(), letter) for letter in "ACGTN"]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
