"""transformers and peft: tasks, texts and batches for models, entries for layers, a recorder of training."""

from wherefrom.hf.batches import completion_batch, pad
from wherefrom.hf.classification import SequenceClassification
from wherefrom.hf.cutting import Sequences, sequences
from wherefrom.hf.layers import Conv1DKind, ExpertsKind
from wherefrom.hf.recorder import RecorderCallback
from wherefrom.hf.tasks import CausalLM, TokenClassification, aligned
from wherefrom.hf.text import Documents, Pieces, documents

__all__ = [
    "CausalLM",
    "Conv1DKind",
    "Documents",
    "ExpertsKind",
    "Pieces",
    "RecorderCallback",
    "SequenceClassification",
    "Sequences",
    "TokenClassification",
    "aligned",
    "completion_batch",
    "documents",
    "pad",
    "sequences",
]
