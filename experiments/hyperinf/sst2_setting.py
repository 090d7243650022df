"""SST-2 phrases, a small RoBERTa with a base of its own, and LoRA fine-tuning on labels of which some are flipped.

No weights are downloaded. The base (2 layers of width 128, a vocabulary of 4,000 byte-level BPE tokens made from the
phrases) is trained in full on a part of the phrases with true labels. LoRA adapters of the query and value matrices are
then trained on another part; base and head stay. Validation is SST-2's own dev set, test a third part of the phrases.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from benchmarks.problems import folder
from tokenizers.implementations import ByteLevelBPETokenizer
from torch import Tensor, nn

import wherefrom
from wherefrom.hf import SequenceClassification, pad
from wherefrom.tools.evaluate import flip_labels

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
VOCABULARY, LENGTH = 4000, 32
BASE, TRAIN, TEST = 4000, 2000, 2000  # phrases
NOISE, BATCH, EPOCHS, RATE = 0.2, 32, 3, 1e-3
TASK = SequenceClassification()
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What one seed trains on. Batches hold input_ids, attention_mask and labels, examples first.

    Attributes:
        base: the classifier before LoRA.
        train: the phrases for LoRA, NOISE of their labels flipped.
        flipped: (TRAIN,) bool, which.
        validation: SST-2's dev set, whose mean loss is the measurement.
        test: other phrases, for accuracies alone.
        seed: of the choice of phrases, the flips, and all training.
    """

    base: nn.Module
    train: Batch
    flipped: Tensor
    validation: Batch
    test: Batch
    seed: int


def load(seed: int) -> Case:
    """The phrases and the base of a seed; the base is kept in ``out``."""
    phrases, labels = _read("train")
    asked, wanted = _read("dev")
    tokenizer = _tokenizer(phrases)
    everything, validation = _batch(tokenizer, phrases, labels), _batch(tokenizer, asked, wanted)
    order = torch.randperm(len(phrases), generator=torch.Generator().manual_seed(seed))
    first, second, third = order[: BASE + TRAIN + TEST].split([BASE, TRAIN, TEST])
    train = at(everything, second)
    train["labels"], flipped = flip_labels(train["labels"], NOISE, 2, seed)
    base = _base(at(everything, first), seed)
    return Case(base, train, flipped, validation, at(everything, third), seed)


def adapted(case: Case, rank: int) -> nn.Module:
    """The base with fresh LoRA adapters of the query and value matrices: rsLoRA, alpha = 2 rank."""
    torch.manual_seed(case.seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], use_rslora=True)
    return peft.get_peft_model(copy.deepcopy(case.base), config)


def tune(
    model: nn.Module,
    data: Batch,
    seed: int,
    keep: Tensor | None = None,
    epochs: int = EPOCHS,
    rate: float = RATE,
    record: Path | None = None,
) -> nn.Module:
    """AdamW on what requires a gradient, 6% of the steps to warm up, then linearly to 0; without dropout.

    Args:
        model: trained in place.
        data: the examples.
        seed: of their order.
        keep: numbers of those to train on, in the order that all would have had; None: all.
        epochs, rate: how long, and the largest learning rate.
        record: a folder for a `wherefrom.Recorder`, one checkpoint each epoch.
    """
    n, rng = len(data["labels"]), torch.Generator().manual_seed(seed)
    kept = torch.ones(n, dtype=torch.bool)
    if keep is not None:
        kept = torch.zeros(n, dtype=torch.bool).index_fill(0, keep, True)
    each = -(-int(kept.sum()) // BATCH)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    warm = round(0.06 * epochs * each)
    schedule = transformers.get_linear_schedule_with_warmup(optimiser, warm, epochs * each)
    with wherefrom.Recorder(record, model, optimiser, each) if record else nullcontext():
        for _ in range(epochs):
            order = torch.randperm(n, generator=rng)
            for rows in order[kept[order]].split(BATCH):
                optimiser.zero_grad()
                some = at(data, rows)
                TASK.loss(TASK.outputs(model, some), some).mean().backward()
                optimiser.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, data: Batch) -> Tensor:
    """(N, 2)."""
    return torch.cat([TASK.outputs(model, at(data, rows)) for rows in torch.arange(len(data["labels"])).split(250)])


def judged(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Mean loss and accuracy."""
    found = logits(model, data)
    return float(TASK.loss(found, data).mean()), float((found.argmax(1) == data["labels"]).double().mean())


def at(data: Batch, index: Tensor) -> dict[str, Tensor]:
    """Some examples, cut to the longest of them."""
    some = {name: t[index] for name, t in data.items()}
    longest = int(some["attention_mask"].sum(1).max())
    return {name: t[:, :longest] if t.ndim == 2 else t for name, t in some.items()}


def _read(name: str) -> tuple[list[str], list[int]]:
    with open(folder("WHEREFROM_DATA") / f"sst2-{name}.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [r["sentence"].strip() for r in rows], [int(r["label"]) for r in rows]


def _tokenizer(phrases: list[str]) -> Any:
    made = ByteLevelBPETokenizer(add_prefix_space=True)
    made.train_from_iterator(iter(phrases), VOCABULARY, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False)
    return made


def _batch(tokenizer: Any, phrases: list[str], labels: list[int]) -> Batch:
    """All phrases, padded together."""
    found = [[0, *e.ids[: LENGTH - 2], 2] for e in tokenizer.encode_batch(phrases)]
    return pad([{"input_ids": ids, "labels": y} for ids, y in zip(found, labels, strict=True)], token=1)


def _base(data: Batch, seed: int) -> nn.Module:
    """The classifier trained in full on the true labels."""
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH + 2,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.RobertaForSequenceClassification(config)
    file = OUT / f"sst2-base-{seed}.pt"
    if not file.exists():
        OUT.mkdir(exist_ok=True)
        torch.save(tune(model, data, seed, epochs=2, rate=5e-4).state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()
