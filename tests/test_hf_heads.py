"""Heads of classifiers: each problem type's loss as transformers trains it, pooled at the last token of each text."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")

import wherefrom  # noqa: E402
from small_models import close, found, made, products, texts  # noqa: E402
from wherefrom.errors import InputError, UnsupportedError  # noqa: E402
from wherefrom.hf import SequenceClassification, pad  # noqa: E402

TEXTS = texts((4, 6, 5, 7, 3))
KINDS = {
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", "mlp"),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Config", "mlp"),
    "bert": ("BertForSequenceClassification", "BertConfig", "layer"),
}


def model(kind, outputs, problem=None, **more):
    name, config, match = KINDS[kind]
    grouped = {"num_key_value_heads": 1} if kind == "llama" else {}
    return made(name, config, num_labels=outputs, problem_type=problem, **{**grouped, **more}), match


def alone(m, tokens):
    return m(input_ids=torch.tensor([tokens])).logits


def theirs(m, labels):
    """The losses that transformers itself computes, one unpadded example at a time."""
    return [m(input_ids=torch.tensor([t]), labels=torch.tensor([y])).loss for t, y in zip(TEXTS, labels, strict=True)]


def loader(labels, size=2, **more):
    rows = [{"input_ids": t, "labels": y} for t, y in zip(TEXTS, labels, strict=True)]
    return DataLoader(rows, size, collate_fn=lambda some: pad(some, **more))


DOUBLE = {"dtype": torch.float64}
TARGETS = {
    1: [0.3, 0.9, -0.4, 0.1, 2.5],
    3: torch.linspace(-1, 1, 15, **DOUBLE).view(5, 3).sin().tolist(),
}
TRUE = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]


# --- problem types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", [None, "regression"])
def test_one_output_is_a_regression(kind, problem):
    m, match = model(kind, 1, problem)
    losses = [(alone(m, t)[0, 0] - y) ** 2 for t, y in zip(TEXTS, TARGETS[1], strict=True)]
    close(found(m, SequenceClassification(), loader(TARGETS[1]), match), products(m, losses, match))
    whole = [3, 0, 1, 2, 1]  # whole numbers are targets too
    losses = [(alone(m, t)[0, 0] - y) ** 2 for t, y in zip(TEXTS, whole, strict=True)]
    close(found(m, SequenceClassification(problem), loader(whole), match), products(m, losses, match))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("problem", "labels"), [("regression", TARGETS[3]), ("multi_label_classification", TRUE),
                            ("single_label_classification", [2, 0, 1, 1, 0])]
)  # fmt: skip
def test_losses_are_those_of_transformers(kind, problem, labels):
    m, match = model(kind, 3, problem)
    given = torch.tensor(labels, **DOUBLE).tolist() if problem != "single_label_classification" else labels
    if problem == "regression":
        losses = [(alone(m, t)[0] - torch.tensor(y, **DOUBLE)).square().mean()
                  for t, y in zip(TEXTS, given, strict=True)]  # fmt: skip
    elif problem == "multi_label_classification":
        losses = [torch.nn.functional.binary_cross_entropy_with_logits(alone(m, t)[0], torch.tensor(y, **DOUBLE))
                  for t, y in zip(TEXTS, given, strict=True)]  # fmt: skip
    else:
        losses = [-alone(m, t)[0].log_softmax(0)[y] for t, y in zip(TEXTS, labels, strict=True)]
    task = SequenceClassification(problem)
    close(found(m, task, loader(labels), match), products(m, losses, match))
    batch = pad([{"input_ids": t, "labels": y} for t, y in zip(TEXTS, labels, strict=True)])
    with torch.no_grad():
        own = task.loss(task.outputs(m, batch), batch)
        values = torch.stack([loss.detach() for loss in theirs(m.float(), given)]).double()
    torch.testing.assert_close(own, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("problem", "labels"), [("regression", TARGETS[3]), ("multi_label_classification", TRUE)])
def test_accurate_scores_equal_a_dense_solve(problem, labels):
    m, _ = model("llama", 3, problem)
    match, size, damping = "score", 48, 0.03
    weight = m.score.weight
    targets = torch.tensor(labels, **DOUBLE)
    task = SequenceClassification(problem)
    rows, asked, curvature = [], [], torch.zeros(size, size, **DOUBLE)
    for t, y in zip(TEXTS, targets, strict=True):
        h = alone(m, t)[0]
        jacobian = torch.stack([torch.autograd.grad(x, weight, retain_graph=True)[0].flatten() for x in h])
        p = h.detach().sigmoid()
        regression = problem == "regression"
        slope = 2 / 3 * (h.detach() - y) if regression else (p - y) / 3
        margin = (h.detach() - y).sign() / 3 if regression else (1 - 2 * y) / 3
        hessian = torch.full((3,), 2 / 3, **DOUBLE) if regression else p * (1 - p) / 3
        rows.append(slope @ jacobian)
        asked.append(margin @ jacobian)
        curvature += jacobian.T @ hessian.diag() @ jacobian / len(TEXTS)
    wanted = torch.stack(asked) @ torch.linalg.solve(curvature + damping * torch.eye(size, **DOUBLE),
                                                     torch.stack(rows).T)  # fmt: skip
    influence = wherefrom.Influence(wherefrom.Exact(), damping=damping, parameters=match, progress=False)
    fitted = influence.fit(m, task, loader(labels))
    close(fitted.score(loader(labels)).values, wanted, 1e-8)


@pytest.mark.parametrize(("problem", "outputs"), [("regression", 1), ("regression", 3),
                                                  ("multi_label_classification", 3)])  # fmt: skip
def test_drawn_labels_have_the_hessian_of_the_loss(problem, outputs):
    task = SequenceClassification(problem)
    h = torch.tensor([[0.4, -1.2, 0.1][:outputs]], **DOUBLE).repeat(40_000, 1).requires_grad_()
    shape = (40_000,) if outputs == 1 else (40_000, outputs)
    batch = {"input_ids": torch.ones(40_000, 1, dtype=torch.long), "labels": torch.zeros(shape, **DOUBLE)}
    drawn = task.resample(h, batch, torch.Generator().manual_seed(0))
    assert drawn["labels"].shape == shape
    (g,) = torch.autograd.grad(task.loss(h, drawn).sum(), h)
    hessian = torch.autograd.functional.hessian(lambda x: task.loss(x, {k: t[:1] for k, t in drawn.items()}).sum(),
                                                h[:1].detach())  # fmt: skip
    hessian = hessian.view(outputs, outputs)
    torch.testing.assert_close(g.T @ g / len(g), hessian, rtol=0.05, atol=0.01)


def test_what_does_not_fit_the_problem_is_refused():
    m, match = model("llama", 3)
    with pytest.raises(InputError, match="labels must be whole numbers.* got torch.float64. .*problem_type"):
        found(m, SequenceClassification(), loader([0.9, 1.9, 2.9, 0.9, 1.1]), match)
    with pytest.raises(InputError, match="labels must be whole numbers"):
        found(m, SequenceClassification(), loader(TRUE), match)
    with pytest.raises(InputError, match=r"labels must be of the outputs' shape .\d, 3., got .\d,"):
        found(m, SequenceClassification("regression"), loader(TARGETS[1], 2), match)
    with pytest.raises(InputError, match="problem_type must be one of single_label_classification, regression"):
        SequenceClassification("regresion")
    for problem in ("regression", "multi_label_classification"):
        m, match = model("llama", 3, problem)
        with pytest.raises(InputError, match=f"problem_type must be the model's own, {problem}, got single_label"):
            found(m, SequenceClassification(), loader([0, 1, 2, 1, 1]), match)
    m, match = model("llama", 1, "multi_label_classification")
    with pytest.raises(InputError, match="the model's own, multi_label_classification, got regression"):
        found(m, SequenceClassification(), loader(TARGETS[1]), match)
    assert SequenceClassification("regression").name() != SequenceClassification().name()


def test_labels_of_as_many_outputs_as_tokens_stay_in_their_order():
    m, match = model("llama", 4, "regression")
    some = texts((4, 2, 3))
    labels = torch.linspace(0, 1, 12, **DOUBLE).view(3, 4)
    batch = {
        "input_ids": torch.tensor([[0] * (4 - len(t)) + t for t in some]),
        "attention_mask": torch.tensor([[0] * (4 - len(t)) + [1] * len(t) for t in some]),
        "labels": labels,
    }
    losses = [(alone(m, t)[0] - y).square().mean() for t, y in zip(some, labels, strict=True)]
    close(found(m, SequenceClassification("regression"), batch, match), products(m, losses, match))


# --- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [None, 0, 2, 5])
@pytest.mark.parametrize("filled", [0, 7])
def test_scores_do_not_depend_on_the_batch(kind, padding, filled):
    """Whatever the model's padding token, also the end token of the texts, and whatever the batch was padded with."""
    m, match = model(kind, 3, pad_token_id=padding)
    ended = [t[:-1] + [2] for t in TEXTS[:3]] + [[3, 2, 4, 2, 2], [5, 6, 5]]
    labels = [0, 1, 2, 1, 0]
    losses = [-alone(m, t)[0].log_softmax(0)[y] for t, y in zip(ended, labels, strict=True)]
    wanted = products(m, losses, match)
    rows = [{"input_ids": t, "labels": y} for t, y in zip(ended, labels, strict=True)]
    before = m.config.pad_token_id
    for size in (1, 2, 5):
        train = DataLoader(rows, size, collate_fn=lambda some: pad(some, token=filled))
        close(found(m, SequenceClassification(), train, match), wanted)
    assert m.config.pad_token_id == before
    left = 7
    batch = {
        "input_ids": torch.tensor([[filled] * (left - len(t)) + t for t in ended]),
        "attention_mask": torch.tensor([[0] * (left - len(t)) + [1] * len(t) for t in ended]),
        "labels": torch.tensor(labels),
    }
    close(found(m, SequenceClassification(), batch, match), wanted)


