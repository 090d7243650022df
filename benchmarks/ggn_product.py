"""A Gauss-Newton product over one minibatch, against as many plain forward and backward passes as right-hand sides.

    python -m benchmarks.ggn_product mlp:256 cnn:256 cnn:64

The product is ``GGN(problem).product(v, index)`` of a new GGN, so with nothing kept and rows included; only the
problem's layout, found once per problem, is there already. ``cached`` is ``product(v)`` with the minibatch's rows in
memory, ``vmap`` a plain vmap of torch.func's jvp and vjp. A pass is the gradient of the mean loss in all parameters.
All rows of a table are measured in turn, round after round in one process, and a cell is the median over rounds.
Useful flops of one right-hand side are those of J v and of J^T u with every other factor given, each as many as a
forward pass without biases:

    4 B P,   P = sum over layers of positions x outputs x inputs

The share of the peak compares them with a float32 product of square matrices in the same rounds; an order that needs
fewer flops than these may exceed it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks import problems
from benchmarks.harness import CACHE, machine, run

RHS = (1, 10, 100)
SQUARE = 1536  # side of the matrices that measure the peak
VMAPPED = 20  # right-hand sides of one vmap of the plain product: more of them are slower and do not fit


def load(name: str) -> tuple[Any, Any, Any]:
    """A trained model and its training data (x, y): ``mlp``, MNIST's multilayer perceptron, or ``cnn``."""
    import torch

    p = problems.load("mnist")
    if name == "mlp":
        return p.model(), p.x, p.y
    x, file = p.x.view(-1, 1, 28, 28), CACHE / "ggn_product_cnn.pt"
    torch.manual_seed(0)
    model = cnn()
    if not file.exists():
        torch.save(problems.train(model, x[:2000], p.y[:2000], 0.03, 1e-3, 64, 10), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval(), x, p.y


def cnn() -> Any:
    """Two convolutions with pooling and two linear layers for 28 x 28 images, 105,866 parameters."""
    from torch import nn

    layers: list[nn.Module] = []
    for i, o in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))


def multiply_adds(model: Any, x: Any) -> int:
    """P of the module's docstring: multiply-adds of the forward pass of one example, biases left out."""
    import torch

    total = 0

    def count(layer: Any, args: Any, output: Any) -> None:
        nonlocal total
        weight = layer.weight
        total += output[0].numel() // len(weight) * weight.numel()  # positions x outputs x inputs

    handles = [m.register_forward_hook(count) for m in model.modules() if getattr(m, "weight", None) is not None]
    with torch.no_grad():
        model(x[:1])
    for handle in handles:
        handle.remove()
    return total


def measure(model: str, batch: int, rounds: int, products: list[str]) -> dict[str, Any]:
    """CPU seconds of every row in every round. To be run by `harness.run`.

    Returns:
        ``seconds``: name to one number a round; ``multiply_adds``: P; ``error``: largest relative difference to the
        plain vmap.
    """
    import torch
    from torch.func import functional_call, grad, jvp, vjp, vmap

    import wherefrom

    net, x, y = load(model)
    problem = wherefrom.Problem(net, wherefrom.Classification(), (x, y), batch_size=max(256, batch), progress=False)
    index = torch.randint(len(x), (batch,), generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    right = {name: torch.randn(RHS[-1], *shape, generator=rng) for name, shape in problem.shapes.items()}
    xb, yb, weights = x[index], y[index], list(net.parameters())
    theta = {name: p.detach() for name, p in net.named_parameters()}

    def passes(count: int) -> None:
        for _ in range(count):
            torch.autograd.grad(torch.nn.functional.cross_entropy(net(xb), yb), weights)

    def plain(v: dict[str, Any]) -> dict[str, Any]:
        def outputs(p: dict[str, Any]) -> Any:
            return functional_call(net, p, (xb,))

        loss = lambda h: torch.nn.functional.cross_entropy(h, yb)  # noqa: E731
        h, pull = vjp(outputs, theta)[:2]

        def one(w: dict[str, Any]) -> dict[str, Any]:
            tangent = jvp(outputs, (theta,), (w,))[1]
            return pull(jvp(grad(loss), (h,), (tangent,))[1])[0]

        return vmap(one, chunk_size=VMAPPED)(v)

    kept = wherefrom.GGN(
        wherefrom.Problem(net, wherefrom.Classification(), (xb, yb), batch_size=batch, progress=False), "rows"
    )
    list(kept.gradients())

    def fresh(how: str, v: wherefrom.Directions) -> wherefrom.Directions:
        return wherefrom.GGN(problem, how).product(v, index)  # type: ignore[arg-type]

    rows: dict[str, Callable[[], Any]] = {
        "passes": lambda: passes(RHS[-1]),
        "matmul": lambda a=torch.randn(SQUARE, SQUARE): a @ a,
        "vmap 100": lambda: plain(right),
    }
    for q in RHS:
        some = wherefrom.Directions.from_parameters(problem.blocks, {name: t[:q] for name, t in right.items()}).clone()
        for how in products:
            rows[f"{how} {q}"] = lambda how=how, some=some: fresh(how, some)
        rows[f"cached {q}"] = lambda some=some: kept.product(some)
    wanted = plain(right)
    directions = wherefrom.Directions.from_parameters(problem.blocks, right)
    images = [fresh(how, directions) for how in products] + [kept.product(directions)]
    error = max(
        float((found[name] - t).norm() / t.norm())
        for found in (image.to_parameters() for image in images)
        for name, t in wanted.items()
    )
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, f in rows.items():
            start, times = time.process_time(), 0
            while times == 0 or time.process_time() - start < 0.1:
                f()
                times += 1
            seconds[name].append((time.process_time() - start) / times)
    return {"seconds": seconds, "multiply_adds": multiply_adds(net, x), "error": error, "load": machine()["load"]}


def table(name: str, batch: int, found: dict[str, Any]) -> str:
    """The measurements as a table, with ratios to the passes and shares of the peak."""
    seconds = found["seconds"]
    peak = 2 * SQUARE**3 / median(seconds["matmul"])
    unit = median(seconds["passes"])
    lines = [
        f"{name}, minibatch {batch}: {RHS[-1]} passes {unit:.3f} s; peak {peak / 1e9:.0f} Gflop/s; P = "
        f"{found['multiply_adds']:,}; largest difference between rows {found['error']:.1e}; load {found['load']:.1f}\n",
        "| product | right-hand sides | CPU s | against as many passes (range over rounds) | useful flops of peak |",
        "|---|---|---|---|---|",
    ]
    for row, times in seconds.items():
        how, _, count = row.partition(" ")
        if not count:
            continue
        q, share = int(count), RHS[-1] / int(count)
        ratios = [t * share / p for t, p in zip(times, seconds["passes"], strict=True)]
        useful = 4 * batch * found["multiply_adds"] * q / median(times) / peak
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {how} | {q} | {median(times):.4f} | {spread} | {useful:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print a table for each model and minibatch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["mlp:256", "cnn:256", "cnn:64"], help="model:minibatch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--products", nargs="+", default=["auto", "rows", "jvp"])
    args = parser.parse_args()
    for case in args.cases:
        name, batch = case.split(":")
        options = {"model": name, "batch": int(batch), "rounds": args.rounds, "products": args.products}
        print(table(name, int(batch), run("benchmarks.ggn_product:measure", options).result), flush=True)


if __name__ == "__main__":
    main()
