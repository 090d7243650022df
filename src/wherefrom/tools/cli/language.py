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
        hf: a language model in place of MODULE:FUNCTION: a folder with its weights and tokenizer, or its name on the
            Hugging Face hub. Where it has adapters of peft, scores are taken through their parameters alone.
        dataset: its training texts: a .txt (documents between blank lines, or one a line), .jsonl, .json, .csv or
            .parquet file, a folder saved with datasets, or a name on the hub (name:configuration if it has several).
        split: which split of the dataset, such as train.
        column: the column with the texts or conversations; without it "text", "messages", the pair of "prompt" and
            "completion", or the only one with texts. Conversations go through the tokenizer's chat template, and only
            what the assistant wrote counts in the loss; of prompts and completions only the completions do.
        length: tokens of a training sequence; without it 512, or as many as the model takes if these are fewer.
        pack: let sequences run over the ends of documents, as in pretraining; else each document is cut by itself.
        prompt: what the model is given, a text for each query. Where the training texts are conversations, it is taken
            for a user's message and goes through the chat template.
        completion: the answer that is to be explained, one for each prompt, with the space that comes before it.
        rendered: put no chat template around the prompts, even where the training texts are conversations.
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
        _require("transformers", "datasets")
        from wherefrom.hf import CausalLM, Pieces, documents, pad, sequences

        if self.dataset is None:
            raise expected("dataset", "given with --hf", "none", "Give the training texts.")
        prompts, completions = self.prompt or (), self.completion or ()
        if len(prompts) != len(completions):
            raise expected("completions", f"one for each of the {len(prompts)} prompts", len(completions))

        texts = documents(self.dataset, self.split, self.column)
        model, tokenizer = load_model(str(self.hf))
        limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        length = min(limit, LONGEST) if self.length is None else self.length
        if length > limit:
            raise expected("length", f"at most the {limit} tokens that the model takes", length)
        cut = sequences(tokenizer, texts.texts, length, self.pack)
        train = DataLoader(cut, max(1, PASS // length), collate_fn=pad)  # pyright: ignore[reportArgumentType]

        queries, answers = None, list[slice]()
        if prompts:
            is_chat = not self.rendered and any(_is_chat(document) for document in texts.texts)
            queries = _tokenize_queries(tokenizer, prompts, completions, is_chat, limit)
            answers = [_find_answer(labels) for labels in queries["labels"]]
        _check_vocabulary(model, [*cut.tokens, *([] if queries is None else [queries["input_ids"]])])

        def show(data: Any, number: int) -> Example:
            if data is train:
                document, start = cut.starts[number]
                pieces = Pieces(tokenizer, cut.tokens[number])
                detail = f"from its token {start:,} on" if start else None
                return Example(f"document {document}", text=pieces.text(), tokens=pieces, detail=detail)

            tokens = data["input_ids"][number][data["attention_mask"][number].bool()]
            pieces, answer = Pieces(tokenizer, tokens), answers[number]
            caption = pieces.text(answer.start, answer.stop).strip()
            return Example(caption, text=pieces.text(), tokens=pieces, marked=answer.start)

        note = describe_texts(texts.origin, len(texts.texts), cut, length, self.pack)
        return Target(
            model,
            CausalLM(),
            train,
            queries,
            show=show,
            defaults={"solver": "EKFAC()", "damping": "relative(0.1)", "parameters": choose_parameters(model)},
            page={
                "title": "Which training texts are behind the completion?",
                "measurement": "minus the average log-probability of the completion's tokens after the prompt, in nats",
                "notes": [note],
            },
        )


def load_model(name: str) -> tuple[Any, Any]:
    """Load a causal language model in float32, on the GPU if there is one, and its tokenizer.

    Args:
        name: of a folder, or of the model on the hub.

    Raises:
        InputError: if there is no such model, some of its weights are missing, or there is no tokenizer with it.
        MissingExtraError: if it has adapters and peft is not installed.
    """
    import transformers

    wanted = "a language model's folder or its name on the hub"
    if Path(name).is_file():
        raise expected("hf", wanted, f"the file {name}")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model, base = _load_weights(name)
    except (OSError, ValueError) as error:
        raise expected("hf", wanted, repr(name), f"{error}") from error
    # Adapters are often saved without the tokenizer of the model that they adapt.
    tokenizer = _load_tokenizer(name, [place for place in (name, base) if place])
    return model.eval().float().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _load_weights(name: str) -> tuple[Any, str | None]:
    """Load a model, and for adapters the name of the model that they adapt."""
    import transformers
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name) is not None:
        _require("peft")
        import peft

        model: Any = peft.AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True)
        return model, model.active_peft_config.base_model_name_or_path

    kind: Any = transformers.AutoModelForCausalLM
    model, loading = kind.from_pretrained(name, output_loading_info=True)
    missing = sorted(loading["missing_keys"])
    # transformers would fill these with random numbers.
    if missing:
        raise expected(f"the weights in {name}", "those of a causal language model", f"no {missing[0]}")
    return model, None


