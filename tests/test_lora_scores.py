"""DataInf and HyperINF on the adapters of a tiny peft model, against their papers' formulas written out densely.

Gradients come from plain autograd, one example at a time and without padding, in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from wherefrom import Damping, DataInf, EmpiricalFisher, FittedInfluence, HyperINF, Influence  # noqa: E402
from wherefrom.hf import SequenceClassification, pad  # noqa: E402

TIGHT = {"rtol": 1e-8, "atol": 1e-12}
LENGTHS, ASKED, RANK, WIDTH, CLASSES = (5, 2, 7, 3, 6, 4, 7, 1, 5), (4, 7, 2), 3, 8, 3
Grads = dict[str, Tensor]  # name of an adapter matrix -> (n, r, d): one line for each rank, as published


def adapted() -> torch.nn.Module:
    """A RoBERTa of two layers with rsLoRA on query and value; neither factor is zero."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=17,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=12,
        num_labels=CLASSES,
        pad_token_id=1,
        initializer_range=0.5,
    )
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"], use_rslora=True, init_lora_weights=False
    )
    base = transformers.RobertaForSequenceClassification(config)
    return peft.get_peft_model(base, lora).double().eval()


def sequences(lengths: tuple[int, ...], seed: int) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (len(lengths),), generator=rng)
    tokens = [torch.randint(3, 17, (n,), generator=rng) for n in lengths]
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return logits.logsumexp(0) - logits[label]


def negative_margin(logits: Tensor, label: Tensor) -> Tensor:
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return others.logsumexp(0) - logits[label]


def gradients(model, examples, f) -> Grads:
    """Of f at each example: the matrix of A is (r, d) as it is, that of B is (d, r) and is turned."""
    named = {name: p for name, p in model.named_parameters() if "lora_" in name}
    found = []
    for e in examples:
        logits = model(input_ids=e["input_ids"][None]).logits[0]
        found.append(torch.autograd.grad(f(logits, e["labels"]), list(named.values())))
    stacked = {name: torch.stack(g) for name, g in zip(named, zip(*found, strict=True), strict=True)}
    return {name: g if "lora_A" in name else g.mT for name, g in stacked.items()}


def dampings(g: Grads) -> dict[str, float]:
    """eps_l = 0.1 / (n d_l) sum_i |g_il|^2, d_l the number of entries."""
    return {name: 0.1 / (len(t) * t[0].numel()) * float((t * t).sum()) for name, t in g.items()}


def datainf(g: Grads, v: Grads) -> Tensor:
    """Sum over matrices of < 1/(n eps) sum_i [v - <v, g_i> / (eps + |g_i|^2) g_i], g_k >: (Q, n)."""
    scores = torch.zeros(())
    for name, eps in dampings(g).items():
        rows, asked = g[name].flatten(1), v[name].flatten(1)
        h = torch.zeros_like(asked)
        for gi in rows:
            h += asked - (asked @ gi / (eps + gi @ gi))[:, None] * gi
        scores = scores + h / (len(rows) * eps) @ rows.T
    return scores


def hyperinf(g: Grads, v: Grads) -> Tensor:
    """Sum over matrices of < v (1/n sum_i g_i^T g_i + eps)^-1, g_k >, d x d: (Q, n)."""
    scores = torch.zeros(())
    for name, eps in dampings(g).items():
        moment = sum(gi.T @ gi for gi in g[name]) / len(g[name])
        h = v[name] @ torch.linalg.inv(moment + eps * torch.eye(len(moment), dtype=moment.dtype))
        scores = scores + torch.einsum("qrd,krd->qk", h, g[name])
    return scores


def hyperinf_fisher(g: Grads, v: Grads) -> Tensor:
    """The same with every matrix flattened, r d x r d."""
    return hyperinf({k: t.flatten(1)[:, None] for k, t in g.items()}, {k: t.flatten(1)[:, None] for k, t in v.items()})


def by_parameter(fitted: FittedInfluence) -> dict[str, float]:
    """Lambda of each parameter: that of its block."""
    return {name: fitted.inverse.damping[block.name] for block in fitted.problem.blocks for name in block.shapes}


@pytest.mark.parametrize(
    ("solver", "formula"),
    [
        (DataInf(), datainf),
        (HyperINF(side="larger"), hyperinf),
        (HyperINF(side="larger", inverse="cholesky"), hyperinf),
        (HyperINF(matrix="fim"), hyperinf_fisher),
    ],
    ids=["DataInf", "HyperINF", "Cholesky", "Fisher"],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_scores_on_adapters_are_the_published_ones(solver, formula, batch_size):
    model, train, queries = adapted(), sequences(LENGTHS, 1), sequences(ASKED, 2)
    g, v = gradients(model, train, cross_entropy), gradients(model, queries, negative_margin)
    kinds = {(name.split(".")[-4], name.split(".")[-3]) for name in g}
    assert kinds == {(m, k) for m in ("query", "value") for k in ("lora_A", "lora_B")} and len(g) == 8
    given = pad(train, token=1)
    if batch_size:
        given = torch.utils.data.DataLoader(train, batch_size, collate_fn=lambda some: pad(some, token=1))
    influence = Influence(solver, Damping.relative(0.1), EmpiricalFisher, "lora_", batch_size)
    fitted = influence.fit(model, SequenceClassification(), given)
    damping = by_parameter(fitted)
    eps = dampings(g)
    assert max(eps.values()) > 1.5 * min(eps.values())  # else a shared damping would pass
    for name, value in eps.items():
        assert damping[name] == pytest.approx(value, rel=1e-9)
    wanted = formula(g, v)
    found = fitted.score(pad(queries, token=1))
    torch.testing.assert_close(found.values, wanted, **TIGHT)
    mean = fitted.solve(pad(queries, token=1), mean=True).score()
    torch.testing.assert_close(mean.values, wanted.mean(0, keepdim=True), **TIGHT)
