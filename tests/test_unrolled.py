"""Replayed training and exact unrolling, against `torch.optim`, finite differences, autograd and a closed form."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom
from problems import TinyProblem, problem
from wherefrom.errors import AttributionWarning, DivergenceError, InputError, UnsupportedError
from wherefrom.methods.optimisers import Adam, jacobian
from wherefrom.methods.unrolled import FittedUnrolled
from wherefrom.training.trajectory import Checkpoint, Trajectory

TIGHT = {"rtol": 1e-12, "atol": 1e-13}
HEAVY = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "nesterov": False}
NESTEROV = {"momentum": 0.8, "dampening": 0.0, "weight_decay": 0.02, "nesterov": True}
PLAIN = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False}
ADAM = {"betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.05}
OTHER = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.0}
RUNS = [
    ("mlp", "SGD", (NESTEROV, PLAIN)),
    ("mlp_regression", "SGD", (HEAVY,)),
    ("mlp", "AdamW", (ADAM, OTHER)),
    ("frozen", "Adam", (ADAM, OTHER)),
    ("mlp", "Adam", (ADAM | {"decoupled_weight_decay": True},)),
    ("cnn_groups", "SGD", (HEAVY, NESTEROV)),
    ("masked_sequence", "AdamW", (OTHER,)),
    ("tied_embedding", "SGD", (NESTEROV,)),
]
EACH = pytest.mark.parametrize(("name", "optimiser", "settings"), RUNS)


@dataclasses.dataclass
class Run:
    """A run to be: initial model, order with ragged and repeated minibatches, learning rates, parameter groups."""

    p: TinyProblem
    optimiser: str
    settings: Sequence[Mapping[str, Any]]
    steps: int = 11

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(3)
        sizes = [4, 3, 4, 1, 5, 2]
        self.order = [torch.randint(self.p.n, (sizes[t % 6],), generator=rng) for t in range(self.steps)]
        self.order[0] = torch.tensor([1, 1, 2])  # one example twice in a minibatch
        self.order[-1] = torch.tensor([0, 1, 3])
        large = 0.03 if self.optimiser == "SGD" else 0.01
        self.rates = large * torch.rand(self.steps, len(self.settings), generator=rng, dtype=torch.float64)
        names = [n for n, _ in self.p.model.named_parameters()]
        cut = len(names) // 2 if len(self.settings) > 1 else 0
        self.names = [names[:cut], names[cut:]] if cut else [names]

    def train(self, w: Tensor | None = None) -> tuple[nn.Module, Trajectory]:
        """By `torch.optim`, with weights on the examples; the problem's model is where it starts."""
        model = copy.deepcopy(self.p.model)
        first = copy.deepcopy(model.state_dict())
        named = dict(model.named_parameters())
        groups = [
            {"params": [named[n] for n in names], **settings}
            for names, settings in zip(self.names, self.settings, strict=True)
        ]
        optimiser = getattr(torch.optim, self.optimiser)(groups, lr=0.1)
        w = torch.ones(self.p.n, dtype=torch.float64) if w is None else w
        for index, rates in zip(self.order, self.rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates.tolist(), strict=True):
                group["lr"] = rate
            batch = tuple(t[index] for t in self.p.train)
            optimiser.zero_grad()
            ((w[index] * self.p.loss(model(batch[0]), batch)).sum() / len(index)).backward()
            optimiser.step()
        return model, self.recorded((first, model.state_dict()))

    def recorded(self, states: Sequence[Mapping[str, Tensor]]) -> Trajectory:
        kept = tuple(Checkpoint(step, state) for step, state in zip((0, self.steps), states, strict=True))
        pairs = zip(self.names, self.settings, strict=True)
        groups = tuple({"parameters": tuple(names), **settings} for names, settings in pairs)
        return Trajectory(kept, self.rates, self.optimiser, groups, tuple(self.order))

    def measured(self, w: Tensor) -> Tensor:
        model = self.train(w)[0]
        with torch.no_grad():
            return self.p.measurement(model(self.p.queries[0]), self.p.queries)

    def differences(self, h: float = 1e-4) -> Tensor:
        """Scores by central differences of retraining, to fourth order in h."""
        columns = []
        for direction in torch.eye(self.p.n, dtype=torch.float64):
            f = [self.measured(1 + k * h * direction) for k in (-2, -1, 1, 2)]
            columns.append((f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h))
        return -self.p.n * torch.stack(columns, 1)

    def method(self, **options: Any) -> FittedUnrolled:
        model, trajectory = self.train()
        return wherefrom.Unrolled(trajectory, **({"dropped": 0} | options)).fit(model, self.p.task, self.p.train)

    def replay(self) -> wherefrom.Replay:
        return wherefrom.Replay(wherefrom.Problem(self.p.model, self.p.task, self.p.train), self.train()[1])


