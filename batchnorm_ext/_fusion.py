"""Which batch norms of a model run in one call with the addition and the activation behind them, and how.

A container's forward is traced with torch.fx. Where the trace shows such a chain, the container's class becomes a
subclass whose forward runs the traced operations with each chain in one call. The module tree stays as it is, and the
forward that was there serves whenever the trace does not describe a call: other arguments, hooks, replaced modules.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import operator
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_internals

from . import _reference
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm

# The classes whose `_forward_act` is their forward and what follows it; one may take another's place in a plan.
NORMS: set[type[nn.Module]] = {BatchNorm1d, BatchNorm2d, BatchNorm3d}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.hardtanh: "relu6",
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}

# What the functions take by position between input and inplace.
_OPTIONS: dict[Any, tuple[str, ...]] = {
    F.hardtanh: ("min_val", "max_val"),
    F.leaky_relu: ("negative_slope",),
    F.elu: ("alpha",),
}

_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.stack)

_Epilogue = tuple[str, float]  # activation, negative_slope


# ---- running ------------------------------------------------------------------------------------


def batch_norm_act(
    norm: _BatchNorm,
    input: Tensor,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Return ``activation(norm(input) + residual)``; `residual` is whatever torch adds."""
    if residual is None or (
        residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    ):
        return norm._forward_act(input, residual, activation, negative_slope)
    return _reference.activate(norm(input) + residual, activation, negative_slope)


class _Plan:
    """The fused forward of a container, and what must be as it was when traced for it to serve.

    Attributes
    ----------
    source, names
        The forward as Python code, and what it calls beside torch.
    inputs
        The names of what forward takes, and whether it is a list of tensors; else it is a tensor.
    watched
        ``(path, class, epilogue)`` of each module whose own forward does not run. The class of a batch norm is None.
    chains
        What runs in one call, in words.
    """

    def __init__(
        self,
        source: str,
        names: dict[str, Any],
        inputs: dict[str, bool],
        watched: tuple[tuple[tuple[str, ...], type[nn.Module] | None, _Epilogue | None], ...],
        chains: tuple[str, ...],
    ) -> None:
        self.source, self.names, self.inputs = source, names, inputs
        self.watched, self.chains = watched, chains
        namespace: dict[str, Any] = {"torch": torch, **names}
        exec(compile(source, "<batchnorm_ext: fused forward>", "exec"), namespace)
        self.forward: Callable[..., Any] = namespace["forward"]

    def in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments by position; nothing where they are not the inputs."""
        if not kwargs:
            return args
        named = list(self.inputs)[len(args) :]
        return (*args, *map(kwargs.get, named)) if kwargs.keys() == set(named) else ()

    def applies(self, container: nn.Module, arguments: tuple[Any, ...]) -> bool:
        """Return whether a call of `container` is one that the trace describes."""
        if (
            len(arguments) != len(self.inputs)
            or module_internals._has_any_global_hook()
            or torch.jit.is_tracing()
        ):
            return False
        for argument, is_list in zip(arguments, self.inputs.values(), strict=True):
            if is_list and type(argument) is not list:
                return False
            for tensor in argument if is_list else (argument,):
                if not issubclass(type(tensor), Tensor):
                    return False
        for path, kind, epilogue in self.watched:
            found: nn.Module | None = container
            for name in path:
                found = None if found is None else found._modules.get(name)
            if found is None or _watched_class(found) is not kind or _is_hooked(found):
                return False
            if epilogue is not None and _epilogue_of(found) != epilogue:
                return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plan, (self.source, self.names, self.inputs, self.watched, self.chains)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plan:
        return self


class _Fused:
    """Mixed into the class of each container that has plans."""

    _unfused_class: type[nn.Module]

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        plans = self.__dict__.get("_fusion")
        chains = f"fused: {', '.join(plans[0].chains)}" if plans else ""
        return "\n".join(filter(None, (text, chains)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is no attribute of any module that pickle could name.
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(max(2, int(protocol))))
        return (_blank, (self._unfused_class,), *reduced[2:])


_FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(unfused: type[nn.Module]) -> type[nn.Module]:
    if unfused not in _FUSED_CLASSES:
        _FUSED_CLASSES[unfused] = _make_fused_class(unfused)
    return _FUSED_CLASSES[unfused]


def _make_fused_class(unfused: type[nn.Module]) -> type[nn.Module]:
    original = unfused.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for plan in self.__dict__.get("_fusion", ()):
            arguments = plan.in_order(args, kwargs)
            if plan.applies(self, arguments):
                return plan.forward(self, *arguments)
        return original(self, *args, **kwargs)

    members = {
        "forward": forward,
        "_unfused_class": unfused,
        "__module__": unfused.__module__,
        "__qualname__": unfused.__qualname__,
        "__doc__": unfused.__doc__,
    }
    metaclass: Callable[..., type[nn.Module]] = type(unfused)
    return metaclass(unfused.__name__, (_Fused, unfused), members)


def _blank(unfused: type[nn.Module]) -> nn.Module:
    """Return an instance of the fused class, for copying and unpickling."""
    kind = _fused_class(unfused)
    return kind.__new__(kind)


def _unfused_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_unfused_class", type(module))


def _watched_class(module: nn.Module) -> type[nn.Module] | None:
    return None if type(module) in NORMS else _unfused_class(module)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether something beside its class has a part in a call of the module."""
    members = module.__dict__
    if "forward" in members:
        return True
    return any(members[name] for name in _HOOKS)


