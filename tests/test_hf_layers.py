"""The entries for layers of transformers are there as soon as it is loaded, and it is never loaded for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")

TASK = """
import sys, warnings
import torch

class Mine(wherefrom.Task):
    def outputs(self, model, batch):
        return model(batch[0], use_cache=False).logits[:, :-1]

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs.mT, batch[0][:, 1:], reduction="none").sum(1)

def gpt2():
    sizes = dict(vocab_size=13, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double().eval()

def check(model):
    x = torch.arange(20).view(4, 5) % 13
    with warnings.catch_warnings():
        warnings.simplefilter("error", wherefrom.AttributionWarning)  # of the slow path
        problem = wherefrom.Problem(model, Mine(), (x,), progress=False)
        assert not problem.layout.slow
        rows = problem.loss_gradients((x,)).dense().to_parameters()
    for name, p in problem.parameters.items():
        p.requires_grad_()
        for n in range(4):
            loss = Mine().loss(Mine().outputs(model, (x[n : n + 1],)), (x[n : n + 1],))[0]
            (grad,) = torch.autograd.grad(loss, p)
            assert torch.allclose(rows[name][n], grad, rtol=1e-9, atol=1e-12), name
"""
FIRST = """
import transformers
import wherefrom
assert "wherefrom.hf" not in sys.modules
check(gpt2())
"""
LATER = """
import wherefrom
linear = torch.nn.Linear(3, 2)
wherefrom.Problem(linear, wherefrom.Classification(), (torch.randn(4, 3), torch.zeros(4).long()), progress=False).layout
assert "transformers" not in sys.modules and "wherefrom.hf" not in sys.modules
import transformers, peft
check(gpt2())
check(peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).double())
"""


@pytest.mark.parametrize(
    "code", [pytest.param(FIRST, id="first", marks=pytest.mark.slow), pytest.param(LATER, id="later")]
)
def test_a_task_of_ones_own_finds_the_layers_of_gpt2(code):
    if "peft" in code:
        pytest.importorskip("peft")
    lines = code.strip().splitlines()
    at = lines.index("import wherefrom") + 1
    whole = "\n".join(["import sys", "import torch", *lines[:at], TASK, *lines[at:]])
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