def masks(p: TinyProblem, count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, p.n, generator=torch.Generator().manual_seed(seed)) < 0.7


# --- replaying ----------------------------------------------------------------------------------------------------


@EACH
def test_a_replay_is_what_torch_does(name, optimiser, settings):
    run = Run(problem(name), optimiser, settings)
    replay = run.replay()
    assert replay.error < 1e-13
    subsets = masks(run.p, 3)
    found = replay.final(subsets)
    assert set(found) == set(run.p.shapes)
    for m, subset in enumerate(subsets):
        final = dict(run.train(subset.double())[0].named_parameters())
        for parameter, t in found.items():
            torch.testing.assert_close(t[m], final[parameter].detach(), **TIGHT)


def test_the_queries_are_measured_after_each_retraining(monkeypatch):
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    subsets = masks(run.p, 5)
    truth = torch.stack([run.measured(m.double()) for m in subsets]).unsqueeze(1)
    replay = run.replay()
    torch.testing.assert_close(replay.measure(subsets, run.p.queries), truth, **TIGHT)
    monkeypatch.setattr(wherefrom.methods.replay, "STACKED", 2 * 8 * run.p.dim)  # two models at once
    replay.problem.train.batch_size = 2
    torch.testing.assert_close(replay.measure(subsets, run.p.queries), truth, **TIGHT)
    loss = replay.measure(subsets, run.p.queries, run.p.task.loss)
    assert loss.shape == truth.shape and not torch.allclose(loss, truth)


def test_metasmoothness_is_its_definition():
    run = Run(problem("mlp"), "AdamW", (ADAM,))
    replay = run.replay()
    found = replay.metasmoothness(fraction=0.3, directions=3, seed=1)

    def theta(w: Tensor) -> Tensor:
        return torch.cat([t.detach().flatten() for t in run.train(w)[0].parameters()])

    rng = torch.Generator().manual_seed(1)
    for s, order in zip(found, torch.rand(3, 11, generator=rng).argsort(1), strict=True):
        v = -(order < 3).double()
        one = torch.ones(11, dtype=torch.float64)
        d = [(theta(w + v / 2) - theta(w)) / 0.5 for w in (one, one + v / 2)]
        expected = d[0].sign() @ torch.diag(d[0].abs() / d[0].abs().sum()) @ d[1].sign()
        assert float(s) == pytest.approx(float(expected), abs=1e-9) and 0 < s < 1
    with pytest.raises(InputError, match="directions and fraction"):
        replay.metasmoothness(fraction=0)


# --- unrolling ----------------------------------------------------------------------------------------------------


@EACH
def test_scores_are_finite_differences_of_retraining(name, optimiser, settings):
    run = Run(problem(name), optimiser, settings)
    found = run.method().score(run.p.queries)
    expected = run.differences()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))
    assert found.residual is None and found.provenance["measured"]["replay error"] < 1e-13


def test_the_score_of_an_example_never_seen_is_zero():
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    run.order = [torch.where(o == 7, 0, o) for o in run.order]
    values = run.method().score(run.p.queries).values
    assert not values[:, 7].any() and values[:, 0].all()


def naive(run: Run) -> Tensor:
    """Autograd through the whole loop, with the updates written out as torch documents them."""
    model = copy.deepcopy(run.p.model)
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    group = {n: i for i, names in enumerate(run.names) for n in names}
    kept: dict[str, list[Tensor]] = {n: [] for n in theta}
    w = torch.ones(run.p.n, dtype=torch.float64, requires_grad=True)
    for t, index in enumerate(run.order):
        batch = tuple(x[index] for x in run.p.train)
        outputs = torch.func.functional_call(model, theta, (batch[0],))
        loss = (w[index] * run.p.loss(outputs, batch)).sum() / len(index)
        gradients = dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True))
        for n, g in gradients.items():
            s, rate = run.settings[group[n]], run.rates[t, group[n]]
            if run.optimiser == "SGD":
                g = g + s["weight_decay"] * theta[n]
                if s["momentum"]:
                    b = s["momentum"] * kept[n][0] + (1 - s["dampening"]) * g if kept[n] else g
                    kept[n] = [b]
                    g = g + s["momentum"] * b if s["nesterov"] else b
                theta[n] = theta[n] - rate * g
                continue
            if run.optimiser == "AdamW" or s.get("decoupled_weight_decay"):
                theta[n] = theta[n] - rate * s["weight_decay"] * theta[n]
            else:
                g = g + s["weight_decay"] * theta[n]
            m, v = kept[n] or [torch.zeros_like(g)] * 2
            (b1, b2), e = s["betas"], s["eps"]
            kept[n] = [m, v] = [b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2]
            theta[n] = theta[n] - rate * (m / (1 - b1 ** (t + 1))) / ((v / (1 - b2 ** (t + 1))).sqrt() + e)
    f = run.p.measurement(torch.func.functional_call(model, theta, (run.p.queries[0],)), run.p.queries)
    return torch.stack([-run.p.n * torch.autograd.grad(one, w, retain_graph=True)[0] for one in f])


