"""Students: small models, a feature a base; importing this tells transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from had_pipe.students.delta_rule import Kernel, gated_delta_rule, kernel
from had_pipe.students.had import (
    HADConfig,
    HADForMaskedLM,
    HADForSequenceClassification,
    HADModel,
)
from had_pipe.students.saving import export_code, load_student, save_student
from had_pipe.students.spelling import spell
from had_pipe.students.tokenizer import HADTokenizer

__all__ = [
    "HADConfig",
    "HADForMaskedLM",
    "HADForSequenceClassification",
    "HADModel",
    "HADTokenizer",
    "Kernel",
    "export_code",
    "gated_delta_rule",
    "kernel",
    "load_student",
    "save_student",
    "spell",
]

# Not in had.py: its copy beside a student must leave alone what had-pipe has told.
AutoConfig.register("had", HADConfig, exist_ok=True)
AutoModel.register(HADConfig, HADModel, exist_ok=True)
AutoModelForMaskedLM.register(HADConfig, HADForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(HADConfig, HADForSequenceClassification, exist_ok=True)
AutoTokenizer.register(HADConfig, tokenizer_class=HADTokenizer, exist_ok=True)
