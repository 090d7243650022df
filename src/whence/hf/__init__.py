"""transformers and peft: tasks and batches for their models, entries for their layers, a recorder for their Trainer."""

from whence.hf.batches import completion_batch, pad
from whence.hf.layers import Conv1DKind, ExpertsKind
from whence.hf.recorder import RecorderCallback
from whence.hf.tasks import CausalLM, SequenceClassification, TokenClassification, aligned

__all__ = [
    "CausalLM",
    "Conv1DKind",
    "ExpertsKind",
    "RecorderCallback",
    "SequenceClassification",
    "TokenClassification",
    "aligned",
    "completion_batch",
    "pad",
]