@pytest.mark.parametrize(("name", "optimiser", "settings"), [r for r in RUNS if r[0] in ("mlp", "mlp_regression")])
def test_scores_are_autograd_through_the_whole_loop(name, optimiser, settings):
    run = Run(problem(name), optimiser, settings)
    torch.testing.assert_close(run.method().score(run.p.queries).values, naive(run), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{"segment": s} for s in (1, 2, 5, 11, 99)] + [{"memory": 1.0}])
def test_segments_and_memory_change_nothing(options):
    run = Run(problem("mlp"), "AdamW", (ADAM, OTHER))
    usual = run.method()
    torch.testing.assert_close(
        run.method(**options).score(run.p.queries).values, usual.score(run.p.queries).values, **TIGHT
    )
    assert len(usual.replay.states) == 4  # 11 steps by fours: 0, 4, 8 and 11


def test_the_right_hand_sides_of_a_product_are_cut(monkeypatch):
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    whole = run.method().score(run.p.queries).values
    monkeypatch.setattr(wherefrom.methods.unrolled, "rhs_at_once", lambda *_: 2)
    torch.testing.assert_close(run.method().score(run.p.queries).values, whole, **TIGHT)


def test_another_measurement():
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    values = run.method().score(run.p.queries, run.p.task.loss).values
    twice = run.method().score(run.p.queries, lambda h, b: 2 * run.p.task.loss(h, b)).values
    torch.testing.assert_close(twice, 2 * values)
    assert not torch.allclose(values, run.method().score(run.p.queries).values)


def test_gradient_descent_on_a_quadratic_is_a_power_series():
    """theta_k - theta* = (I - eta H)^k (theta_0 - theta*), so every gradient and every later factor is known."""
    p, eta, steps = problem("linear_regression"), 0.05, 20
    run = Run(p, "SGD", (PLAIN | {"weight_decay": 0.0},), steps)
    run.order = [torch.arange(p.n)] * steps
    run.rates = torch.full((steps, 1), eta, dtype=torch.float64)
    found = run.method().score(p.queries)

    x, y = p.train[0], p.train[1]
    x = torch.cat([x, torch.ones(p.n, 1, dtype=torch.float64)], 1)  # (N, 7), the last for the bias
    h = 2 * x.T @ x / p.n
    best = torch.linalg.lstsq(x, y).solution  # (7, 3)
    begin = torch.cat([p.model.weight.detach().T, p.model.bias.detach()[None]])
    power = [torch.linalg.matrix_power(torch.eye(7, dtype=torch.float64) - eta * h, k) for k in range(steps + 1)]
    q = torch.cat([p.queries[0], torch.ones(len(p.queries[0]), 1, dtype=torch.float64)], 1)
    end = best + power[steps] @ (begin - best)
    sign = (q @ end - p.queries[1]).sign()  # (Q, 3)
    total = torch.zeros(len(q), p.n, dtype=torch.float64)
    for k in range(steps):
        error = x @ (best + power[k] @ (begin - best)) - y  # (N, 3)
        total += eta * (q @ power[steps - 1 - k] @ x.T) * (sign @ (2 * error).T)
    torch.testing.assert_close(found.values, total, rtol=1e-10, atol=1e-12)


def test_weights_that_never_move_are_no_obstacle_to_adam():
    p = problem("mlp")
    for t in (p.train[0], p.queries[0]):
        t[:, 2] = 0
    run = Run(p, "Adam", (OTHER | {"eps": 1e-8},))
    values = run.method().score(p.queries).values
    torch.testing.assert_close(values, run.differences(1e-5), rtol=1e-5, atol=1e-5 * float(values.abs().max()))
    zero = torch.zeros(1, 3, dtype=torch.float64)
    slopes = jacobian(lambda rows, g: Adam().update(rows, g, 0.1, 0), (zero, zero, zero), zero)
    assert all(bool(t.isfinite().all()) for rows, g in slopes for t in (*rows, g))
    assert slopes[0][1].tolist() == [[pytest.approx(-0.1 / 1e-8)] * 3]  # theta - rate * m / eps


