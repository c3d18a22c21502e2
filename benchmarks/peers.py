"""Packages that may or may not be installed: Apex, inplace_abn and JAX as contenders."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .contenders import GRADIENTS, OUTPUT, Contender, NotApplicable, Prepared
from .problem import Problem


def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # a broken installation is reported, it must not end the run
        return f"{module} does not import: {type(error).__name__}"
    return None


def _copy_state(module: Any, problem: Problem) -> None:
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(module, name).copy_(getattr(problem, name))


def _results(module: Any, y: Tensor, training: bool) -> dict[str, Tensor]:
    """The output and, in training, the module's own running statistics."""
    names = ("running_mean", "running_var") if training else ()
    return {"y": y} | {name: getattr(module, name).clone() for name in names}


def _gradients_through(output: Any, wanted: list[tuple[Tensor, ...]], dy: list[Tensor]) -> Prepared:
    """Backward of graphs built once and walked again by every call."""
    return Prepared(
        lambda i: torch.autograd.grad(output[i], wanted[i], dy[i], retain_graph=True), GRADIENTS
    )


class Apex(Contender):
    """`apex.contrib.groupbn`, the batch norm Apex still has: fp16 in NHWC."""

    name = "apex"
    devices = ("cuda",)

    def missing(self) -> str | None:
        return _import_failure("apex.contrib.groupbn.batch_norm")

    @staticmethod
    def _module(problem: Problem) -> Any:
        case = problem.case
        if (case.dtype, case.layout, len(case.shape)) != ("float16", "channels_last", 4):
            raise NotApplicable("Apex has fp16 in NHWC only")
        from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

        module = BatchNorm2d_NHWC(case.channels).to(problem.device)
        module.eps, module.momentum = problem.eps, problem.momentum
        _copy_state(module, problem)
        return module

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        return x.detach().permute(0, 2, 3, 1)

    def _forward(self, problem: Problem, training: bool) -> Prepared:
        module = self._module(problem).train(training)
        rows = [self._rows(x) for x in problem.x]
        return Prepared(
            lambda i: module(rows[i]), lambda y: _results(module, y.permute(0, 3, 1, 2), training)
        )

    def forward(self, problem: Problem) -> Prepared:
        return self._forward(problem, training=True)

    def eval(self, problem: Problem) -> Prepared:
        return self._forward(problem, training=False)

    def backward(self, problem: Problem) -> Prepared:
        module = self._module(problem).train()
        wanted = [(self._rows(x).requires_grad_(), module.weight, module.bias) for x in problem.x]
        output = [module(x) for x, *_ in wanted]
        prepared = _gradients_through(output, wanted, [self._rows(dy) for dy in problem.dy])
        return Prepared(prepared.call, lambda g: {**GRADIENTS(g), "dx": g[0].permute(0, 3, 1, 2)})


class InplaceAbn(Contender):
    """`inplace_abn.InPlaceABN` without activation; it overwrites its input, so it gets copies."""

    name = "inplace_abn"
    devices = ("cuda",)

    def missing(self) -> str | None:
        return _import_failure("inplace_abn")

    @staticmethod
    def _module(problem: Problem) -> Any:
        import inplace_abn

        if problem.case.dtype == "bfloat16":
            raise NotApplicable("inplace_abn has no bfloat16")
        if problem.case.layout != "contiguous":
            raise NotApplicable("inplace_abn works on contiguous tensors")
        module = inplace_abn.InPlaceABN(
            problem.case.channels, problem.eps, problem.momentum, activation="identity"
        ).to(problem.device)
        _copy_state(module, problem)
        return module

    def _forward(self, problem: Problem, training: bool) -> Prepared:
        module = self._module(problem).train(training)
        x = [one.clone() for one in problem.x]
        return Prepared(lambda i: module(x[i]), lambda y: _results(module, y, training))

    def forward(self, problem: Problem) -> Prepared:
        return self._forward(problem, training=True)

    def eval(self, problem: Problem) -> Prepared:
        return self._forward(problem, training=False)

    def backward(self, problem: Problem) -> Prepared:
        raise NotApplicable("its backward consumes what its forward saved")


