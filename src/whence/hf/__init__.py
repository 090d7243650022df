"""transformers and peft: tasks, texts and batches for models, entries for layers, a recorder of training."""

from whence.hf.batches import completion_batch, pad
from whence.hf.classification import SequenceClassification
from whence.hf.cutting import Sequences, sequences
from whence.hf.layers import Conv1DKind, ExpertsKind
from whence.hf.recorder import RecorderCallback
from whence.hf.tasks import CausalLM, TokenClassification, aligned
from whence.hf.text import Documents, Pieces, documents

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
