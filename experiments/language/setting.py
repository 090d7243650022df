"""What the experiments on language share: WikiText-2, a tokenizer, a GPT-2 of a few layers, and its training.

    setting = prepared()                        # tokenizer, N training sequences, queries, held-out sequences
    model = setting.tuned()                     # fine-tuned on all N; `setting.start()` is the model before that
    wherefrom.Influence(...).fit(model, CausalLM(), setting.train).score(setting.queries)

As in ASTRA a model that knows the language is fine-tuned on the N sequences that are attributed. It is trained here, on
articles of neither the training sequences nor the queries. ``WHEREFROM_DATA`` names the folder with the files
``wikitext-2/valid.txt`` and ``test.txt``; what is trained is kept in ``experiments/language/cache``.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.problems import folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

import wherefrom

CACHE = Path(__file__).resolve().parent / "cache"
UNKNOWN = "<unk>"  # what WikiText-2 has in place of rare words


@dataclass(frozen=True)
class Recipe:
    """AdamW without dropout; the rate rises over the first tenth of the steps and falls to zero along a cosine."""

    lr: float
    epochs: int
    batch: int = 16
    weight_decay: float = 0.01

    def rates(self, n: int) -> list[float]:
        """The learning rate of every step on n examples; a last minibatch that is not full is dropped."""
        steps = self.epochs * (n // self.batch)
        rise = max(1, steps // 10)
        falls = ((1 + math.cos(math.pi * max(0, k - rise) / (steps - rise))) / 2 for k in range(steps))
        return [self.lr * min(1.0, (k + 1) / rise) * fall for k, fall in enumerate(falls)]


@dataclass(frozen=True)
class Sizes:
    """The model and the data: N training sequences and Q queries, all of ``length`` tokens."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048
    length: int = 64
    train: int = 1000
    queries: int = 50


PRETRAINING = Recipe(lr=2e-3, epochs=4, weight_decay=0.1)
TUNING = Recipe(lr=5e-4, epochs=3)


