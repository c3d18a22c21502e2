"""Who is compared: this package, the floor, torch in its forms, oneDNN; each as calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm_ext
import batchnorm_ext.functional
from batchnorm_ext._extension import backend

from .problem import Problem, wrong

KERNEL_OPS = ("forward", "backward", "eval")
# relu(batch_norm(x) + residual), as at the end of a residual block: forward and backward together.
FUSED_OPS = ("act_forward_backward",)
MODULE_OPS = ("module_forward", "module_forward_backward", "module_eval")
# Ops that record no graph. The mode is set around the timed calls, not in them: to switch it in Python takes longer than
# the floor's copy of a tiny tensor.
NO_GRAD_OPS = (*KERNEL_OPS, "module_eval")

# The op of the float64 truth that a module op's results are held against.
TRUTH_OF = {
    "module_forward": "forward",
    "module_eval": "eval",
    "module_forward_backward": "backward",
}

# What each op must at least move, in multiples of the input's bytes.
MINIMUM_TRAFFIC = {
    "forward": 2,
    "eval": 2,
    "backward": 3,
    "act_forward_backward": 7,
    "module_forward": 2,
    "module_eval": 2,
    "module_forward_backward": 5,
}


class NotApplicable(Exception):
    """This contender does not do this op on this case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    """An op made ready to be called again and again.

    Attributes
    ----------
    call
        Runs the op on the buffer set of the given index.
    read
        Names the results of a call: ``y``; ``dx``, ``dweight`` and ``dbias``, of fused calls
        ``dresidual`` too. None where there is nothing to verify (the floor).
    """

    call: Callable[[int], Any]
    read: Callable[[Any], dict[str, Tensor]] | None


def _named(*names: str) -> Callable[[Any], dict[str, Tensor]]:
    return lambda results: dict(
        zip(names, (results,) if isinstance(results, Tensor) else results, strict=True)
    )


OUTPUT = _named("y")
GRADIENTS = _named("dx", "dweight", "dbias")
FUSED_GRADIENTS = _named("dx", "dresidual", "dweight", "dbias")


def _with_running(problem: Problem, read: Callable[[Any], dict[str, Tensor]]) -> Any:
    """`read`, and the running statistics that the call has updated."""
    return lambda results: {
        **read(results),
        "running_mean": problem.running_mean.clone(),
        "running_var": problem.running_var.clone(),
    }


class Contender:
    """An implementation of batch norm. Subclasses define a method for each op they have."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    # Whether preparing it takes seconds for each case.
    compiles: ClassVar[bool] = False

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None."""
        return None

    def prepare(self, problem: Problem, op: str) -> Prepared:
        """Make an op ready.

        Raises
        ------
        NotApplicable
            Where the contender does not have the op, or not for this case.
        """
        method = getattr(self, op, None)
        if method is None:
            raise NotApplicable(f"{self.name} has no {op}")
        return method(problem)


class ModuleOps:
    """Module ops of a contender that comes as an `nn.Module`, parameters and all."""

    def module(self, problem: Problem) -> nn.Module:
        raise NotImplementedError

    def _trained(self, problem: Problem, training: bool) -> nn.Module:
        module = self.module(problem).train(training)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(module, name).copy_(getattr(problem, name))
        return module

    def module_forward(self, problem: Problem) -> Prepared:
        module = self._trained(problem, training=True)
        x = [one.detach().requires_grad_() for one in problem.x]
        return Prepared(lambda i: module(x[i]), lambda y: {"y": y.detach()})

    def module_eval(self, problem: Problem) -> Prepared:
        module = self._trained(problem, training=False)
        return Prepared(lambda i: module(problem.x[i]), OUTPUT)

    def module_forward_backward(self, problem: Problem) -> Prepared:
        module = self._trained(problem, training=True)
        wanted = [(one.detach().requires_grad_(), module.weight, module.bias) for one in problem.x]

        def call(i: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(wanted[i][0]), wanted[i], problem.dy[i])

        return Prepared(call, GRADIENTS)


def torch_module(problem: Problem) -> nn.Module:
    """The `nn.BatchNorm` of the case's dimensions, in the parameters' dtype and device."""
    dimensions = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    module = dimensions[problem.x[0].dim()](problem.case.channels, problem.eps, problem.momentum)
    return module.to(problem.device, problem.weight.dtype)


