"""Recording a run, and the methods that score by one, against dense float64 answers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import wherefrom
from problems import TinyProblem, problem
from wherefrom.curvature import kronecker
from wherefrom.errors import ArtefactError, InputError
from wherefrom.model.problem import Problem
from wherefrom.training.trajectory import LOG, Checkpoint, Recorder, Trajectory

TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def moved(p: TinyProblem, seed: int, by: float = 0.3) -> TinyProblem:
    """The same problem at other weights, with dense answers there."""
    rng = torch.Generator().manual_seed(seed)
    reference = copy.deepcopy(p.reference)
    with torch.no_grad():
        for weight in reference.parameters():
            weight += by * torch.randn(weight.shape, generator=rng, dtype=torch.float64)
    return dataclasses.replace(p, model=copy.deepcopy(reference), reference=reference, cache={})


def checkpoint(step: int, p: TinyProblem) -> Checkpoint:
    return Checkpoint(step, p.model.state_dict())


def run(p: TinyProblem, checkpoints, rates, momentum: float = 0.0) -> Trajectory:
    group = {"parameters": tuple(p.shapes), "momentum": momentum, "weight_decay": 0.0, "dampening": 0.0}
    rates = torch.tensor(rates, dtype=torch.float64).reshape(-1, 1)
    return Trajectory(tuple(checkpoints), rates, "SGD", (group,))


# --- recording ----------------------------------------------------------------------------------------------------


def train(folder, every=3, steps=8, optimiser=torch.optim.SGD, watch=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    groups = [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[2].parameters()}]
    opt = optimiser(groups, lr=0.1, **options)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
    x, y = torch.randn(10, 3), torch.randint(2, (10,))
    states = [copy.deepcopy(model.state_dict())]
    recorder = Recorder(folder, model, opt, every)
    for _ in range(steps):
        index = torch.randperm(10)[:4]
        if watch:
            recorder.saw(index[:1].tolist())
            recorder.saw(index[1:])
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        opt.step()
        schedule.step()
        states.append(copy.deepcopy(model.state_dict()))
    return recorder, states


def test_a_run_is_kept_as_it_was(tmp_path):
    recorder, states = train(tmp_path / "run", momentum=0.5)
    trajectory = recorder.close()
    assert [c.step for c in trajectory.checkpoints] == [0, 3, 6, 8]
    for c in trajectory.checkpoints:
        assert all(torch.equal(c.state[name], t) for name, t in states[c.step].items())
    assert trajectory.optimiser == "SGD" and trajectory.steps == 8
    assert trajectory.rates[:, 0].tolist() == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.025] * 2)
    assert [g["weight_decay"] for g in trajectory.groups] == [0.1, 0]
    assert trajectory.groups[1]["parameters"] == ("2.weight", "2.bias") and trajectory.groups[0]["momentum"] == 0.5
    assert trajectory.order is not None and [len(o) for o in trajectory.order] == [4] * 8
    torch.manual_seed(0)
    assert repr(trajectory) == "Trajectory(8 steps of SGD, 4 checkpoints)"
    trajectory.save(tmp_path / "again")
    again = Trajectory.load(tmp_path / "again")
    assert torch.equal(again.rates, trajectory.rates) and again.groups == trajectory.groups
    assert all(torch.equal(a, b) for a, b in zip(again.order or (), trajectory.order, strict=True))


def test_a_run_that_was_killed_ends_at_its_last_checkpoint(tmp_path):
    train(tmp_path / "run")  # never closed
    trajectory = Trajectory.load(tmp_path / "run")
    assert [c.step for c in trajectory.checkpoints] == [0, 3, 6] and trajectory.steps == 6
    assert len(trajectory.order or ()) == 6


def test_a_recorder_stops_listening(tmp_path):
    recorder, _ = train(tmp_path / "run")
    recorder.close()
    recorder.optimiser.step()
    assert Trajectory.load(tmp_path / "run").steps == 8


def test_adam_is_recorded_with_its_settings(tmp_path):
    recorder, _ = train(tmp_path / "run", optimiser=torch.optim.AdamW, betas=(0.8, 0.9), watch=False)
    trajectory = recorder.close()
    assert trajectory.optimiser == "AdamW" and trajectory.order is None
    assert tuple(trajectory.groups[0]["betas"]) == (0.8, 0.9) and trajectory.groups[0]["eps"] == 1e-8
    with pytest.raises(InputError, match="of SGD without dampening, got AdamW"):
        trajectory.segments(2)


def test_what_cannot_be_recorded_is_refused(tmp_path):
    recorder, _ = train(tmp_path / "run")
    with pytest.raises(InputError, match="one without a recorded run"):
        Recorder(tmp_path / "run", recorder.model, recorder.optimiser, 3)
    with pytest.raises(InputError, match="one of the model's own parameters"):
        Recorder(tmp_path / "b", nn.Linear(2, 2), recorder.optimiser, 3)
    with pytest.raises(InputError, match="every must be"):
        Recorder(tmp_path / "b", recorder.model, recorder.optimiser, 0)
    for p in recorder.model.parameters():
        p.grad = torch.zeros_like(p)
    recorder.optimiser.param_groups[0]["momentum"] = 0.7
    recorder.saw([1])
    with pytest.raises(InputError, match="constant but for the learning rate"):
        recorder.optimiser.step()
    recorder.optimiser.param_groups[0]["momentum"] = 0
    recorder._seen = []
    with pytest.raises(InputError, match="before every step or never"):
        recorder.optimiser.step()


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ArtefactError, match="a folder that a Recorder wrote"):
        Trajectory.load(tmp_path)
    recorder, _ = train(tmp_path / "run")
    recorder.close()
    (tmp_path / "run" / "step-00000003.safetensors").unlink()
    with pytest.raises(ArtefactError, match="step-00000003"):
        Trajectory.load(tmp_path / "run")
    assert (tmp_path / "run" / LOG).is_file()


def test_checkpoints_on_disk_are_read_when_they_are_asked_for(tmp_path):
    recorder, _ = train(tmp_path / "run")
    run = recorder.close()
    state = run.checkpoints[0].state
    assert set(state) == set(recorder.model.state_dict()) and len(state) == len(recorder.model.state_dict())
    assert all(not isinstance(held, torch.Tensor) for held in vars(state).values())
    name = next(iter(state))
    assert state[name] is not state[name] and torch.equal(state[name], state[name])
    with pytest.raises(KeyError):
        state["none"]


# --- cutting ------------------------------------------------------------------------------------------------------


def test_segments_and_rates():
    p = problem("mlp")
    states = [checkpoint(step, p) for step in (0, 2, 4, 6, 8, 10)]
    trajectory = run(p, states, [0.1] * 5 + [0.3] * 5, momentum=0.5)
    first, second = trajectory.segments(2)
    assert [c.step for c in first.checkpoints] == [2, 4] and [c.step for c in second.checkpoints] == [6, 8, 10]
    assert (first.steps, second.steps) == (5, 5)
    assert (first.rate, second.rate) == (pytest.approx(0.2), pytest.approx(0.6))
    assert second.damping == pytest.approx(1 / 3)
    assert [c.step for c in trajectory.spread(1)] == [10] and [c.step for c in trajectory.spread(9)] == [2, 4, 6, 8, 10]
    assert [c.step for c in trajectory.spread(2)] == [6, 10]
    with pytest.raises(InputError, match=r"one in steps 2\.\.2"):
        run(p, [states[0], states[2]], [0.1] * 4).segments(4)


def test_rates_are_averaged_over_groups_by_size():
    p = problem("mlp")
    names = list(p.shapes)
    groups = tuple({"parameters": part, "momentum": m} for part, m in ((names[:1], 0.0), (names[1:], 0.75)))
    trajectory = Trajectory((checkpoint(1, p),), torch.tensor([[0.1, 0.2]], dtype=torch.float64), "SGD", groups)
    first = p.shapes[names[0]].numel()
    expected = (0.1 * first + 0.8 * (p.dim - first)) / p.dim
    assert trajectory.effective_rates().tolist() == pytest.approx([expected])


@pytest.mark.parametrize(
    ("steps", "rates", "order"), [([], 3, None), ([2, 1], 3, None), ([4], 3, None), ([1], 0, None), ([1], 3, 2)]
)
def test_what_is_no_run_is_refused(steps, rates, order):
    p = problem("mlp")
    with pytest.raises(InputError):
        Trajectory(
            tuple(checkpoint(s, p) for s in steps),
            torch.full((rates, 1), 0.1, dtype=torch.float64),
            "SGD",
            ({"parameters": tuple(p.shapes)},),
            None if order is None else tuple(torch.arange(2) for _ in range(order)),
        )


def test_weights_of_another_model_are_refused():
    p = problem("mlp")
    with pytest.raises(InputError, match="a state_dict of the model"):
        Problem(p.model, p.task, p.train).at({"no": torch.zeros(1)})


# --- TracIn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "cnn_groups"])
def test_tracin_is_a_weighted_sum_of_dot_products(name):
    p = problem(name)
    early, late = moved(p, 1), moved(p, 2)
    trajectory = run(p, [checkpoint(0, p), checkpoint(1, early), checkpoint(4, late)], [0.1, 0.2, 0.3, 0.4], 0.5)
    terms = [at.measurement_gradients() @ at.loss_gradients().T for at in (early, late)]
    found = wherefrom.TracIn(trajectory, batch_size=3).fit(p.model, p.task, p.train).score(p.queries)
    torch.testing.assert_close(found.values, 0.2 * terms[0] + 1.8 * terms[1], **TIGHT)
    mean = wherefrom.TracIn(trajectory, rates=False).fit(p.model, p.task, p.train).score(p.queries)
    torch.testing.assert_close(mean.values, (terms[0] + terms[1]) / 2, **TIGHT)
    last = wherefrom.TracIn(trajectory, rates=False, checkpoints=1).fit(p.model, p.task, p.train)
    torch.testing.assert_close(last.score(p.queries).values, terms[1], **TIGHT)
    squares = late.loss_gradients().square().sum(1)
    torch.testing.assert_close(last.self_influence(), squares, **TIGHT)


def test_the_cosine_is_of_gradients_of_length_one():
    p = problem("mlp")
    at = moved(p, 3)
    unit = nn.functional.normalize
    expected = unit(at.measurement_gradients()) @ unit(at.loss_gradients()).T
    method = wherefrom.TracIn(run(p, [checkpoint(1, at)], [0.1]), rates=False, cosine=True)
    torch.testing.assert_close(method.fit(p.model, p.task, p.train).score(p.queries).values, expected, **TIGHT)


# --- SOURCE -------------------------------------------------------------------------------------------------------


def dense_source(p: TinyProblem, parts, inverse: bool) -> torch.Tensor:
    """Equation 16 with matrix exponentials: parts are (duration, G, mean gradients (N, D)), in order of time."""
    w, total = p.measurement_gradients(), torch.zeros(())
    for duration, G, g in reversed(parts):
        eye = torch.eye(len(G), dtype=torch.float64)
        S = torch.linalg.matrix_exp(-duration * G)
        if inverse:
            r = torch.linalg.inv(G + eye / duration)
        else:  # the integral of exp(-s G) from 0 to the duration, as a block of a larger exponential
            zero = torch.zeros_like(G)
            block = torch.linalg.matrix_exp(torch.cat([torch.cat([-G, eye], 1), torch.cat([zero, zero], 1)]) * duration)
            r = block[: len(G), len(G) :]
        total = total + w @ r @ g.T
        w = w @ S
    return total


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("average", ["gradients", "weights"])
@pytest.mark.parametrize("name", ["mlp", "mlp_regression"])
def test_source_is_the_formula_of_the_paper(name, average, inverse):
    p = problem(name)
    places = [moved(p, seed) for seed in range(4)]
    trajectory = run(p, [checkpoint(s + 1, at) for s, at in enumerate(places)], [0.5, 0.5, 0.3, 0.3], 0.9)
    parts = []
    for pair, duration in ((places[:2], 10.0), (places[2:], 6.0)):
        middle = copy.deepcopy(pair[0].reference)
        with torch.no_grad():
            for m, a, b in zip(middle.parameters(), *(q.reference.parameters() for q in pair), strict=True):
                m.copy_((a + b) / 2)
        at = dataclasses.replace(p, reference=middle, cache={})
        g = sum(q.loss_gradients() for q in pair) / 2 if average == "gradients" else at.loss_gradients()
        parts.append((duration, at.ggn(), g))
    solver = wherefrom.CG(tolerance=1e-12, steps=2000) if inverse else None
    method = wherefrom.SOURCE(trajectory, segments=2, basis=wherefrom.Exact("primal"), solver=solver, average=average)
    found = method.fit(p.model, p.task, p.train).score(p.queries)
    torch.testing.assert_close(found.values, dense_source(p, parts, inverse), rtol=1e-7, atol=1e-9)
    assert (found.residual is None) != inverse
    assert method.damping() == pytest.approx(2 / (10 + 6))


def test_one_segment_with_a_solver_is_influence_at_its_own_damping():
    p = problem("mlp")
    trajectory = run(p, [checkpoint(3, p)], [0.2, 0.2, 0.2])
    found = (
        wherefrom.SOURCE(trajectory, segments=1, solver=wherefrom.EKFAC())
        .fit(p.model, p.task, p.train)
        .score(p.queries)
    )
    same = wherefrom.Influence(wherefrom.EKFAC(), 1 / 0.6).fit(p.model, p.task, p.train).score(p.queries)
    torch.testing.assert_close(found.values, same.values, **TIGHT)
    assert found.residual is not None and same.residual is not None
    torch.testing.assert_close(found.residual, same.residual, **TIGHT)


def test_one_segment_is_close_to_influence_in_every_direction():
    p = problem("mlp")
    trajectory = run(p, [checkpoint(3, p)], [0.2, 0.2, 0.2])
    part = wherefrom.SOURCE(trajectory, segments=1).fit(p.model, p.task, p.train).segments[0]
    s = torch.logspace(-6, 6, 400, dtype=torch.float64)
    ratio = part.response(s) * (s + 1 / 0.6)
    assert bool((ratio >= 1 - 1e-12).all()) and float(ratio.max()) == pytest.approx(1.2985, abs=2e-4)
    assert float(part.response(torch.zeros(1, dtype=torch.float64))) == pytest.approx(0.6)


def test_two_segments_with_the_same_statistics_are_one():
    p = problem("cnn_groups")
    rates = [0.3, 0.3, 0.3, 0.3]
    whole = wherefrom.SOURCE(run(p, [checkpoint(4, p)], rates), segments=1)
    halves = wherefrom.SOURCE(run(p, [checkpoint(2, p), checkpoint(4, p)], rates), segments=2)
    one, two = (m.fit(p.model, p.task, p.train).score(p.queries).values for m in (whole, halves))
    torch.testing.assert_close(one, two, **TIGHT)


def test_a_short_run_is_tracin():
    p = problem("mlp")
    places = [moved(p, 1), p]
    trajectory = run(p, [checkpoint(s + 1, at) for s, at in enumerate(places)], [1e-7, 2e-7])
    found = wherefrom.SOURCE(trajectory, segments=2).fit(p.model, p.task, p.train).score(p.queries).values
    q = p.measurement_gradients()
    expected = 1e-7 * q @ places[0].loss_gradients().T + 2e-7 * q @ places[1].loss_gradients().T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


def test_source_comes_to_exact_unrolling_as_steps_get_small():
    """Linear regression by gradient descent on all the data: its curvature is constant, its unrolling a power."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, d, generator=rng, dtype=torch.float64) for d in (4, 2))
    queries = tuple(torch.randn(3, d, generator=rng, dtype=torch.float64) for d in (4, 2))
    errors = []
    for steps in (50, 100):
        eta = 2.0 / steps
        model = nn.Linear(4, 2).double()
        with torch.no_grad():
            for w in model.parameters():
                w.copy_(torch.linspace(-0.5, 0.5, w.numel()).view(w.shape))
        tiny = dataclasses.replace(
            problem("mlp_regression"), model=model, reference=model, train=(x, y), queries=queries
        )
        tiny = dataclasses.replace(tiny, task=wherefrom.Regression(), cache={})
        kept, slopes = [], []
        for step in range(steps):
            at = dataclasses.replace(tiny, reference=copy.deepcopy(model), cache={})
            slopes.append(at.loss_gradients())
            with torch.no_grad():
                flat = torch.nn.utils.parameters_to_vector(model.parameters()) - eta * slopes[-1].mean(0)
                torch.nn.utils.vector_to_parameters(flat, model.parameters())
            kept.append(Checkpoint(step + 1, copy.deepcopy(model.state_dict())))
        final = dataclasses.replace(tiny, model=model, reference=model, cache={})
        w, exact = final.measurement_gradients(), torch.zeros(())
        A = torch.eye(final.dim, dtype=torch.float64) - eta * final.ggn()
        for g in reversed(slopes):
            exact = exact + eta * w @ g.T
            w = w @ A
        trajectory = run(final, kept, [eta] * steps)
        method = wherefrom.SOURCE(trajectory, segments=steps, basis=wherefrom.Exact("primal"))
        found = method.fit(model, wherefrom.Regression(), (x, y)).score(queries).values
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] < 0.05 and errors[1] / errors[0] == pytest.approx(0.5, abs=0.05)