@dataclass(frozen=True, eq=False)
class Setting:
    """Batches are dicts as `wherefrom.hf.CausalLM` takes them, of "input_ids" (n, S): every token but the first counts.

    Args:
        sizes: of the model and the data.
        tokenizer: byte-level BPE, trained on both files.
        train: the N sequences that the model is fine-tuned on, evenly spread over valid.txt.
        queries: Q sequences, evenly spread over the last tenth of test.txt.
        heldout: the other sequences of valid.txt.
        pretraining: the first nine tenths of test.txt, (M, S).
    """

    sizes: Sizes
    tokenizer: Tokenizer
    train: dict[str, Tensor]
    queries: dict[str, Tensor]
    heldout: dict[str, Tensor]
    pretraining: Tensor

    def build(self, seed: int = 0) -> nn.Module:
        """A model that was not trained."""
        s = self.sizes
        config = transformers.GPT2Config(
            vocab_size=s.vocabulary,
            n_positions=s.length,
            n_embd=s.width,
            n_layer=s.layers,
            n_head=s.heads,
            activation_function="gelu_pytorch_tanh",  # as GPT-2, in one operation
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return transformers.GPT2LMHeadModel(config).eval()

    def start(self, recipe: Recipe = PRETRAINING, seed: int = 0) -> nn.Module:
        """The model that fine-tuning starts from; trained once and kept."""
        shape = f"{self.sizes.width} {self.sizes.layers} {self.sizes.heads} {recipe} {seed}"
        key = hashlib.blake2b(self.pretraining.numpy().tobytes() + shape.encode(), digest_size=6).hexdigest()
        model, file = self.build(seed), CACHE / f"start-{key}.pt"
        if not file.exists():
            train(model, self.pretraining, recipe, seed)
            CACHE.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), part := file.with_suffix(f".{os.getpid()}.tmp"))
            part.replace(file)
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return model

    def tuned(
        self,
        index: Sequence[int] | Tensor | None = None,
        recipe: Recipe = TUNING,
        seed: int = 0,
        record: Path | None = None,
        every: int = 0,
    ) -> nn.Module:
        """The model fine-tuned on training sequences of these numbers, or all; the seed is that of their order."""
        ids = self.train["input_ids"]
        return train(self.start(), ids if index is None else ids[torch.as_tensor(index)], recipe, seed, record, every)

    def text(self, ids: Tensor) -> str:
        """What one sequence says."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def prepared(sizes: Sizes | None = None) -> Setting:
    """The data, in the sizes that were asked for."""
    sizes = sizes or Sizes()
    home = folder("WHEREFROM_DATA") / "wikitext-2"
    valid, test = ((home / f"{name}.txt").read_text(encoding="utf-8") for name in ("valid", "test"))
    tokenizer = _tokenizer([valid, test], sizes.vocabulary)
    valid, test = (_sequences(tokenizer, text, sizes.length) for text in (valid, test))
    kept = len(test) * 9 // 10
    chosen = torch.linspace(0, len(valid) - 1, sizes.train).long()
    others = torch.ones(len(valid), dtype=torch.bool).index_fill(0, chosen, False)
    asked = torch.linspace(kept, len(test) - 1, sizes.queries).long()
    data = ({"input_ids": t} for t in (valid[chosen], test[asked], valid[others]))
    return Setting(sizes, tokenizer, *data, test[:kept])


def train(
    model: nn.Module, ids: Tensor, recipe: Recipe, seed: int = 0, record: Path | None = None, every: int = 0
) -> nn.Module:
    """Train a model in place on sequences (n, S), in bfloat16 where the processor multiplies it; weights are float32.

    Args:
        model: of transformers, with its head.
        ids: token numbers; the loss of a step is the mean over the tokens of its minibatch.
        recipe: the optimiser.
        seed: of the order.
        record: where a `wherefrom.Recorder` keeps checkpoints, ``every`` so many steps, and the order.
        every: steps between checkpoints.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, foreach=True)
    recorder = wherefrom.Recorder(record, model, optimiser, every) if record else None
    rng = torch.Generator().manual_seed(seed)
    rates = iter(recipe.rates(len(ids)))
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(ids), generator=rng)
        for rows in order[: len(ids) // recipe.batch * recipe.batch].split(recipe.batch):
            for group in optimiser.param_groups:
                group["lr"] = next(rates)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(*_predictions(model, ids[rows]))
            optimiser.zero_grad()
            loss.backward()
            if recorder:
                recorder.saw(rows)
            optimiser.step()
    if recorder:
        recorder.close()
    return model.eval()


@torch.no_grad()
def losses(model: nn.Module, batch: dict[str, Tensor], size: int = 100) -> Tensor:
    """Mean loss per token of each sequence in nats, (n,): the measurement of `wherefrom.hf.CausalLM`, in float32."""
    found = []
    for ids in batch["input_ids"].split(size):
        logits, labels = _predictions(model, ids)
        found.append(nn.functional.cross_entropy(logits, labels, reduction="none").view(len(ids), -1).mean(1))
    return torch.cat(found)


def _predictions(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n (S - 1), V) and the tokens that they predict."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1)


def _tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """Byte-level BPE, trained once and kept."""
    key = hashlib.blake2b("".join(texts).encode(), digest_size=6).hexdigest()
    file = CACHE / f"tokenizer-{size}-{key}.json"
    if not file.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|endoftext|>", UNKNOWN]
        tokenizer.train_from_iterator(
            [line for text in texts for line in text.splitlines(True)],
            trainers.BpeTrainer(
                vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
            ),
        )
        CACHE.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(file))
    return Tokenizer.from_file(str(file))


def _sequences(tokenizer: Tokenizer, text: str, length: int) -> Tensor:
    """The text in pieces of ``length`` tokens, in order; the rest is dropped."""
    ids = torch.tensor(tokenizer.encode(text).ids)
    return ids[: len(ids) // length * length].view(-1, length)


def main() -> None:
    """Train what is missing in the cache, and say how good the models are."""
    torch.set_num_threads(1)
    setting = prepared()
    print(asdict(setting.sizes), f"{len(setting.pretraining)} sequences for pretraining")
    for name, model in (("start", setting.start()), ("tuned", setting.tuned())):
        print(name, *(f"{k} {float(losses(model, getattr(setting, k)).mean()):.3f}" for k in ("heldout", "train")))


if __name__ == "__main__":
    main()