def functional_forward(function: Callable[..., Tensor], problem: Problem, training: bool) -> Any:
    """A call of something with the signature of `F.batch_norm`."""
    p = problem

    def call(i: int) -> Tensor:
        return function(
            *(p.x[i], p.running_mean, p.running_var, p.weight, p.bias),
            training,
            p.momentum,
            p.eps,
        )

    return call


def act_forward_backward(function: Callable[..., Tensor], problem: Problem) -> Prepared:
    """Both directions of `function`, which takes what `F.batch_norm` takes, and the residual last."""
    p = problem
    weight, bias = (one.detach().requires_grad_() for one in (p.weight, p.bias))
    inputs = [
        (x.detach().requires_grad_(), residual.detach().requires_grad_())
        for x, residual in zip(p.x, p.residual, strict=True)
    ]

    def call(i: int) -> tuple[Tensor, ...]:
        x, residual = inputs[i]
        y = function(
            *(x, p.running_mean, p.running_var, weight, bias, True, p.momentum, p.eps), residual
        )
        return torch.autograd.grad(y, (x, residual, weight, bias), p.dy[i])

    return Prepared(call, FUSED_GRADIENTS)


def batch_norm_add_relu(*given: Any) -> Tensor:
    """Torch's operators one by one, in place where a network can write them so."""
    *arguments, residual = given
    return F.relu_(F.batch_norm(*arguments).add_(residual))


class BatchnormExt(ModuleOps, Contender):
    """This package."""

    name = "batchnorm_ext"

    def forward(self, problem: Problem) -> Prepared:
        call = functional_forward(batchnorm_ext.functional.batch_norm, problem, True)
        return Prepared(call, _with_running(problem, OUTPUT))

    def eval(self, problem: Problem) -> Prepared:
        call = functional_forward(batchnorm_ext.functional.batch_norm, problem, False)
        return Prepared(call, OUTPUT)

    def backward(self, problem: Problem) -> Prepared:
        p, native = problem, backend()
        saved = [
            native.forward(x, p.weight, p.bias, None, None, None, True, p.momentum, p.eps, False, 1)
            for x in p.x
        ]
        return Prepared(
            lambda i: native.backward(
                *(p.dy[i], p.x[i], p.weight, saved[i][1], saved[i][2], True, True),
                p.weight.dtype,
                p.bias.dtype,
            ),
            GRADIENTS,
        )

    def act_forward_backward(self, problem: Problem) -> Prepared:
        def fused(*given: Any) -> Tensor:
            *arguments, residual = given
            return batchnorm_ext.functional.batch_norm_act(
                *arguments, residual=residual, activation="relu"
            )

        return act_forward_backward(fused, problem)

    def module(self, problem: Problem) -> nn.Module:
        return batchnorm_ext.convert_batchnorm(torch_module(problem))


class BatchnormExtFused(Contender):
    """This package with sums and activations in batch norm's calls: whole networks only."""

    name = "batchnorm_ext_fused"


class Floor(Contender):
    """Torch's own copy or sum: what it costs to move the least bytes through memory."""

    name = "floor"

    def forward(self, problem: Problem) -> Prepared:
        return Prepared(lambda i: problem.x[i].clone(), None)

    eval = forward
    module_forward = forward
    module_eval = forward

    def backward(self, problem: Problem) -> Prepared:
        return Prepared(lambda i: torch.add(problem.x[i], problem.dy[i]), None)

    def act_forward_backward(self, problem: Problem) -> Prepared:
        p = problem

        def call(i: int) -> tuple[Tensor, ...]:
            return torch.add(p.x[i], p.residual[i]), p.x[i].clone(), p.dy[i].clone()

        return Prepared(call, None)

    def module_forward_backward(self, problem: Problem) -> Prepared:
        x = [one.detach().requires_grad_() for one in problem.x]
        return Prepared(
            lambda i: torch.autograd.grad(x[i].clone(), x[i], problem.dy[i])[0] + problem.x[i], None
        )