# ---- planning -----------------------------------------------------------------------------------


class _NotTraceable(Exception):
    """Why the forward of a container cannot be replaced by its trace."""


def fuse(model: nn.Module) -> dict[str, str]:
    """Fuse what can be fused in `model`, container by container, the innermost first.

    Returns
    -------
    dict
        Names of the containers and modules that were left as they are although they hold a batch norm that might have
        been fused, each with the reason.
    """
    unfuse(model)
    left: dict[str, str] = {}
    _fuse_below(model, "", left, {})
    return left


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for child in model.modules():
        if isinstance(child, _Fused):
            child.__dict__.pop("_fusion", None)
            if type(child) is _fused_class(child._unfused_class):
                child.__class__ = child._unfused_class  # type: ignore[assignment]


def _fuse_below(
    module: nn.Module, name: str, left: dict[str, str], done: dict[nn.Module, set[nn.Module]]
) -> set[nn.Module]:
    """Fuse inside `module`; return its batch norms whose output is all that it returns: its caller may go on."""
    if module in done:
        return done[module]
    if type(module) in NORMS:
        return {module}
    done[module] = set()  # a module inside itself
    waiting: set[nn.Module] = set()
    for child_name, child in module.named_children():
        waiting |= _fuse_below(child, f"{name}.{child_name}".lstrip("."), left, done)
    if (
        waiting and type(module).forward is not nn.Module.forward
    ):  # as a ModuleList, which is not called
        try:
            waiting = _fuse_container(module, name, waiting, left)
        except _NotTraceable as reason:
            left[name or type(module).__name__] = str(reason)
            waiting = set()
    done[module] = waiting
    return waiting


def _fuse_container(
    module: nn.Module, name: str, waiting: set[nn.Module], left: dict[str, str]
) -> set[nn.Module]:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise _NotTraceable(f"a {kind.__name__} is compiled already")
    if "forward" in module.__dict__:
        raise _NotTraceable("forward is replaced on the instance")
    if (
        kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__reduce__ is not object.__reduce__
        or copyreg.dispatch_table.get(kind)
    ):
        raise _NotTraceable("it has a way of its own to be copied")
    inputs = dict.fromkeys(_required_inputs(module), False)
    plan, open_norms, joined = _planned(module, inputs, name, waiting, left)
    if plan is None:
        return open_norms
    plans = [plan]
    if joined:
        try:
            of_lists, _, _ = _planned(module, inputs | joined, name, waiting, left)
            plans.extend(filter(None, (of_lists,)))
        except _NotTraceable as reason:
            left[name or kind.__name__] = f"with a list of tensors: {reason}"
    try:
        module.__class__ = _fused_class(kind)
    except (
        TypeError
    ) as error:  # a metaclass or a layout that allows no subclass in place of the class
        raise _NotTraceable(str(error)) from error
    module.__dict__["_fusion"] = tuple(plans)
    return open_norms


def _planned(
    module: nn.Module,
    inputs: dict[str, bool],
    name: str,
    waiting: set[nn.Module],
    left: dict[str, str],
) -> tuple[_Plan | None, set[nn.Module], dict[str, bool]]:
    """Return the plan for one kind of inputs, as `_Rewriting.plan` does, and which inputs might as well be lists."""
    plans = []
    for training, grad in ((True, True), (False, False)):
        with _in_mode(module, training), torch.set_grad_enabled(grad):
            tracer = _Tracer(module, inputs, waiting)
            tracer.trace(module)
        plans.append(_Rewriting(tracer, name, left).plan())
    (plan, open_norms), (other, _) = plans
    if plan is not None and (
        other is None or plan.source != other.source or plan.names != other.names
    ):
        raise _NotTraceable("forward differs between training and evaluation, or from call to call")
    return plan, open_norms, tracer.joined()


