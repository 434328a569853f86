"""One base, one token: the student's alphabet, and k-mer ids spelt in it.

The ids are those of HyenaDNA and Caduceus, so that their downstream code fits.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from had_pipe.dna.kmers import K

VOCABULARY = (
    "[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N",
)  # fmt: skip
MASK = VOCABULARY.index("[MASK]")
PAD = VOCABULARY.index("[PAD]")
FIRST_BASE = VOCABULARY.index("A")


def spell(kmer_id_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The student's input (B, 6T): the six bases of a k-mer, or six mask symbols."""
    # A k-mer id is its bases as pairs of bits, first base highest.
    shift_6 = torch.arange(2 * (K - 1), -1, -2, device=kmer_id_BT.device)
    base_BT6 = ((kmer_id_BT.long().unsqueeze(-1) >> shift_6) & 3) + FIRST_BASE
    return base_BT6.masked_fill_(mask_BT.unsqueeze(-1), MASK).flatten(1)


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