def _load_tokenizer(name: str, places: Sequence[str]) -> Any:
    """Load the tokenizer from the first place that has one.

    Raises:
        InputError: if none has.
    """
    import transformers

    problem = ""
    for place in places:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            problem = f"{error}"
            continue
        # Where there are no files, transformers makes an empty one.
        if tokenizer.vocab_size:
            # Documents are cut after they are tokenized: no warning that they are long.
            tokenizer.model_max_length = int(1e30)
            return tokenizer
    advice = f"Put it there with tokenizer.save_pretrained. {problem}".strip()
    raise expected(f"the tokenizer of {name}", "saved with the model", "none", advice)


def choose_parameters(model: nn.Module) -> str | None:
    """Choose which parameters count unless it is said: adapters, else the MLPs, else all linear layers but the head.

    Returns:
        a regular expression; None for all that require a gradient.
    """
    from transformers.pytorch_utils import Conv1D

    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    has_frozen = len(trainable) < sum(1 for _ in model.parameters())
    if has_frozen:
        return None
    if any("mlp" in name for name in trainable):
        return "mlp"

    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    last_names: dict[str, None] = {}  # in their order
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            last_names[re.escape(name.rpartition(".")[2])] = None
    return rf"(?:^|\.)({'|'.join(last_names)})\." if last_names else None


def describe_texts(origin: str, documents: int, cut: Any, length: int, pack: bool) -> str:
    """Say in a sentence or two what became of the texts.

    Args:
        origin: where they come from.
        documents: how many there are.
        cut: the sequences that they were cut into.
        length: of a sequence, at most.
        pack: whether sequences run over the ends of documents.
    """
    tokens = sum(map(len, cut.tokens))
    how = "packed into" if pack else "cut one by one into"
    dropped = ", ".join(f"{reason} ({count:,})" for reason, count in cut.dropped.items()) or "none"
    counted = "every token"
    if cut.labels is not None:
        answers = sum(int((labels >= 0).sum()) for labels in cut.labels)
        counted = f"the {answers:,} tokens of answers alone"
    return (
        f"{documents:,} documents of {origin}, {how} {len(cut):,} sequences of at most {length} tokens, {tokens:,} in "
        f"all. Dropped: {dropped}. The training loss is taken to be that of {counted}."
    )


def _tokenize_queries(
    tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], is_chat: bool, limit: int
) -> dict[str, torch.Tensor]:
    """Return a batch of prompts and completions, of which the completions have labels.

    Args:
        tokenizer: the model's.
        prompts: texts as the model reads them, or what a user says.
        completions: texts.
        is_chat: whether prompts go through the tokenizer's chat template.
        limit: tokens that the model takes.

    Raises:
        InputError: if a prompt and its completion are longer than that.
    """
    from wherefrom.hf import completion_batch

    texts: Any = prompts
    if is_chat:
        texts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    queries = completion_batch(tokenizer, texts, completions)
    longest = queries["input_ids"].shape[1]
    if longest > limit:
        raise expected("a prompt and its completion", f"at most the {limit} tokens that the model takes", longest)
    return queries


def _find_answer(labels: torch.Tensor) -> slice:
    """Return where the labelled tokens of a query are."""
    places = (labels >= 0).nonzero()[:, 0].tolist()
    return slice(places[0], places[-1] + 1)


def _is_chat(document: Any) -> bool:
    """Tell whether a document of a data set goes through the chat template: a dict, unless its prompt is a text."""
    return isinstance(document, dict) and not isinstance(document.get("prompt", []), str)


def _check_vocabulary(model: Any, tokens: Sequence[torch.Tensor]) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(int(numbers.max()) for numbers in tokens)
    if largest >= known:
        raise expected("the tokenizer", f"that of the model, with token numbers below {known}", largest)


def _require(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(f'--hf needs {package}, which is not installed. Run: pip install "wherefrom[hf]"')
