"""One call, fused or not, held against the oracle: output, statistics and gradients; and that it waits for nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from inputs import Arguments
from oracle import BatchNorm, BatchNormAct
from tolerances import assert_matches

from batchnorm_ext.functional import batch_norm, batch_norm_act


def assert_bitwise(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Fail unless the tensors agree in dtype, shape and every bit (any NaN equals any other)."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def call(
    args: Arguments, function: Callable[..., torch.Tensor] = batch_norm, **options: object
) -> torch.Tensor:
    """Call a function of ``F.batch_norm``'s signature."""
    return function(args.x, args.running_mean, args.running_var, args.weight, args.bias, **options)


def call_act(
    args: Arguments,
    residual: torch.Tensor | None = None,
    activation: str = "relu",
    **options: object,
) -> torch.Tensor:
    """Call ``batch_norm_act``."""
    return call(args, batch_norm_act, residual=residual, activation=activation, **options)


def differentiable(args: Arguments, residual: torch.Tensor | None = None) -> list[torch.Tensor]:
    tensors = (args.x, args.weight, args.bias, residual)
    return [t for t in tensors if t is not None and t.requires_grad]


def check_call(
    args: Arguments,
    function: Callable[..., torch.Tensor] = batch_norm,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Run forward and backward, compare every number with the oracle, and return the output."""
    expected = BatchNorm(
        args.x,
        args.weight,
        args.bias,
        args.running_mean,
        args.running_var,
        training=training,
        momentum=momentum,
        eps=eps,
    )
    before = args.clone()
    y = call(args, function, training=training, momentum=momentum, eps=eps)
    assert y.dtype == args.x.dtype
    assert_matches(y, expected.y, "y")
    check_running_statistics(args, before, expected)
    if y.requires_grad:
        check_gradients(args, expected, torch.autograd.grad(y, differentiable(args), args.dy))
    assert_bitwise(args.x.detach(), before.x.detach(), "x was written to")
    return y


def exact_act(
    args: Arguments,
    residual: torch.Tensor | None = None,
    activation: str = "relu",
    *,
    inplace: bool = False,
    **options: object,
) -> BatchNormAct:
    """Return what `call_act` should give of the same arguments."""
    return BatchNormAct(
        *(args.x, args.weight, args.bias, args.running_mean, args.running_var),
        residual=residual,
        activation_name=activation,
        **options,
    )


def check_call_act(
    args: Arguments,
    residual: torch.Tensor | None = None,
    activation: str = "relu",
    *,
    training: bool = True,
    **options: object,
) -> torch.Tensor:
    """As `check_call`, of ``batch_norm_act``; in place, the call is given a copy of x, which it may overwrite."""
    options["training"] = training
    expected = exact_act(args, residual, activation, **options)
    before = args.clone()
    given = replace(args, x=args.x.clone()) if options.get("inplace") else args
    y = call_act(given, residual, activation, **options)
    assert y.dtype == args.x.dtype
    assert_matches(y, expected.y, "y")
    check_running_statistics(args, before, expected)
    if y.requires_grad:
        gradients = torch.autograd.grad(y, differentiable(args, residual), args.dy)
        check_gradients(args, expected, gradients, residual)
    assert_bitwise(args.x.detach(), before.x.detach(), "x was written to")
    return y


def check_running_statistics(args: Arguments, before: Arguments, expected: BatchNorm) -> None:
    """Compare the buffers with the oracle's, or with what they were when the call must not touch them."""
    for name in ("running_mean", "running_var"):
        actual = getattr(args, name)
        if actual is None:
            continue
        update = getattr(expected, name)
        if update is None:
            assert_bitwise(actual, getattr(before, name), f"{name} changed")
        else:
            assert_matches(actual, update, name, args.x.dtype)


def check_gradients(
    args: Arguments,
    expected: BatchNorm,
    gradients: tuple[torch.Tensor, ...],
    residual: torch.Tensor | None = None,
) -> None:
    """Compare the gradients of ``differentiable(args, residual)`` with the oracle's."""
    tensors = {"x": args.x, "weight": args.weight, "bias": args.bias, "residual": residual}
    exact = dict(zip(tensors, expected.gradients(args.dy), strict=False))
    wanted = {n: t for n, t in tensors.items() if t is not None and t.requires_grad}
    for (name, tensor), gradient in zip(wanted.items(), gradients, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_matches(gradient, exact[name], f"d{name}", args.x.dtype)


def without(args: Arguments, *names: str) -> Arguments:
    """The same call without some of its optional tensors."""
    return replace(args, **dict.fromkeys(names))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error at any call that waits for the GPU, if there is one."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def storages_saved(
    function: Callable[[], torch.Tensor], owned: tuple[torch.Tensor | None, ...]
) -> dict[int, int]:
    """Bytes of each storage that a call keeps for backward, other than those of `owned`, which live on anyway."""
    known = {t.untyped_storage().data_ptr() for t in owned if t is not None}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return storages