class Jax(Contender):
    """Batch norm as Flax writes it, compiled by XLA; time includes the wait for its result.

    What a forward pass saves is XLA's own affair, so its backward computes the statistics again.
    On CUDA it is no contender: its calls cannot join a graph, and it takes the memory for itself.
    """

    name = "jax"
    devices = ("cpu",)

    def missing(self) -> str | None:
        return _import_failure("jax")

    @staticmethod
    def _functions(problem: Problem) -> tuple[Any, Any, Any]:
        """The jitted forward, eval and backward over (N, spatial..., C) or (N, C, spatial...)."""
        import jax
        import jax.numpy as jnp

        if problem.case.dtype == "float64":
            raise NotApplicable("JAX has fp64 only by a switch for the whole process")
        dims = len(problem.case.shape)
        channel = dims - 1 if problem.case.layout == "channels_last" else 1
        axes = tuple(axis for axis in range(dims) if axis != channel)
        broadcast = tuple(-1 if axis == channel else 1 for axis in range(dims))
        eps, momentum = problem.eps, problem.momentum

        def normalize(x: Any, mean: Any, variance: Any, weight: Any, bias: Any) -> Any:
            scale = (jax.lax.rsqrt(variance + eps) * weight).reshape(broadcast)
            centred = x.astype(jnp.float32) - mean.reshape(broadcast)
            return (centred * scale + bias.reshape(broadcast)).astype(x.dtype)

        def train(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> Any:
            wide = x.astype(jnp.float32)
            mean = wide.mean(axes)
            variance = jnp.maximum(0.0, (wide * wide).mean(axes) - mean * mean)
            samples = x.size // x.shape[channel]
            unbiased = variance * (samples / max(1, samples - 1))
            return (
                normalize(x, mean, variance, weight, bias),
                running_mean + momentum * (mean - running_mean),
                running_var + momentum * (unbiased - running_var),
            )

        def evaluate(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> Any:
            return normalize(x, running_mean, running_var, weight, bias)

        def gradients(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
            zeros = jnp.zeros_like(weight)
            _, pullback = jax.vjp(lambda *given: train(*given, zeros, zeros)[0], x, weight, bias)
            return pullback(dy)

        return jax.jit(train), jax.jit(evaluate), jax.jit(gradients)

    @staticmethod
    def _array(tensor: Tensor, last: bool) -> Any:
        import jax.dlpack

        rows = tensor.movedim(1, -1) if last else tensor
        return jax.dlpack.from_dlpack(rows.detach().contiguous().clone())

    @staticmethod
    def _tensor(array: Any, last: bool) -> Tensor:
        tensor = torch.from_dlpack(array)
        return tensor.movedim(-1, 1) if last and tensor.dim() > 1 else tensor

    def _vectors(self, problem: Problem) -> list[Any]:
        names = ("weight", "bias", "running_mean", "running_var")
        return [self._array(getattr(problem, name), False) for name in names]

    def forward(self, problem: Problem) -> Prepared:
        train, _, _ = self._functions(problem)
        last = problem.case.layout == "channels_last"
        x = [self._array(one, last) for one in problem.x]
        vectors = self._vectors(problem)
        names = ("y", "running_mean", "running_var")
        return Prepared(
            lambda i: [one.block_until_ready() for one in train(x[i], *vectors)],
            lambda found: {
                name: self._tensor(one, last) for name, one in zip(names, found, strict=True)
            },
        )

    def eval(self, problem: Problem) -> Prepared:
        _, evaluate, _ = self._functions(problem)
        last = problem.case.layout == "channels_last"
        x = [self._array(one, last) for one in problem.x]
        vectors = self._vectors(problem)
        return Prepared(
            lambda i: evaluate(x[i], *vectors).block_until_ready(),
            lambda y: OUTPUT(self._tensor(y, last)),
        )

    def backward(self, problem: Problem) -> Prepared:
        _, _, gradients = self._functions(problem)
        last = problem.case.layout == "channels_last"
        x = [self._array(one, last) for one in problem.x]
        dy = [self._array(one, last) for one in problem.dy]
        weight, bias, *_ = self._vectors(problem)
        return Prepared(
            lambda i: [one.block_until_ready() for one in gradients(x[i], weight, bias, dy[i])],
            lambda found: GRADIENTS([self._tensor(one, last) for one in found]),
        )
