"""The Gauss-Newton matrix, and its products with many vectors at once.

    G = (1/N) sum_n J_n^T H_n J_n,        J_n = dh_n/dtheta,  H_n = d^2 l_n / dh_n^2             (ASTRA appendix B)

Three products, one matrix:

- rows: H_n = sum_k w_nk u_nk u_nk^T by an eigendecomposition, so that G = (1/N) sum_{n,k} w_nk b_nk b_nk^T with the
  factored rows b_nk = J_n^T u_nk. Costs one forward and K backward passes, once if the rows fit in memory; after that a
  product is two contractions and no pass of the model. For outputs of moderate size.
- jvp: forward-mode then reverse-mode, vmapped over right-hand sides that share one forward pass. For any outputs. A
  model without forward-mode derivatives takes plain autograd instead, one right-hand side at a time: see `plain`.
- finite differences: J v ~ (h(theta + d v) - h(theta - d v)) / 2d, three forwards and one backward per right-hand side
  (Klochkov & Liu 2024). For models without forward-mode derivatives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from wherefrom.curvature.base import Need, RowCurvature
from wherefrom.curvature.plain import (
    GAPS,
    Linearised,
    NotDifferentiableError,
    are_adjoint,
    check_curvature,
    differentiate_by_differences,
    is_gap,
    multiply_by_second_derivative,
)
from wherefrom.data.examples import Batch, take
from wherefrom.errors import AttributionWarning, InputError, UnsupportedError, expected
from wherefrom.model.contract import check_slope
from wherefrom.model.problem import Problem
from wherefrom.persample import vectors
from wherefrom.persample.directions import Directions
from wherefrom.persample.gradients import Gradients
from wherefrom.persample.vectors import Vectors
from wherefrom.surroundings import jvp

How = Literal["auto", "rows", "jvp", "finite-difference"]
DRAWS = 8  # labels drawn of each example for the mean eigenvalues, at most
LIMIT = 128  # outputs per example up to which rows are the better product
CACHED = 2**26  # bytes of right-hand sides that a CPU takes through the model together; more of them are slower


class GGN(RowCurvature):
    """The Gauss-Newton matrix of the training loss.

    Args:
        problem: the model, task, training data and parameters.
        product: how C v is computed; "auto" takes rows for up to 128 outputs per example, else jvp. The result is the
            same matrix, but for the truncation error of finite differences (about 1e-4 relative in float32).
        delta: length of the finite-difference step in parameter space, relative to max(1, |theta|); None: eps^(1/3).
    """

    def __init__(self, problem: Problem, product: How = "auto", delta: float | None = None):
        super().__init__(problem)
        if product not in ("auto", "rows", "jvp", "finite-difference"):
            raise expected("product", "'auto', 'rows', 'jvp' or 'finite-difference'", repr(product))
        self.how, self.delta = product, delta

    @property
    def psd(self) -> bool:
        """Positive semi-definite unless the loss is found to be non-convex in the outputs."""
        return self._convex

    # What was learnt of the model and the loss while products ran; it changes the way to a product, never the product.
    _convex = True
    _seen = False  # whether an output Hessian has been looked at
    _forward = True  # whether the model is not known to lack forward mode
    _loss_is_known = False  # whether the loss's second derivative has been checked
    _push = True  # whether its backward pass is not known to lack a derivative

    @property
    def offers(self) -> frozenset[Need]:
        """Rows only where there are few enough of them."""
        return frozenset(Need) if self._choose_product() == "rows" else frozenset({Need.MATVEC, Need.KRONECKER})

    def _choose_product(self) -> str:
        if self.how == "auto":
            return "rows" if self._outputs <= LIMIT else "jvp"
        return self.how

    def rows(self, batch: Batch) -> Gradients:
        """Return K rows for each example, K the number of outputs, weighted by eigenvalues of the output Hessian."""
        weights: list[Tensor] = []

        def cotangents(outputs: Tensor, batch: Batch) -> Tensor:
            values, u = self._decompose_output_hessian(outputs, batch)
            weights.append(values)
            # Directions without curvature are left out, above all those at padding, where outputs may be anything.
            flat = values.abs() <= 1e-14 * values.abs().amax(1, keepdim=True)  # (n, K)
            u = u.masked_fill(flat.T.unsqueeze(2), 0.0)
            return u.reshape(len(u), *outputs.shape).to(outputs.dtype)

        gradients = self.problem.gradients(batch, cotangents)
        return Gradients(gradients.blocks, gradients.rows, weights[0])

    def _decompose_output_hessian(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (n, K), largest first, and eigenvectors (K, n, K); a negative one is noted."""
        values, directions = torch.linalg.eigh(self.output_hessian(outputs, batch).double())
        noise = 1e-6 if self.problem.dtype == torch.float32 else 1e-12
        if float(values.min()) < -noise * float(values.abs().max()) and self._is_concave(outputs, batch):
            self._convex = False
        self._seen = True
        return values.flip(-1), directions.flip(-1).permute(2, 0, 1)

    def _is_concave(self, outputs: Tensor, batch: Batch) -> bool:
        """Whether a negative eigenvalue of an output Hessian is more than rounding.

        diag(p) - p p^T of a confident classifier is the small difference of numbers of size 1: its error is eps of
        those, however small the difference. So the Hessian is made in float64 where the loss takes that, and its
        error is measured by the Hessian at outputs of zero, where nothing cancels, times the number of outputs, as p
        is then 1 / K.
        """
        h = outputs.detach()
        try:
            values = torch.linalg.eigvalsh(self.output_hessian(h.double(), batch).double())
            eps = torch.finfo(torch.float64).eps
        except (RuntimeError, InputError):  # a loss with numbers of its own in the model's dtype
            values = torch.linalg.eigvalsh(self.output_hessian(h, batch).double())
            eps = torch.finfo(h.dtype).eps
        neutral = self.output_hessian(torch.zeros_like(h), batch).double().nan_to_num(0.0, 0.0, 0.0)
        size = max(float(values.abs().max()), float(torch.linalg.eigvalsh(neutral).abs().max()))
        return float(values.min()) < -16 * eps * values.shape[-1] * size

    def product(self, v: Directions, index: Tensor | None = None) -> Directions:
        """Return C v over all training examples, or over those of the given numbers."""
        how = self._choose_product()
        if how == "rows" and not self._jvp_is_cheaper(len(v), index):
            return self._product_by_rows(v, index)
        if how == "rows":
            try:
                return self._product_by_autograd(v, index, self._by_jvp)
            except GAPS as error:  # no forward mode or no vmap; rows report what is wrong otherwise
                if not is_gap(error):
                    raise
                self._forward = False
            return self._product_by_rows(v, index)
        return self._product_by_autograd(v, index, self._by_jvp_or_plain if how == "jvp" else self._by_differences)

    def _product_by_rows(self, v: Directions, index: Tensor | None) -> Directions:
        if index is None or self._all_rows is not None:
            return super().product(v, index)
        # Over a minibatch rows are made for it alone, in the form that these contractions want.
        v = v.dense()
        parts = (
            self.rows(self.problem.batch(some)).product(v, len(index))
            for some in index.split(self.problem.train.batch_size)
        )
        total = next(parts)
        for part in parts:
            total.add_(1.0, part)
        return total

    def _product_by_autograd(
        self, v: Directions, index: Tensor | None, by: Callable[[Batch, Vectors], Vectors]
    ) -> Directions:
        """Return C v by a function that sums over a batch, of parameter-shaped tensors as autograd wants them."""
        tangents = {name: t.contiguous() for name, t in v.to_parameters().items()}
        blocks = self.problem.blocks
        return self.mean_over_batches(lambda batch: Directions.from_parameters(blocks, by(batch, tangents)), index)

    def _by_jvp_or_plain(self, batch: Batch, v: Vectors) -> Vectors:
        """Sum by jvp; where the model has no forward mode, by double backward; where it has no such, by differences."""
        if self._forward:
            try:
                return self._by_jvp(batch, v)
            except GAPS as error:
                if not is_gap(error):
                    raise
        if self._push:
            try:
                product = self._by_plain(batch, v, Linearised.push)
            except NotDifferentiableError:
                self._push = False
                warnings.warn(
                    "the model has operations without forward-mode or second derivatives: products with the "
                    "Gauss-Newton matrix take central differences, whose relative error is about "
                    f"{torch.finfo(self.problem.dtype).eps ** (2 / 3):.0e}. product='rows' is exact.",
                    AttributionWarning,
                    stacklevel=2,
                )
            else:
                self._forward = False
                return product
        self._forward = False
        return self._by_differences(batch, v)

    def _by_plain(self, batch: Batch, v: Vectors, push: Callable[[Linearised, Vectors], Tensor]) -> Vectors:
        """Sum J^T H J v over a batch by plain autograd, one right-hand side at a time."""
        outputs, theta = self.problem.functional(batch)
        at, parts = Linearised(outputs, theta), []
        self._check_loss(at.value, batch)
        for one in ({name: t[0] for name, t in some.items()} for some in vectors.chunk(v, 1)):
            t = push(at, one)
            if not parts and push is Linearised.push:
                at.check(one, t)
            u = multiply_by_second_derivative(self._loss(batch), at.value, t)
            parts.append({name: t.unsqueeze(0) for name, t in at.pull(u).items()})
        return vectors.concatenate(parts)

    def _jvp_is_cheaper(self, Q: int, index: Tensor | None) -> bool:
        """Whether Q right-hand sides are too few to make rows for them alone.

        Rows cost K backward passes to the activations and up to two forwards' worth a right-hand side for the
        contractions; jvp two forwards' worth each for J v and for J^T u: more, once Q > K / 2.
        """
        lasting = self._all_rows is not None or (index is None and self._fits)
        return self.how == "auto" and not lasting and self._forward and 2 * Q <= self._outputs

    def output_hessian(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Differentiate each example's loss twice in its outputs, flattened: (n, K, K)."""
        self._check_loss(outputs, batch)
        h = outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.problem.per_example(self.problem.task.loss(h, batch), batch, "loss")
            (slope,) = torch.autograd.grad(loss.sum(), h, create_graph=True)
        flat = slope.reshape(len(slope), -1)  # (n, K)
        if not flat.requires_grad:
            return flat.new_zeros(*flat.shape, flat.shape[1])
        columns = [
            torch.autograd.grad(flat[:, k].sum(), h, retain_graph=True)[0].reshape(len(flat), -1)
            for k in range(flat.shape[1])
        ]
        hessian = torch.stack(columns, 1).detach()
        check_slope(hessian, "loss", "second derivative")
        return hessian

    def _mean_eigenvalues(self) -> dict[str, float]:
        """Estimate, without rows, by the mean squared length of gradients of drawn labels.

        The second moment of these gradients is C, for a likelihood.

        A drawn gradient costs one backward pass where a probe costs a product. Eight labels of each example are drawn,
        fewer where many examples share the error: one from 8,192 on, as each draw is a pass.
        """
        if self._choose_product() == "rows":
            return super()._mean_eigenvalues()
        problem, rng = self.problem, torch.Generator().manual_seed(0)
        draws = min(DRAWS, -(-DRAWS * 1024 // len(problem.train)))
        sums = dict.fromkeys((b.name for b in problem.blocks), 0.0)
        try:
            for _ in range(draws):
                for _, batch in problem.batches(what="mean eigenvalues"):
                    for name, r in problem.sampled_gradients(batch, rng).rows.items():
                        sums[name] += float(r.square_norms().double().sum()) / (draws * len(problem.train))
        except UnsupportedError:  # labels cannot be drawn
            return super()._mean_eigenvalues()
        return {b.name: sums[b.name] / b.size for b in problem.blocks}

    @property
    def _outputs(self) -> int:
        """The numbers in the outputs of one example."""
        if not hasattr(self, "_size"):
            self.problem.examine()  # what is wrong with the model is told there
            with self.problem.observed() as model, torch.no_grad():
                self._size = self.problem.outputs(model, self.problem.batch([0])).numel()
        return self._size

    def _by_jvp(self, batch: Batch, v: Vectors) -> Vectors:
        """Sum J^T H J v over a batch, as many right-hand sides as fit in memory to one forward pass."""
        outputs, theta = self.problem.functional(batch)
        parts = []
        together = rhs_at_once(self.problem, outputs, theta) if vectors.count(v) > 1 else 1
        for some in vectors.chunk(v, together):

            def linearised(p: Vectors, some: Vectors = some) -> Any:
                out: Any = (None, 0)  # outputs once, tangents for each right-hand side
                return vmap(lambda w: jvp(outputs, (p,), (w,)), out_dims=out)(some)  # (n, ...), (Q, n, ...)

            h, pull, t = vjp(linearised, theta, has_aux=True)  # pyright: ignore[reportAssignmentType]
            self._check_loss(h, batch)
            if self.how == "auto" and self._outputs <= LIMIT and not self._seen:
                self._decompose_output_hessian(h, batch)  # in place of rows, which find out whether the loss is convex
            u = vmap(lambda t, h=h: jvp(grad(self._loss(batch)), (h,), (t,))[1])(t)
            pulled = vmap(lambda u, pull=pull: pull(u)[0])(u)
            _check_adjoint(u, t, pulled, some)
            parts.append(pulled)
        return vectors.concatenate(parts)

    def _by_differences(self, batch: Batch, v: Vectors) -> Vectors:
        """Do the same with J v by central differences."""
        outputs, theta = self.problem.functional(batch)

        def push(_at: Linearised, one: Vectors) -> Tensor:
            with torch.no_grad():
                return differentiate_by_differences(outputs, theta, one, self.delta)

        return self._by_plain(batch, v, push)

    def _check_loss(self, outputs: Tensor, batch: Batch) -> None:
        """Refuse, on the first batch, a loss whose second derivative autograd does not know."""
        if not self._loss_is_known:
            self.problem.per_example(self.problem.task.loss(outputs.detach(), batch), batch, "loss")
            some = take(batch, torch.arange(min(2, len(outputs)), device="cpu"))  # outputs in float64 may be large
            check_curvature(self._loss(some), outputs[:2])
            self._loss_is_known = True

    def _loss(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda h: self.problem.task.loss(h, batch).sum()


def _check_adjoint(u: Tensor, t: Tensor, pulled: Vectors, v: Vectors) -> None:
    """Compare u . J v with J^T u . v, which costs nothing here.

    Raises:
        NotDifferentiableError: if forward and reverse mode are not each other's transpose.
    """
    here = (u * t).flatten(1).sum(1, dtype=torch.float64)
    scale = vectors.norm(pulled) * vectors.norm(v)
    for one in zip(here.tolist(), vectors.dot(pulled, v).tolist(), scale.tolist(), strict=True):
        if not are_adjoint(*one, dtype=t.dtype):
            raise NotDifferentiableError("The forward-mode derivative of the model does not fit its backward pass.")


def rhs_at_once(problem: Problem, outputs: Callable[[Vectors], Tensor], theta: Vectors) -> int:
    """Count the right-hand sides that go together: each needs the tensors that one backward pass keeps."""
    needed = 0

    def pack(t: Tensor) -> None:  # a tensor given back would hold the graph that holds it, for good
        nonlocal needed
        needed += t.numel() * t.element_size()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs({name: t.clone().requires_grad_() for name, t in theta.items()})
    room = problem.memory / 4 if problem.device.type != "cpu" else min(problem.memory / 4, CACHED)
    return max(1, int(room / max(1, needed)))