def _required_inputs(module: nn.Module) -> list[str]:
    names = []
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise _NotTraceable(f"forward has a required keyword, {parameter.name}")
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if not names:
        raise _NotTraceable("forward has no required argument")
    return names


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in before:
            child.__dict__["training"] = training
        yield
    finally:
        for child, mode in before:
            child.__dict__["training"] = mode


def _surroundings() -> tuple[Any, ...]:
    """Return what a context manager may have set, of which a trace keeps nothing."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        *(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ),
    )


class _Value(torch.fx.Proxy):
    """A traced value. It takes itself for a tensor, as it is in the calls that a plan serves."""

    _is_param = False

    def _claimed_class(self) -> type:
        return Tensor

    def _refuse_class(self, kind: type) -> None:
        raise _NotTraceable("forward changes the class of a tensor")

    __class__ = property(_claimed_class, _refuse_class)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(name)
        return super().__getattr__(name)


class _ListOfValues(torch.fx.Proxy):
    """A traced list of tensors, of which nothing is known but that it is one."""

    __class__ = property(lambda self: list)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _in_place(name: str) -> Any:
    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


# Without these, `a += b` would be traced as `a = a + b`, and whoever else holds `a` would not see it.
for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(torch.fx.Tracer):
    """Traces a container into operations and modules; of modules, only those on the way to `waiting` are opened."""

    def __init__(self, root: nn.Module, inputs: dict[str, bool], waiting: set[nn.Module]) -> None:
        super().__init__()
        self.inputs = inputs
        self.opened: dict[nn.Module, str] = {}
        self._norms = waiting
        self._on_the_way = {
            child: name
            for name, child in root.named_modules()
            if child not in waiting and not waiting.isdisjoint(child.modules())
        }
        self._expected = _surroundings()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> torch.fx.Graph:
        inside = [root, *self._on_the_way]
        before = [(child, dict(child.__dict__)) for child in inside]
        chance = random.getstate(), torch.get_rng_state()
        try:
            graph = super().trace(root, concrete_args)
            if random.getstate() != chance[0] or not torch.equal(torch.get_rng_state(), chance[1]):
                raise _NotTraceable("forward draws random numbers outside of tensor operations")
            for child, members in before:
                if child.__dict__.keys() != members.keys() or any(
                    child.__dict__[key] is not value for key, value in members.items()
                ):
                    raise _NotTraceable("forward changes attributes of a module")
            for node in graph.find_nodes(op="placeholder"):
                if self.inputs[str(node.target)] and not all(map(_is_join, node.users)):
                    raise _NotTraceable("forward does more with it than to join its tensors")
            return graph
        except _NotTraceable:
            raise
        except Exception as error:  # whatever the container's own code makes of a traced value
            text = str(error).strip().splitlines()
            raise _NotTraceable(
                f"torch.fx cannot trace it: {text[0] if text else type(error).__name__}"
            ) from error
        finally:
            random.setstate(chance[0])
            torch.set_rng_state(chance[1])
            for child, members in before:
                child.__dict__.clear()
                child.__dict__.update(members)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # Arguments that have a default keep it: calls that pass them are not served by the plan.
        values = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]
        return (lambda *args: root_fn(*args)), [self.root, *values]

    def is_leaf_module(self, module: nn.Module, qualname: str) -> bool:
        own_call = type(module).__call__ is not nn.Module.__call__
        if module not in self._on_the_way or own_call or _is_hooked(module):
            return True
        self.opened[module] = qualname
        return False

    def joined(self) -> dict[str, bool]:
        """Return the inputs that are joined with nothing else, as if they were lists."""
        return {
            str(node.target): True
            for node in self.graph.find_nodes(op="placeholder")
            if any(_is_join(user) and user.args[0] in (node, [node]) for user in node.users)
        }

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        is_list = node.op == "placeholder" and self.inputs[str(node.target)]
        return (_ListOfValues if is_list else _Value)(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) in (_Value, _ListOfValues):  # which pass for tensors and lists
            return a.node
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if _surroundings() != self._expected:
            raise _NotTraceable(
                "forward switches autocast, gradients or what is saved for backward"
            )
        return super().create_node(*args, **kwargs)


class _Rewriting:
    """Turns the trace of a container into its plan."""

    def __init__(self, tracer: _Tracer, name: str, left: dict[str, str]) -> None:
        self.graph = tracer.graph
        self.modules = dict(tracer.root.named_modules())
        self.inputs = tracer.inputs
        self.prefix = name
        self.left = left
        self.watched = set(tracer.opened.values())
        self.chains: list[str] = []

    def plan(self) -> tuple[_Plan | None, set[nn.Module]]:
        """Return the plan, None where there is nothing to fuse, and the batch norms whose output is the container's."""
        norms = [node for node in self.graph.nodes if self._is_norm(node)]
        for node in norms:
            self._fuse(node)
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        open_norms = {
            self.modules[node.target]
            for node in norms
            if node in self.graph.nodes and output.args == (self._end(node)[-1],)
        }
        if not self.chains:
            return None, open_norms
        for node in self.graph.nodes:
            node.type = None  # annotations would have to be imported
        self.graph.lint()
        code = self.graph.python_code("self")
        names = {
            key: value
            for key, value in code.globals.items()
            if value is not torch and re.search(rf"\b{re.escape(key)}\b", code.src)
        }
        for value in names.values():
            if isinstance(value, ModuleType):
                raise _NotTraceable(f"its trace needs {value.__name__}")
        watched = tuple(
            (tuple(path.split(".")), _watched_class(module), _epilogue_of(module))
            for path, module in ((path, self.modules[path]) for path in sorted(self.watched))
        )
        return _Plan(code.src, names, self.inputs, watched, tuple(self.chains)), open_norms

    def _fuse(self, norm: torch.fx.Node) -> None:
        """Put one call in the place of a batch norm and what follows it."""
        chain, residual, epilogue = self._end(norm), None, None
        user = self._only_user(chain[-1])
        (input,) = cast("tuple[torch.fx.Node]", norm.args)
        if user is not None and _is_addition(user):
            residual = next((a for a in user.args if a is not chain[-1]), None)
            writes = user.target in (operator.iadd, "add_")
            if (
                not isinstance(residual, torch.fx.Node)
                or (writes and user.args[0] is not chain[-1])  # into the other summand
                or not input.users.keys() <= {norm, user}  # and may be written to before the sum
            ):
                return
            place = user
            chain += self._end(user)
            user = self._only_user(chain[-1])
        else:
            place = norm
        if user is not None:
            epilogue = self._epilogue(user)
            if epilogue is not None:
                chain.append(user)
        if residual is None and epilogue is None:
            return
        paths = [cast("str", node.target) for node in chain if node.op == "call_module"]
        hooked = [path for path in paths if _is_hooked(self.modules[path])]
        if hooked:
            for path in hooked:
                self.left[f"{self.prefix}.{path}".lstrip(".")] = "it has hooks"
            return
        activation, slope = epilogue or ("identity", 0.0)
        with self.graph.inserting_before(place):
            module = self.graph.get_attr(cast("str", norm.target))
            fused = self.graph.call_function(
                batch_norm_act, (module, input, residual, activation, slope)
            )
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):
            self.graph.erase_node(node)
        self.watched.update(paths)
        words = [norm.target, *(["add"] if residual else []), *([activation] if epilogue else [])]
        self.chains.append(" + ".join(map(str, words)))

    def _end(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Return `node` and the `nn.Identity` modules behind it that pass its value to one user."""
        chain = [node]
        while True:
            user = self._only_user(chain[-1])
            if user is None or user.op != "call_module":
                return chain
            if type(self.modules[cast("str", user.target)]) is not nn.Identity:
                return chain
            chain.append(user)

    @staticmethod
    def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _is_norm(self, node: torch.fx.Node) -> bool:
        return (
            node.op == "call_module"
            and type(self.modules[cast("str", node.target)]) in NORMS
            and len(node.args) == 1
            and isinstance(node.args[0], torch.fx.Node)
            and not node.kwargs
        )

    def _epilogue(self, node: torch.fx.Node) -> _Epilogue | None:
        """Return the activation that a node is."""
        if node.op == "call_module":
            plain = len(node.args) == 1 and not node.kwargs
            return _epilogue_of(self.modules[cast("str", node.target)]) if plain else None
        activation = _FUNCTIONS.get(node.target)
        if activation is None:
            return None
        options = dict(node.kwargs)
        names = (*_OPTIONS.get(node.target, ()), "inplace")
        options.update(zip(names, node.args[1:], strict=False))
        slope = options.get("negative_slope", 0.01)
        if options.get("alpha", 1.0) != 1.0 or not isinstance(slope, int | float):
            return None
        bounds = options.get("min_val", -1.0), options.get("max_val", 1.0)
        if node.target is F.hardtanh and bounds != (0.0, 6.0):
            return None
        return activation, float(slope) if activation == "leaky_relu" else 0.0


def _is_join(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and node.target in _JOINS and len(node.args) > 0


def _is_addition(node: torch.fx.Node) -> bool:
    return node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs


def _epilogue_of(module: nn.Module) -> _Epilogue | None:
    """Return the activation that a module is."""
    activation = _MODULES.get(type(module))
    if activation is None or (activation == "elu" and module.alpha != 1.0):
        return None
    if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) != (0.0, 6.0):
        return None
    return activation, float(module.negative_slope) if activation == "leaky_relu" else 0.0  # type: ignore[arg-type]
