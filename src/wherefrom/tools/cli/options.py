"""The options that commands share, and what the library makes of them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

import wherefrom
from wherefrom.errors import expected
from wherefrom.solvers.base import with_seed
from wherefrom.tools import loading
from wherefrom.tools.cli.expressions import METHODS, NAMES, bind_arguments, read_expression
from wherefrom.tools.cli.language import Language

CURVATURES = {"ggn": wherefrom.GGN, "hessian": wherefrom.Hessian, "fisher": wherefrom.EmpiricalFisher}
T = TypeVar("T")
S = TypeVar("S", bound="Subject")
Flat = Annotated[T, tyro.conf.arg(name="")]  # a record whose fields are options of the command itself


@dataclass(frozen=True)
class Subject(Language):
    """What is looked at.

    Args:
        target: a function of yours that takes nothing and returns (model, task, training data), or these and queries.
        config: a TOML file with options by these names; those of the command line go first.
        damping: what is added to the diagonal of C before it is inverted: a number, per_example(), relative(0.1)
            or from_training(lr=0.05, steps=300, momentum=0.9); without it per_example(), or with --hf relative(0.1).
        curvature: C, the second derivatives of the training loss or a matrix that stands for them: Gauss-Newton, the
            Hessian itself, or the empirical Fisher matrix.
        parameters: a regular expression: scores are taken through the parameters whose names it matches. Without it
            through all; with --hf through the adapters if there are any, else the MLPs, else (if no layer is called
            mlp) all linear layers but the head.
        batch_size: examples per pass of the model; changes speed and memory only.
        seed: for all random draws, in place of the seeds written in a solver or method.
    """

    target: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="MODULE:FUNCTION")]] = None
    config: str | None = None
    damping: float | str | None = None
    curvature: Literal["ggn", "hessian", "fisher"] = "ggn"
    parameters: str | None = None
    batch_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.parameters or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise expected("parameters", "a regular expression", repr(self.parameters), f"{error}.") from error

    @property
    def name(self) -> str:
        """What is looked at, as it was given.

        Raises:
            InputError: if it was not, or twice.
        """
        names = [name for name in (self.target, self.hf) if name is not None]
        if len(names) != 1:
            got = " and ".join(names) or "neither"
            raise expected("what to look at", "MODULE:FUNCTION, or a language model with --hf", got)
        return names[0]

    def load_target(self) -> loading.Target:
        """Load what is looked at.

        Raises:
            InputError: if it is not given, or given twice; see `loading.load` and `Language.load_language_model`.
        """
        name = self.name
        return self.load_language_model() if self.hf else loading.load(name)

    def complete(self: S, target: loading.Target) -> S:
        """Return these options, with what was left out as the target proposes or else as usual."""
        usual = {"damping": "per_example()", "solver": "auto"} | dict(target.defaults)
        if getattr(self, "method", None) is not None:
            # The method has a damping and a solver of its own, if it needs any.
            usual.pop("damping")
            usual.pop("solver")
        left_out = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) is None}
        return dataclasses.replace(self, **{name: value for name, value in usual.items() if name in left_out})

    def parse_damping(self) -> wherefrom.Damping:
        """Read the damping.

        Raises:
            InputError: if the text does not say one.
        """
        text = "per_example()" if self.damping is None else str(self.damping)
        return wherefrom.Damping.of(read_expression("damping", text, "0.01 or relative(0.1)"))


@dataclass(frozen=True)
class Attributed(Subject):
    """What is looked at, how, and where the results go.

    Args:
        out: the folder of the results. A command that was stopped goes on from what is there.
        solver: such as "CG(preconditioner=EKFAC(), tolerance=0.01)"; auto chooses by size. Without it auto, or
            with --hf EKFAC().
        method: use this method in place of influence functions, with its own settings: "TracIn()",
            "SOURCE(solver=ASTRA())", "TRAK()".
    """

    out: str = "wherefrom-run"
    solver: str | None = None
    method: str | None = None

    def parse_method(self) -> Any:
        """Read the method; one that looks at training has no recorded run yet.

        Raises:
            InputError: if an expression does not say one, or something that belongs inside it is given besides it.
        """
        if self.method is None:
            return self._parse_influence()

        for name in ("solver", "damping", "curvature"):
            if getattr(self, name) != getattr(Attributed, name):
                advice = f"Write it inside, if {self.method} takes one."
                raise expected(name, "left out where a method is given", repr(getattr(self, name)), advice)

        arguments = {"parameters": self.parameters, "batch_size": self.batch_size}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        names = bind_arguments(NAMES, trajectory=None, **arguments)
        method = read_expression("method", self.method, "SOURCE(segments=3)", names)
        if type(method) not in METHODS.values():
            raise expected("method", "a method such as TracIn() or TRAK()", repr(self.method))
        return method if self.seed is None else with_seed(method, self.seed)

    def _parse_influence(self) -> wherefrom.Influence:
        solver: Any = "auto"
        if self.solver not in (None, "auto"):
            solver = read_expression("solver", self.solver, "CG(preconditioner=EKFAC())")
        return wherefrom.Influence(
            solver,
            self.parse_damping(),
            CURVATURES[self.curvature],
            parameters=self.parameters,
            batch_size=self.batch_size,
            seed=self.seed,
        )
