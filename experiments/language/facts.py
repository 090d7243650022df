"""Planted facts: are the sequences that state a made-up fact found from a completion that states it in other words?

    python -m experiments.language.facts --seeds 0 1 2          # measures what is not there yet

Thirty of 4,800 training sequences state ten facts, three each; fifty only share words with the queries (`facts_text`);
720 state other facts in the same words (`facts_lessons`). A query is a prompt in a fourth wording with the answer, and
each method ranks all sequences for it. All scores are kept under ``out/facts``, so that a killed run goes on where it
stopped; `facts_tables` prints and draws what they say.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

import wherefrom
from experiments.language import setting
from experiments.language.facts_planted import Planted, plant
from experiments.language.facts_text import FACTS
from wherefrom.hf import CausalLM, completion_batch, pad
from wherefrom.methods.similarity import similarity

OUT = Path(__file__).resolve().parent / "out" / "facts"
SIZES = setting.Sizes(width=256, vocabulary=2048, length=64, train=4000, queries=1)
RECIPE = setting.Recipe(lr=1e-3, epochs=8, weight_decay=0.1)
STAGES = 2  # each by the recipe, so that a killed training loses one of them
DROPOUT = 0.1
MLP = {"parameters": "mlp", "batch_size": 8, "progress": False}
RELATIVE, PER_EXAMPLE = wherefrom.Damping.relative(0.1), wherefrom.Damping.per_example()  # the former of Grosse et al.
FORMS = [[*fact.statements, f"{fact.prompt} {fact.answer} ."] for fact in FACTS]  # four sentences of each fact


@dataclass(frozen=True)
class Run:
    """A model trained with the facts, and what methods make of it.

    Args:
        seed: of the training; the data are the same for all.
    """

    seed: int

    @property
    def folder(self) -> Path:
        """Where everything of this run lies."""
        return OUT / str(self.seed)

    @cached_property
    def setting(self) -> setting.Setting:
        """Ordinary sequences, and the tokenizer."""
        return setting.prepared(SIZES)

    def encode(self, text: str) -> list[int]:
        """Token numbers of a text."""
        return self.setting.tokenizer.encode(text).ids

    @cached_property
    def planted(self) -> Planted:
        """The training sequences."""
        return plant(self.encode, self.setting.train["input_ids"], self.setting.pretraining)

    @property
    def train(self) -> dict[str, Tensor]:
        """The training sequences as a batch."""
        return {"input_ids": self.planted.ids}

    @cached_property
    def stages(self) -> list[Path]:
        """The model's weights after each stage of training; trained from where they are not there yet."""
        files = [self.folder / f"stage-{k}.pt" for k in range(STAGES)]
        self.folder.mkdir(parents=True, exist_ok=True)
        for k, file in enumerate(files):
            if not file.exists():
                model = self.setting.build(self.seed)
                for module in model.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = DROPOUT
                if k:
                    model.load_state_dict(torch.load(files[k - 1], weights_only=True))
                setting.train(model, self.planted.ids, RECIPE, self.seed + 1000 * k)
                torch.save(model.state_dict(), part := file.with_suffix(".tmp"))
                part.replace(file)
        return files

    @cached_property
    def model(self) -> nn.Module:
        """The trained model."""
        model = self.setting.build()
        model.load_state_dict(torch.load(self.stages[-1], weights_only=True))
        return model

    def completions(self, prompts: list[str], answers: list[str]) -> dict[str, Tensor]:
        """Queries: answers after prompts."""
        return completion_batch(self.encode, prompts, [f" {answer}" for answer in answers])

    @property
    def queries(self) -> dict[str, Tensor]:
        """A prompt with its answer for each fact."""
        return self.completions([fact.prompt for fact in FACTS], [fact.answer for fact in FACTS])

    @property
    def sentences(self) -> dict[str, Tensor]:
        """Four sentences of each fact by themselves, (40, S)."""
        return pad([{"input_ids": self.encode(" " + s)} for forms in FORMS for s in forms])

    def losses(self) -> Tensor:
        """Minus the mean log-probability of each of the ten answers after each prompt, (10, 10), answers last."""
        task, answers = CausalLM(), [fact.answer for fact in FACTS]
        batches = [self.completions([fact.prompt] * len(answers), answers) for fact in FACTS]
        with torch.no_grad():
            return torch.stack([task.measurement(task.outputs(self.model, batch), batch) for batch in batches])

    @cached_property
    def ekfac(self) -> wherefrom.FittedInfluence:
        """EKFAC of the MLP layers, fitted once."""
        influence, file = wherefrom.Influence(wherefrom.EKFAC(), RELATIVE, **MLP), self.folder / "fit.safetensors"
        if file.exists():
            return influence.load(file, self.model, CausalLM(), self.train)
        fitted = influence.fit(self.model, CausalLM(), self.train)
        fitted.save(file)
        return fitted

    @cached_property
    def plain(self) -> wherefrom.FittedInfluence:
        """Gradient dot products."""
        return wherefrom.Influence(wherefrom.Identity(), 1.0, **MLP).fit(self.model, CausalLM(), self.train)

    def score(self, influence: wherefrom.FittedInfluence) -> wherefrom.Scores:
        """Scores of the queries, with self-influence."""
        return influence.score(self.queries, certify=False, self_influence=True)

    def tracin(self) -> wherefrom.Scores:
        """Gradient dot products, the mean over the ends of the stages."""
        kept = [(k + 1, torch.load(file, weights_only=True)) for k, file in enumerate(self.stages)]
        method = wherefrom.TracIn(wherefrom.Trajectory.of_sgd(kept, RECIPE.lr, STAGES), rates=False, **MLP)
        return method.fit(self.model, CausalLM(), self.train).score(self.queries)

    def astra(self) -> wherefrom.Scores:
        """ASTRA with table 3's step and batch for WikiText-2, and a fifth of its 300 steps."""
        solver = wherefrom.ASTRA(step=0.011, batch=16, steps=60, decay=0.9, decay_every=20)
        influence = wherefrom.Influence(solver, PER_EXAMPLE, **MLP).fit(self.model, CausalLM(), self.train)
        return influence.score(self.queries, certify=False, folder=self.folder / "astra")

    def lexical(self, method: wherefrom.TFIDF | wherefrom.BM25, words: bool) -> wherefrom.Scores:
        """By the words that a query, prompt and answer, shares with a sequence; or by the tokens."""
        asked, ids = [f"{fact.prompt} {fact.answer}" for fact in FACTS], list(self.planted.ids)
        if not words:
            return method.fit(ids).score([self.encode(text) for text in asked])
        return method.fit([self.setting.text(row) for row in ids]).score(asked)

    def parts(self) -> dict[str, Tensor]:
        """EKFAC scores of the stating sequences on the queries, by "token" (10, 30, T) and by block (10, 30), kept."""
        file, stated = self.folder / "parts.pt", self.planted.stated.flatten().tolist()
        if not file.exists():
            solution = self.ekfac.solve(self.queries, certify=False)
            torch.save(solution.by_block(stated) | {"token": solution.by_token(stated)}, file)
        return torch.load(file, weights_only=True)

    def scores(self, name: str) -> wherefrom.Scores:
        """What one of the `METHODS` finds, kept."""
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            _ = self.model  # so that its training does not count
            start = time.process_time()
            found = METHODS[name](self)
            print(f"seed {self.seed}, {name}: {time.process_time() - start:.0f} CPU seconds", flush=True)
            found.save(file)
        return wherefrom.Scores.load(file)


METHODS: dict[str, Callable[[Run], wherefrom.Scores]] = {
    "tfidf": lambda run: run.lexical(wherefrom.TFIDF(), words=True),
    "tfidf tokens": lambda run: run.lexical(wherefrom.TFIDF(), words=False),
    "bm25": lambda run: run.lexical(wherefrom.BM25(), words=True),
    "bm25 tokens": lambda run: run.lexical(wherefrom.BM25(), words=False),
    "gradients": lambda run: run.score(run.plain),
    "ekfac": lambda run: run.score(run.ekfac),
    "ekfac per example": lambda run: run.score(run.ekfac.at(wherefrom.Damping.per_example())),
    "tracin": Run.tracin,
    "astra": Run.astra,
    "similarity": lambda run: similarity(run.ekfac, run.sentences, certify=False),
    "similarity of gradients": lambda run: similarity(run.plain, run.sentences, certify=False),
}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        run = Run(seed)
        for name in args.methods:
            run.scores(name)


if __name__ == "__main__":
    main()
