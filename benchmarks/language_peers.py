"""EKFAC of kronfluence 1.0.1, dattri-llm 0.1.0 and bergson 2.5.1 on the language model of `benchmarks.language_models`.

All get the weights and biases of the MLP layers, true labels, the summed loss, and damping 0.1 x the mean corrected
eigenvalue of each layer; batch sizes are those of 2 to 32 that were fastest for each. Each function fits and scores in
phases ``fit`` and ``scores``, or ``fit`` within ``all``, and returns (Q, N) scores with our sign, without 1/N.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import phase
from benchmarks.language_models import LENGTH, QUERIES, model, sequences, tokenizer


def _summed(net: Any, x: Any) -> Any:
    """The loss of a batch of sequences, summed over the predicted tokens."""
    import torch.nn.functional as F

    logits = net(input_ids=x, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum")


def kronfluence(count: int, batch_size: int = 32) -> dict[str, Any]:
    """Its MLP layers become nn.Linear, as in its own examples; the last position, without label, is left out."""
    import logging

    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset
    from transformers.pytorch_utils import Conv1D

    net = model()
    tracked = []
    for name, module in list(net.named_modules()):
        if ".mlp." in name and isinstance(module, Conv1D):
            linear = torch.nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            net.set_submodule(name, linear)
            tracked.append(name)

    class PeerTask(Task):
        def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
            if sample:
                raise NotImplementedError
            return _summed(model, batch[0])

        def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
            return _summed(model, batch[0])

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

        def get_attention_mask(self, batch: Any) -> torch.Tensor:
            mask = torch.ones_like(batch[0])
            mask[:, -1] = 0
            return mask

    train, queries = TensorDataset(sequences("valid", count)), TensorDataset(sequences("test", QUERIES))
    task = PeerTask()
    net = prepare_model(net, task)
    factor_args = FactorArguments(
        strategy="ekfac",
        use_empirical_fisher=True,
        use_iterative_lambda_aggregation=True,
        covariance_max_examples=None,
        lambda_max_examples=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("run", net, task, cpu=True, disable_tqdm=True, output_dir=folder, log_level=logging.ERROR)
        with phase("fit"):
            analyzer.fit_all_factors("ekfac", train, factor_args=factor_args, per_device_batch_size=batch_size)
        with phase("scores"):
            analyzer.compute_pairwise_scores(
                scores_name="scores",
                factors_name="ekfac",
                query_dataset=queries,
                train_dataset=train,
                per_device_query_batch_size=QUERIES,
                per_device_train_batch_size=batch_size,
                score_args=ScoreArguments(damping_factor=None),
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
    return {"scores": found.astype(np.float32)}


def dattri_llm(count: int, batch_size: int = 8) -> dict[str, Any]:
    """Gradients are streamed: three passes over the model, as its documentation advises where they do not fit."""
    import torch
    from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor, HookManagerConfig

    class Timed(EKFACAttributor):
        def prepare_scoring(self, *sources: Any) -> None:
            with phase("fit"):
                super().prepare_scoring(*sources)

    class Sequences(torch.utils.data.Dataset):
        def __init__(self, ids: torch.Tensor):
            self.ids = ids

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.ids[i], "labels": self.ids[i]}

    net = model().requires_grad_(False)
    for layer in net.transformer.h:
        layer.mlp.requires_grad_()
    with tempfile.TemporaryDirectory() as folder:
        args = AttributionArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=QUERIES,
            use_cpu=True,
            max_grad_norm=None,
        )
        task = AttributionTask(lambda net, batch: _summed(net, batch["input_ids"]), net)
        attributor = Timed(args, task=task)
        train, queries = Sequences(sequences("valid", count)), Sequences(sequences("test", QUERIES))
        with phase("all"):
            scores = attributor.attribute(
                train,
                queries,
                hook_config=HookManagerConfig(linear_io=[r"\.mlp\.c_"]),
                damping=0.1,
                relative_damping=True,
            )
    return {"scores": scores.scores.T.float().numpy()}


def bergson(count: int, batch_size: int = 4) -> dict[str, Any]:
    """Its pipeline of four steps, called one by one; a batch holds as many tokens as it accepts."""
    import torch
    import transformers
    from bergson.config.config import (
        DataConfig,
        HessianConfig,
        HessianPipelineConfig,
        IndexConfig,
        InversionConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.data import load_scores
    from bergson.hessians import pipeline
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder, _timed(pipeline, "approximate_hessians"):
        where = Path(folder)
        net = model()
        net.save_pretrained(where / "model")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer(), model_max_length=net.config.n_positions
        ).save_pretrained(where / "model")
        for name, length in (("valid", count), ("test", QUERIES)):
            ids = sequences(name, length).tolist()
            Dataset.from_dict({"input_ids": ids, "labels": ids}).save_to_disk(where / name)
        del net, ids
        index = IndexConfig(
            run_path=str(where / "run"),
            model=str(where / "model"),
            data=DataConfig(dataset=str(where / "valid")),
            include_bias=True,
            token_batch_size=batch_size * LENGTH,
            filter_modules="*.attn.*",
        )
        with phase("all"):
            pipeline.hessian_pipeline(
                index,
                HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True),
                ScoreConfig(),
                PreprocessConfig(),
                HessianPipelineConfig(
                    query=QuerySetConfig(dataset=str(where / "test"), aggregation="none"),
                    inversion_cfg=InversionConfig(damping_factor=0.1),
                ),
            )
            found = np.array(load_scores(where / "run" / "scores")[:])
    torch.set_grad_enabled(True)
    return {"scores": found.T.astype(np.float32)}


@contextmanager
def _timed(module: Any, name: str) -> Iterator[None]:
    """Calls of a function of a module are the phase ``fit``."""
    function = getattr(module, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        with phase("fit"):
            return function(*args, **kwargs)

    setattr(module, name, measured)
    try:
        yield
    finally:
        setattr(module, name, function)