def test_without_a_mask_every_token_counts():
    m, match = model("gpt2", 2, pad_token_id=None)
    same = texts((5, 5, 5))
    batch = {"input_ids": torch.tensor(same), "labels": torch.tensor([0, 1, 1])}
    losses = [-alone(m, t)[0].log_softmax(0)[y] for t, y in zip(same, (0, 1, 1), strict=True)]
    close(found(m, SequenceClassification(), batch, match), products(m, losses, match))


def test_a_batch_that_ends_in_every_token_is_refused():
    m, _ = model("gpt2", 2, pad_token_id=None)
    batch = {"input_ids": torch.arange(23).unsqueeze(1), "labels": torch.zeros(23, dtype=torch.long)}
    with pytest.raises(InputError, match="the model must be one with config.pad_token_id, got none.* batches smaller"):
        SequenceClassification().outputs(m, batch)


class Mean(torch.nn.Module):
    """A classifier whose pooling takes padding for tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(23, 4), torch.nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.embedding(input_ids).mean(1))}


def test_a_classifier_that_reads_its_padding_is_refused():
    with pytest.raises(UnsupportedError, match="the outputs of Mean depend on how far an example is padded"):
        found(Mean().double().eval(), SequenceClassification(), loader([0, 1, 2, 0, 1], 5), "head")


def test_adapters_around_a_reward_model():
    peft = pytest.importorskip("peft")
    m, _ = model("llama", 1, pad_token_id=None)
    m = peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    m = m.double().eval()
    losses = [(alone(m, t)[0, 0] - y) ** 2 for t, y in zip(TEXTS, TARGETS[1], strict=True)]
    close(found(m, SequenceClassification(), loader(TARGETS[1], 3), "lora"), products(m, losses, "lora"))