def test_statistics_are_means_over_the_checkpoints():
    p = problem("mlp")
    places = [moved(p, 1), moved(p, 2)]
    base = Problem(p.model, p.task, p.train, batch_size=4)
    problems = [base.at(at.model.state_dict()) for at in places]
    for block, f in kronecker.fit(problems, "true").items():
        names = next(b.shapes for b in base.blocks if b.name == block)
        total = torch.zeros(())
        for at in places:
            g = at.unflatten(at.loss_gradients())
            matrices = torch.cat([g[n].reshape(p.n, p.shapes[n][0], -1) for n in names], 2)  # (N, O, I)
            rotated = f.to_eigenbasis(matrices.unsqueeze(1))
            total = total + rotated.square().mean(0) / 2
        torch.testing.assert_close(f.ekfac, total, rtol=1e-8, atol=1e-10)
    one = kronecker.fit(problems[0], "true")
    assert any((f.ekfac - one[b].ekfac).norm() > 1e-3 for b, f in kronecker.fit(problems, "true").items())


def test_the_model_comes_back_and_misuse_is_named():
    p = problem("mlp")
    before = copy.deepcopy(p.model.state_dict())
    trajectory = run(p, [checkpoint(1, moved(p, 1)), checkpoint(2, p)], [0.1, 0.1])
    method = wherefrom.SOURCE(trajectory, segments=2)
    scores = method.fit(p.model, p.task, p.train).score(p.queries)
    assert all(torch.equal(before[k], t) for k, t in p.model.state_dict().items())
    assert "SOURCE(Trajectory(2 steps of SGD, 2 checkpoints), segments=2" in scores.provenance["solver"]
    with pytest.raises(InputError, match="average must be"):
        wherefrom.SOURCE(trajectory, average="both").fit(p.model, p.task, p.train)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="solver must be"):
        wherefrom.SOURCE(trajectory, segments=2, solver=wherefrom.EKFAC).fit(p.model, p.task, p.train)  # type: ignore[arg-type]
