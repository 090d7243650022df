"""The callback for the transformers Trainer: what it keeps is what was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from wherefrom.errors import InputError  # noqa: E402
from wherefrom.hf import RecorderCallback  # noqa: E402
from wherefrom.training.trajectory import Trajectory  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.body(x)
        return {"loss": nn.functional.cross_entropy(h, labels), "logits": h}


def trained(folder, tmp_path, accumulate=1, **options):
    torch.manual_seed(0)
    x, y = torch.randn(22, 4), torch.randint(3, (22,))
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    model = Net()
    first = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=3,
        learning_rate=0.05,
        weight_decay=0.1,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = RecorderCallback(folder, every=2, **options)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    return model, first, (x, y)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_recorded_run_can_be_trained_again(tmp_path, accumulate):
    model, first, (x, y) = trained(tmp_path / "run", tmp_path, accumulate)
    trajectory = Trajectory.load(tmp_path / "run")
    assert trajectory.optimiser == "AdamW" and trajectory.checkpoints[0].step == 0
    assert [g["weight_decay"] for g in trajectory.groups] == [0.1, 0.0]
    sizes = [4, 4, 4, 4, 4, 2] if accumulate == 1 else [16, 6]
    assert trajectory.order is not None and [len(o) for o in trajectory.order] == 3 * sizes
    for name, t in first.items():
        assert torch.equal(trajectory.checkpoints[0].state[name], t)
    again = Net()
    again.load_state_dict(trajectory.checkpoints[0].state)
    named = dict(again.named_parameters())
    groups = [
        {"params": [named[p] for p in g["parameters"]], **{k: v for k, v in g.items() if k in ("weight_decay", "eps")}}
        for g in trajectory.groups
    ]
    optimiser = torch.optim.AdamW(groups, betas=tuple(trajectory.groups[0]["betas"]))
    kept = {c.step: c.state for c in trajectory.checkpoints}
    for step, (index, rates) in enumerate(zip(trajectory.order, trajectory.rates, strict=True)):
        for group, rate in zip(optimiser.param_groups, rates.tolist(), strict=True):
            group["lr"] = rate
        optimiser.zero_grad()
        parts = index.split(4)  # the Trainer's loss of accumulated batches is the mean of their means
        (sum(again(x[i], y[i])["loss"] for i in parts) / min(accumulate, len(parts))).backward()
        optimiser.step()
        for name, t in kept.get(step + 1, {}).items():
            torch.testing.assert_close(again.state_dict()[name], t, rtol=1e-4, atol=1e-6)
    assert trajectory.steps in kept
    for name, t in model.state_dict().items():
        assert torch.equal(t, kept[trajectory.steps][name])


def test_the_order_can_be_left_out(tmp_path):
    trained(tmp_path / "run", tmp_path, order=False)
    assert Trajectory.load(tmp_path / "run").order is None


def test_a_run_is_not_overwritten(tmp_path):
    trained(tmp_path / "run", tmp_path)
    with pytest.raises(InputError, match="without a recorded run"):
        trained(tmp_path / "run", tmp_path)