class TorchEager(ModuleOps, Contender):
    """`torch.nn.functional.batch_norm` as it comes, with cuDNN where torch picks it."""

    name = "torch_eager"
    cudnn = True

    def forward(self, problem: Problem) -> Prepared:
        return self._forward(problem, training=True, read=_with_running(problem, OUTPUT))

    def eval(self, problem: Problem) -> Prepared:
        return self._forward(problem, training=False, read=OUTPUT)

    def _forward(self, problem: Problem, training: bool, read: Any) -> Prepared:
        call = functional_forward(F.batch_norm, problem, training)
        if self.cudnn:
            return Prepared(call, read)

        def without_cudnn(i: int) -> Tensor:
            with torch.backends.cudnn.flags(enabled=False):
                return call(i)

        return Prepared(without_cudnn, read)

    def backward(self, problem: Problem) -> Prepared:
        p, aten = problem, torch.ops.aten
        saved = [
            aten._batch_norm_impl_index(
                *(x, p.weight, p.bias, p.running_mean, p.running_var),
                *(True, p.momentum, p.eps, self.cudnn),
            )
            for x in p.x
        ]

        def call(i: int) -> tuple[Tensor, ...]:
            _, mean, inv_std, reserve, implementation = saved[i]
            return aten._batch_norm_impl_index_backward(
                *(implementation, p.x[i], p.dy[i], p.weight, p.running_mean, p.running_var),
                *(mean, inv_std, True, p.eps, [True, True, True], reserve),
            )

        return Prepared(call, GRADIENTS)

    def act_forward_backward(self, problem: Problem) -> Prepared:
        if not self.cudnn:
            raise NotApplicable("the switch is a context manager, which backward leaves")
        return act_forward_backward(batch_norm_add_relu, problem)

    def module(self, problem: Problem) -> nn.Module:
        return torch_module(problem)


class TorchEagerNoCudnn(TorchEager):
    """Torch's native CUDA kernels, which it also falls back to from cuDNN."""

    name = "torch_eager_no_cudnn"
    devices = ("cuda",)
    cudnn = False

    def module(self, problem: Problem) -> nn.Module:
        raise NotApplicable("the switch is a context manager, whose cost is not the module's")


