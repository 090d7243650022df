"""A language model of transformers in place of a target: its weights, its training texts, prompts and completions."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from wherefrom.errors import MissingExtraError, expected
from wherefrom.tools.loading import Target
from wherefrom.tools.report import Example

LONGEST = 512  # tokens of a sequence, unless more are asked for
PASS = 2048  # tokens of a batch


@dataclass(frozen=True, kw_only=True)
class Language:
    """A language model and its training texts.

    Args:
        hf: a language model in place of a target: a folder with its weights and tokenizer, or its name on the hub. If
            it has adapters of peft, these are attributed.
        dataset: its training texts: a .txt (documents between blank lines, or one a line), .jsonl, .json, .csv or
            .parquet file, a folder saved with datasets, or a name on the hub (name:configuration if it has several).
        split: of the dataset.
        column: with the texts or conversations; without it "text", "messages", the pair of "prompt" and "completion",
            or the only one with texts. Conversations go through the tokenizer's chat template, and only what the
            assistant wrote counts in the loss; of prompts and completions only the completions do.
        length: tokens of a training sequence; without it 512, or as many as the model takes if these are fewer.
        pack: let sequences run over the ends of documents, as in pretraining; else each document is cut by itself.
        prompt: what the model is given, a text for each query. Beside conversations it is a user's message, and goes
            through the chat template.
        completion: what it is asked about, a text for each prompt, with the space in front of it.
        rendered: prompts are texts as the model reads them, beside conversations too.
    """

    hf: str | None = None
    dataset: str | None = None
    split: str | None = None
    column: str | None = None
    length: int | None = None
    pack: bool = False
    prompt: tuple[str, ...] | None = None
    completion: tuple[str, ...] | None = None
    rendered: bool = False

    def load_language_model(self) -> Target:
        """Make the target that these options describe.

        Raises:
            MissingExtraError: if transformers, or datasets or peft where they are needed, is not installed.
            InputError: a model, tokenizer or dataset that is not there or does not fit; see `hf.documents`,
                `hf.sequences` and `hf.completion_batch`.
        """
        _needs("transformers", "datasets")
        from wherefrom.hf import CausalLM, Pieces, completion_batch, documents, pad, sequences

        if self.dataset is None:
            raise expected("dataset", "given with --hf", "none", "Give the training texts.")
        prompts, completions = self.prompt or (), self.completion or ()
        if len(prompts) != len(completions):
            raise expected("completions", f"one for each of the {len(prompts)} prompts", len(completions))
        found = documents(self.dataset, self.split, self.column)
        model, tokenizer = loaded(str(self.hf))
        limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        length = min(limit, LONGEST) if self.length is None else self.length
        if length > limit:
            raise expected("length", f"at most the {limit} tokens that the model takes", length)
        cut = sequences(tokenizer, found.texts, length, self.pack)
        train = DataLoader(cut, max(1, PASS // length), collate_fn=pad)  # pyright: ignore[reportArgumentType]
        queries, asked_about = None, list[slice]()
        if prompts:
            chats = not self.rendered and any(_is_chat(document) for document in found.texts)
            texts = [[{"role": "user", "content": prompt}] for prompt in prompts] if chats else prompts
            queries = completion_batch(tokenizer, texts, completions)
            if queries["input_ids"].shape[1] > limit:
                longest = queries["input_ids"].shape[1]
                raise expected(
                    "a prompt and its completion", f"at most the {limit} tokens that the model takes", longest
                )
            places = [row.nonzero()[:, 0].tolist() for row in queries["labels"] >= 0]
            asked_about = [slice(place[0], place[-1] + 1) for place in places]
        _check_vocabulary(model, [*cut.tokens, *([] if queries is None else [queries["input_ids"]])])

        def show(data: Any, number: int) -> Example:
            if data is train:
                document, at = cut.starts[number]
                pieces, caption = Pieces(tokenizer, cut.tokens[number]), f"document {document}"
                more = f"from its token {at:,} on" if at else None
                return Example(caption, text=pieces.text(), tokens=pieces, detail=more)
            ids = data["input_ids"][number][data["attention_mask"][number].bool()]
            pieces = Pieces(tokenizer, ids)
            asked = asked_about[number]
            caption = pieces.text(asked.start, asked.stop).strip()
            return Example(caption, text=pieces.text(), tokens=pieces, marked=asked.start)

        return Target(
            model,
            CausalLM(),
            train,
            queries,
            show=show,
            defaults={"solver": "EKFAC()", "damping": "relative(0.1)", "parameters": selected(model)},
            page={
                "title": "Which training texts are behind the completion?",
                "measurement": "minus the average log-probability of the completion's tokens after the prompt, in nats",
                "notes": [told(found.origin, len(found.texts), cut, length, self.pack)],
            },
        )


def loaded(name: str) -> tuple[Any, Any]:
    """A causal language model in float32, on the GPU if there is one, and its tokenizer.

    Raises:
        InputError: if there is no such model, some of its weights are missing, or there is no tokenizer with it.
        MissingExtraError: if it has adapters and peft is not installed.
    """
    import transformers
    from transformers.utils.peft_utils import find_adapter_config_file

    wanted = "a language model's folder or its name on the hub"
    if Path(name).is_file():
        raise expected("hf", wanted, f"the file {name}")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model: Any
    base = None
    try:
        if find_adapter_config_file(name) is None:
            kind: Any = transformers.AutoModelForCausalLM
            model, loading = kind.from_pretrained(name, output_loading_info=True)
            if missing := sorted(loading["missing_keys"]):
                raise expected(f"the weights in {name}", "those of a causal language model", f"no {missing[0]}")
        else:
            _needs("peft")
            import peft

            model = peft.AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True)
            base = model.active_peft_config.base_model_name_or_path
    except (OSError, ValueError) as error:
        raise expected("hf", wanted, repr(name), f"{error}") from error
    tokenizer, problem = None, ""
    for place in filter(None, (name, base)):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            problem = f"{error}"
        if tokenizer is not None and tokenizer.vocab_size:  # without files an empty one is made
            tokenizer.model_max_length = int(1e30)  # documents are cut after they are tokenized: no warning
            return model.eval().float().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
    advice = f"Put it there with tokenizer.save_pretrained. {problem}".strip()
    raise expected(f"the tokenizer of {name}", "saved with the model", "none", advice)


def selected(model: nn.Module) -> str | None:
    """Which parameters count unless they are chosen: adapters, else the MLPs, else all linear layers but the head.

    Returns:
        a regular expression; None for all that require a gradient.
    """
    from transformers.pytorch_utils import Conv1D

    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(trainable) < sum(1 for _ in model.parameters()):
        return None
    if any("mlp" in name for name in trainable):
        return "mlp"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    kinds = dict.fromkeys(re.escape(name.rpartition(".")[2]) for name in linear)
    return rf"(?:^|\.)({'|'.join(kinds)})\." if kinds else None


def told(origin: str, documents: int, cut: Any, length: int, pack: bool) -> str:
    """What became of the texts, in a sentence or two."""
    tokens, dropped = sum(map(len, cut.tokens)), [f"{reason} ({count:,})" for reason, count in cut.dropped.items()]
    how = "packed into" if pack else "cut one by one into"
    counted = "every token"
    if cut.labels is not None:
        counted = f"the {sum(int((labels >= 0).sum()) for labels in cut.labels):,} tokens of answers alone"
    return (
        f"{documents:,} documents of {origin}, {how} {len(cut):,} sequences of at most {length} tokens, {tokens:,} in "
        f"all. Dropped: {', '.join(dropped) or 'none'}. The training loss is taken to be that of {counted}."
    )


def _is_chat(document: Any) -> bool:
    """Whether a document of a data set goes through the chat template."""
    return isinstance(document, dict) and not isinstance(document.get("prompt", []), str)


def _check_vocabulary(model: Any, tokens: Sequence[torch.Tensor]) -> None:
    known, largest = model.get_input_embeddings().weight.shape[0], max(int(t.max()) for t in tokens)
    if largest >= known:
        raise expected("the tokenizer", f"that of the model, with token numbers below {known}", largest)


def _needs(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(f'--hf needs {package}, which is not installed. Run: pip install "wherefrom[hf]"')
