"""Language: which sentences of Python's own manual are behind what a small GPT-2 says, token by token.

The sentences are those of ``help()``'s topics, which come with every Python. Run it with
``python docs/examples/language.py``; it takes half a minute. It trains a model, saves it with its tokenizer and its
texts in a folder, and leaves the rest to ``wherefrom explain --hf``, whose report it writes there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from wherefrom.hf import pad, sequences
from wherefrom.tools.cli import main as cli

NAMES = (
    "raise",
    "try",
    "import",
    "lambda",
    "del",
    "assert",
    "pass",
    "break",
    "continue",
    "yield",
    "global",
    "with",
    "while",
)
ASKED = {
    "An assert statement is a convenient way to": " insert debugging",
    "A lambda expression yields": " a function object",
}
LENGTH = 64  # tokens of a sequence


def sentences() -> list[str]:
    """Sentences of six words or more."""
    prose = " ".join(re.sub(r"\n[=*~^-]{3,}\n", ".\n", topics[name]) for name in NAMES)
    prose = re.sub(r'["*“”]', "", re.sub(r"\s+", " ", prose))
    return [s.strip() for s in re.split(r"(?<=[.:])\s", prose) if len(re.findall(r"[a-z]+", s)) >= 6]


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=[end], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end)


def trained(found: PreTrainedTokenizerFast, texts: list[str]) -> GPT2LMHeadModel:
    """A GPT-2 of two layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(found), "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    train = sequences(found, texts, LENGTH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(15):
        for some in torch.randperm(len(train)).split(16):
            optimiser.zero_grad()
            model(**pad([train[i] for i in some.tolist()])).loss.backward()
            optimiser.step()
    return model.eval()


def main(out: str = "language") -> int:
    torch.set_num_threads(1)
    texts, folder = sentences(), Path(out)
    found = tokenizer(texts)
    trained(found, texts).save_pretrained(folder / "model")
    found.save_pretrained(folder / "model")
    (folder / "sentences.txt").write_text("\n".join(texts), encoding="utf-8")
    options = ["--hf", str(folder / "model"), "--dataset", str(folder / "sentences.txt"), "--out", out]
    return cli.main(["explain", *options, "--prompt", *ASKED, "--completion", *ASKED.values()])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
