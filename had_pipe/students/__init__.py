"""Students: small models, a feature a base; importing this tells transformers' Auto classes."""

from had_pipe.students.delta_rule import Kernel, gated_delta_rule, kernel
from had_pipe.students.had import HADConfig, HADForMaskedLM, HADModel, save_student
from had_pipe.students.spelling import spell
from had_pipe.students.tokenizer import HADTokenizer

__all__ = [
    "HADConfig",
    "HADForMaskedLM",
    "HADModel",
    "HADTokenizer",
    "Kernel",
    "gated_delta_rule",
    "kernel",
    "save_student",
    "spell",
]