def test_what_is_measured_comes_with_the_scores(tmp_path):
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    method = run.method(dropped=0.3)
    scores = method.score(run.p.queries)
    expected = float(method.replay.metasmoothness(0.3).mean())
    assert scores.provenance["measured"]["metasmoothness"] == pytest.approx(expected)
    assert f"metasmoothness {expected:.2g}" in str(scores)
    scores.save(tmp_path / "scores")
    assert wherefrom.Scores.load(tmp_path / "scores").provenance["measured"] == scores.provenance["measured"]
    assert str(method.method) == "Unrolled(Trajectory(11 steps of SGD, 2 checkpoints), segment=None, dropped=0.3)"


def test_a_recorded_run_is_unrolled(tmp_path):
    p = problem("mlp")
    optimiser = torch.optim.SGD(p.model.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 3, 0.5)
    recorder = wherefrom.Recorder(tmp_path, p.model, optimiser, every=4)
    for index in torch.arange(22).remainder(p.n).split(3):
        recorder.saw(index)
        optimiser.zero_grad()
        p.loss(p.model(p.train[0][index]), (None, p.train[1][index])).mean().backward()
        optimiser.step()
        schedule.step()
    method = wherefrom.Unrolled(recorder.close(), dropped=0).fit(p.model, p.task, p.train)
    assert method.measured["replay error"] < 1e-13
    assert method.score(p.queries).values.isfinite().all()


# --- refusals -----------------------------------------------------------------------------------------------------


def fit(run: Run, trajectory: Trajectory, model: nn.Module | None = None, **options: Any) -> FittedUnrolled:
    return wherefrom.Unrolled(trajectory, dropped=0, **options).fit(model or run.p.model, run.p.task, run.p.train)


def test_what_cannot_be_replayed_is_refused():
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    _, whole = run.train()
    first, last = whole.checkpoints
    for trajectory, said in (
        (dataclasses.replace(whole, order=None), "one with the order of the examples"),
        (dataclasses.replace(whole, checkpoints=(last,)), r"step 0 and at step 11, got checkpoints \[11\]"),
        (dataclasses.replace(whole, checkpoints=(first,)), r"got checkpoints \[0\]"),
        (dataclasses.replace(whole, order=(torch.tensor([11]), *whole.order[1:])), r"numbers in 0\.\.10"),
        (dataclasses.replace(whole, order=(torch.tensor([], dtype=torch.int64), *whole.order[1:])), "batches of 0"),
    ):
        with pytest.raises(InputError, match=said):
            fit(run, trajectory)
    with pytest.raises(InputError, match="segment must be"):
        fit(run, whole, segment=-1)
    with pytest.raises(InputError, match=r"those that the run trained, got others: 0\.bias"):
        fit(run, whole, parameters="weight")
    with pytest.raises(UnsupportedError, match="got SGD with maximize"):
        fit(run, dataclasses.replace(whole, groups=(whole.groups[0] | {"maximize": True},)))
    with pytest.raises(UnsupportedError, match="got Adagrad"):
        fit(run, dataclasses.replace(whole, optimiser="Adagrad"))
    for module in (nn.Dropout(0.1), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2, dropout=0.1)):
        with pytest.raises(UnsupportedError, match=f"got 5 .{type(module).__name__}"):
            fit(run, whole, nn.Sequential(*run.p.model, module).double().eval())
    with pytest.raises(InputError, match=r"weights must be \(M, 11\)"):
        run.replay().final(torch.ones(11))


def test_dropout_that_drops_nothing_is_no_obstacle():
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    fit(run, run.train()[1], nn.Sequential(*run.p.model, nn.Dropout(0.0)).eval())


def test_a_run_that_is_not_reproduced_is_refused_or_warned_of():
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    _, whole = run.train()
    wrong = dataclasses.replace(whole, order=tuple((o + 1) % 11 for o in whole.order))
    with pytest.raises(InputError, match="must end at the run's last weights"):
        fit(run, wrong)
    first, last = (c.state for c in whole.checkpoints)
    near = {n: t + 0.01 * (t - first[n]) for n, t in last.items()}
    with pytest.warns(AttributionWarning, match=r"got 9\.9e-03 of the way"):
        method = fit(run, run.recorded((first, near)))
    assert method.measured["replay error"] == pytest.approx(0.01 / 1.01)


def test_a_loss_that_is_not_per_example_is_refused():
    run = Run(problem("mlp"), "SGD", (HEAVY,))
    run.p.task.loss = lambda h, b: nn.functional.cross_entropy(h, b[1])  # its mean
    with pytest.raises(InputError, match=r"task\.loss must be one number per example"):
        run.method()


def test_a_retraining_that_diverges_is_an_error():
    run = Run(problem("mlp_regression"), "SGD", (PLAIN,))
    weights = torch.ones(3, run.p.n, dtype=torch.float64)
    weights[1] = 1e60
    with pytest.raises(DivergenceError, match="weights 1 "):
        run.replay().final(weights)