class TorchCompile(ModuleOps, Contender):
    """Inductor's kernels for the same functions, compiled for each shape."""

    name = "torch_compile"
    compiles = True

    def __init__(self) -> None:
        self._compiled_for: tuple[Any, ...] = ()
        self._functions: dict[str, Callable[..., Any]] = {}

    def missing(self) -> str | None:
        return _compiler_missing()

    def _compiled(
        self, problem: Problem, op: str, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        """`function` compiled anew for each case, before Dynamo gives up on too many shapes."""
        wanted = (problem.case, torch.get_num_threads())
        if wanted != self._compiled_for:
            torch._dynamo.reset()
            self._functions.clear()
            self._compiled_for = wanted
        if op not in self._functions:
            self._functions[op] = torch.compile(function, dynamic=False)
        return self._functions[op]

    def forward(self, problem: Problem) -> Prepared:
        compiled = self._compiled(problem, "forward", F.batch_norm)
        call = functional_forward(compiled, problem, True)
        return Prepared(call, _with_running(problem, OUTPUT))

    def eval(self, problem: Problem) -> Prepared:
        compiled = self._compiled(problem, "eval", F.batch_norm)
        return Prepared(functional_forward(compiled, problem, False), OUTPUT)

    def backward(self, problem: Problem) -> Prepared:
        p, aten = problem, torch.ops.aten
        saved = [
            aten.native_batch_norm(x, p.weight, p.bias, None, None, True, p.momentum, p.eps)
            for x in p.x
        ]
        compiled = self._compiled(
            problem,
            "backward",
            lambda dy, x, weight, mean, inv_std: aten.native_batch_norm_backward(
                dy, x, weight, None, None, mean, inv_std, True, p.eps, [True, True, True]
            ),
        )

        def call(i: int) -> tuple[Tensor, ...]:
            return compiled(p.dy[i], p.x[i], p.weight, *saved[i][1:])

        return Prepared(call, GRADIENTS)

    def act_forward_backward(self, problem: Problem) -> Prepared:
        compiled = self._compiled(problem, "act_forward_backward", batch_norm_add_relu)
        return act_forward_backward(compiled, problem)

    def module(self, problem: Problem) -> nn.Module:
        torch._dynamo.reset()
        return torch.compile(torch_module(problem), dynamic=False)


@cache
def _compiler_missing() -> str | None:
    """Why torch.compile cannot work here: found out by compiling something small."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(4, device=device))
    except Exception as error:  # whatever Inductor raises, it is the reason to report
        return f"torch.compile does not work here: {first_line(error)}"
    return None


class OneDnn(Contender):
    """oneDNN through torch's mkldnn tensors, in the blocked layout that convolutions pick."""

    name = "onednn"
    devices = ("cpu",)

    def missing(self) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "torch was built without oneDNN"

    @staticmethod
    def _blocked(x: Tensor) -> Tensor:
        """`x` in the layout a convolution hands to batch norm: out of one that changes nothing."""
        channels = x.size(1)
        ones = torch.ones(channels, *(1,) * (x.dim() - 1), dtype=x.dtype).to_mkldnn()
        convolution = F.conv2d if x.dim() == 4 else F.conv3d
        return convolution(x.contiguous().to_mkldnn(), ones, groups=channels)

    def _inputs(self, problem: Problem, training: bool) -> list[Tensor]:
        case = problem.case
        dimensions = (4,) if training else (4, 5)
        if case.layout != "contiguous" or len(case.shape) not in dimensions:
            raise NotApplicable("torch has oneDNN's batch norm for its own layout, training in 2d")
        if case.dtype not in ("float32", "bfloat16"):
            raise NotApplicable(f"mkldnn tensors have no batch norm in {case.dtype}")
        with torch.no_grad():
            return [self._blocked(x) for x in problem.x]

    @staticmethod
    def _dense(results: Any) -> list[Tensor]:
        found = (results,) if isinstance(results, Tensor) else results
        return [one.to_dense() if one.is_mkldnn else one for one in found]

    def _forward(self, problem: Problem, training: bool, read: Any) -> Prepared:
        blocked = self._inputs(problem, training)
        p = problem

        def call(i: int) -> Tensor:
            return F.batch_norm(
                *(blocked[i], p.running_mean, p.running_var, p.weight, p.bias),
                training,
                p.momentum,
                p.eps,
            )

        return Prepared(call, lambda y: read(self._dense(y)))

    def forward(self, problem: Problem) -> Prepared:
        return self._forward(problem, training=True, read=_with_running(problem, OUTPUT))

    def eval(self, problem: Problem) -> Prepared:
        return self._forward(problem, training=False, read=OUTPUT)

    def backward(self, problem: Problem) -> Prepared:
        blocked = self._inputs(problem, training=True)
        p, aten = problem, torch.ops.aten
        dy = [self._blocked(one) for one in p.dy]
        running = (p.running_mean, p.running_var)
        saved = [
            aten.native_batch_norm(x, p.weight, p.bias, *running, True, p.momentum, p.eps)
            for x in blocked
        ]
        return Prepared(
            lambda i: aten.native_batch_norm_backward(
                *(dy[i], blocked[i], p.weight, *running, *saved[i][1:]),
                *(True, p.eps, [True, True, True]),
            ),
            lambda results: GRADIENTS(self._dense(results)),
        )


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@dataclass
class Outcome:
    """What became of the contenders of one measurement."""

    ready: dict[str, Prepared] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def results_of(prepared: Prepared, op: str) -> dict[str, Tensor]:
    """What one call finds; nothing where there is nothing to check."""
    with torch.set_grad_enabled(op not in NO_GRAD_OPS):
        return prepared.read(prepared.call(0)) if prepared.read else {}


def verified(contenders: Mapping[str, Contender], problem: Problem, op: str) -> Outcome:
    """Prepare each contender and check its results; one that fails is excluded, with the reason."""
    outcome = Outcome()
    for name, contender in contenders.items():
        start = time.monotonic()
        try:
            problem.reset()
            prepared = contender.prepare(problem, op)
            reason = None
            if prepared.read:
                problem.reset()
                results = results_of(prepared, op)
                problem.reset()
                reason = wrong(problem, results, TRUTH_OF.get(op, op))
        except NotApplicable:
            continue
        except Exception as error:  # a peer may fail in any way; it is reported and left out
            reason = f"failed: {first_line(error)}"
        outcome.seconds[name] = time.monotonic() - start
        if reason is None:
            outcome.ready[name] = prepared
        else:
            outcome.excluded[name] = reason
    return outcome
