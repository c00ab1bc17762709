"""`zps.Optimizer`: a torch optimizer whose step is taken in the hub."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from zps.errors import ConfigError, UnsupportedError, WeightsModified
from zps.memory.control import Outcome
from zps.optim import registry
from zps.training import state as hub_state
from zps.training.current import current
from zps.training.hooks import GradientStream, Params
from zps.training.rules import RuleSpec, check_supported, rule_of
from zps.wire.hypers import pack_hypers
from zps.worker.link import PushInfo
from zps.worker.worker import Worker


class Optimizer(torch.optim.Optimizer):
    """Drop-in for the optimizer it wraps, shared by all workers.

    optimizer      names the rule and its hyperparameters; it is not used after that, except with
                   apply="worker". `param_groups` are its own, so any LR scheduler works on either.
    model          the module whose parameters it holds: gives names, buffers and frozen parameters
    apply          "hub": the hub takes the step. "worker": the hub averages gradients, and
                   `optimizer` takes the step here
    overlap        gradients are copied for the hub during backward, each while it is hot in cache,
                   and may not be changed after that; False: all at the step
    max_grad_norm  clip the averaged gradient by its global norm, as clip_grad_norm_ does
    worker         None: the one that `zps.init()` made

    Every worker has to make it, over the same model; rank 0's weights and buffers become those of
    all. From then on parameters (fp32, bf16 or fp16) lie in memory shared with the hub (bsp) or are
    copies of it: read them freely, and after writing them call `publish()`.

    Set `samples` before the step to weight this worker's gradient in the mean, as for an uneven
    last batch: samples = len(batch).

    Raises LayoutMismatch, TensorMismatch, UnsupportedError, ConfigError, OutOfMemory, WaitTimeout.
    """

    #: GradScaler then hands over its scale instead of unscaling: see torch.amp.GradScaler.step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module | None = None,
        *,
        apply: Literal["hub", "worker"] = "hub",
        overlap: bool = True,
        max_grad_norm: float | None = None,
        worker: Worker | None = None,
    ):
        if apply not in ("hub", "worker"):
            raise ConfigError(f"apply={apply!r}; it is 'hub' or 'worker'")
        check_supported(optimizer)
        self.samples = 1.0
        self._worker = current() if worker is None else worker
        self._wrapped = optimizer
        if apply == "worker" and not self._worker.in_step:
            raise ConfigError(
                "apply='worker' needs mode='bsp' and quorum=1: every worker steps on the same mean"
            )
        self._apply = apply
        self._max_grad_norm = max_grad_norm
        self._params = _named(optimizer, model)
        self._spec = RuleSpec("mean", native=True) if apply == "worker" else rule_of(optimizer)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups
        self.state = defaultdict(dict)
        self._followers = _followers(model, self._params, whole=apply == "worker")
        self._sent = b""
        self._declare()
        if apply == "worker" and self._worker.joined_late:
            raise UnsupportedError(
                "a worker cannot join a running job with apply='worker', whose weights are with "
                "its workers; start all again from a checkpoint, or use apply='hub'"
            )
        self._adopt()
        self._take_over_state(optimizer)
        self._stream = GradientStream(
            self._worker, self._params, overlap=overlap, info=self._push_info
        )
        self._stream.hook_all()
        release = weakref.WeakMethod(self._release)
        self._worker.at_close(lambda goodbye: (own := release()) and own(goodbye))

    # --- the loop -----------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Hand the gradients over, and return when the model holds the new weights.

        Raises GradientModified, WeightsModified, NonFiniteGradient, WaitTimeout, HubLost.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._worker.check_usable()
        self._check_weights()
        self._stream.hook_all()
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)  # set by a GradScaler
        scaled = found_inf is not None
        finite = not (scaled and bool(found_inf))
        outcomes = self._stream.finish(
            scaled=scaled,
            unscaled=scaled and getattr(self, "grad_scale", None) is None,
            finite=finite,
            scale=self._loss_scale(),
        )
        skipped = Outcome.SKIPPED in outcomes
        if self._apply == "worker":
            if not skipped:
                self._step_here()
        else:
            self._worker.refresh()
            self._wrapped._opt_called = True  # type: ignore[attr-defined]  # for its schedulers
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a step whose wait timed out is waited for first."""
        if not self._worker.closed:
            self._stream.forget()
            self._stream.hook_all()
        super().zero_grad(set_to_none)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients over several backward passes; the last one goes outside."""
        with self._stream.paused():
            yield

    def publish(self) -> None:
        """Make rank 0's weights and buffers everyone's; every worker has to call it.

        For after `model.load_state_dict` or any other write to the weights, which only rank 0, or
        every worker alike, may have done.
        """
        tensors = dict(self._params) if self._apply == "hub" else {}
        self._worker.publish(tensors, self._followers)
        self._adopt()  # also where `param.data = ...` had put other memory in its place

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only before the job has begun: the layout is fixed once it is declared."""
        if hasattr(self, "_stream"):
            raise UnsupportedError(
                "a parameter group cannot be added to a running job; give the optimizer all "
                "parameters from the start, with requires_grad=False for those to be trained later"
            )
        super().add_param_group(param_group)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name, parameter) as the hub knows them, in the order of the layout."""
        return iter(self._params)

    # --- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """In the wrapped optimizer's own format: it loads there, and the reverse.

        Fetches the state from the hub; call it between steps.
        """
        if self._apply == "worker":
            return self._wrapped.state_dict()
        shapes = [param.shape for _, param in self._params]
        states = hub_state.fetch(self._worker, self._spec, shapes, self._states_used())
        self.state = defaultdict(dict)
        for (_, param), values in zip(self._params, states, strict=True):
            if values:
                self.state[param] = values
        try:
            return super().state_dict()
        finally:
            self.state = defaultdict(dict)  # the truth is in the hub

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over hyperparameters and state, also of a plain torch optimizer.

        Every worker has to call it, with the same contents; rank 0's go to the hub.
        """
        if self._apply == "worker":
            self._wrapped.load_state_dict(dict(state_dict))
            self.param_groups = self._wrapped.param_groups
            return
        super().load_state_dict(dict(state_dict))
        self._wrapped.param_groups = self.param_groups
        states = self._by_param(state_dict)
        self.state = defaultdict(dict)
        hub_state.check(self._worker, self._spec, states)  # on every rank, so that none waits
        self._told = self._spec.hypers(self.param_groups)
        if self._worker.rank == 0:
            hub_state.store(self._worker, self._spec, states, self._states_used())
        self._worker.barrier()

    # --- parts --------------------------------------------------------------------------------

    def _declare(self) -> None:
        groups = self._spec.hypers(self.param_groups)
        if self._apply == "worker":
            groups = [{} for _ in self.param_groups]
        self._told = groups
        names = {id(param): name for name, param in self._params}
        members = [[names[id(p)] for p in group["params"]] for group in self.param_groups]
        self._worker.declare(
            dict(self._params),
            rule=self._spec.name,
            groups=[{**g, "params": m} for g, m in zip(groups, members, strict=True)],
            extras=self._followers,
            max_grad_norm=self._hub_norm(),
            fuse=True,
        )

    def _take_over_state(self, optimizer: torch.optim.Optimizer) -> None:
        """What rank 0's optimizer had before it was wrapped, as after loading a checkpoint."""
        if self._apply == "worker" or self._worker.joined_late:
            return  # a newcomer takes the state of the job that it joins
        states = [dict(optimizer.state.get(param, {})) for _, param in self._params]
        if self._worker.rank == 0 and hub_state.has_stepped(states):
            hub_state.check(self._worker, self._spec, states)
            hub_state.store(self._worker, self._spec, states, self._states_used())
        self._worker.barrier()

    @torch.no_grad()
    def _adopt(self) -> None:
        """From here on the model computes on what the hub writes."""
        if self._apply == "hub":
            for name, param in self._params:
                param.data = self._worker.weights(name)
        self._copy_followers()
        self._remember_weights()

    @torch.no_grad()
    def _release(self, goodbye: bool) -> None:
        """The worker leaves: the model keeps its weights, in memory that nobody else writes.

        One that failed leaves no model behind that anybody could read in peace.
        """
        self._stream.detach()
        if goodbye and self._apply == "hub" and self._worker.aliased:
            for _, param in self._params:
                param.data = param.data.clone()
            self._versions = self._seen_weights()

    @torch.no_grad()
    def _copy_followers(self) -> None:
        for name, tensor in self._followers.items():
            tensor.copy_(self._worker.extra(name))

    def _hub_norm(self) -> float | None:
        return self._max_grad_norm if self._apply == "hub" else None

    def _push_info(self, finite: bool) -> PushInfo:
        hypers = self._changed_hypers()
        if hypers is not None:
            self._sent, self._told = hypers, self._spec.hypers(self.param_groups)
        hold = hasattr(self, "found_inf") or self._worker.settings.nonfinite == "skip"
        return PushInfo(
            samples=float(self.samples),
            grad_scale=self._loss_scale(),
            finite=finite,
            hold=hold,
            hypers=hypers,
        )

    def _loss_scale(self) -> float:
        scale = getattr(self, "grad_scale", None)  # set by a GradScaler
        return 1.0 if scale is None else float(scale)

    def _changed_hypers(self) -> bytes | None:
        """The hyperparameters as they travel, if they are not what the hub was last told."""
        if self._apply == "worker":
            return None
        data = pack_hypers(self._spec.hypers(self.param_groups), self._hub_norm())
        return None if data == self._sent else data

    def _step_here(self) -> None:
        """apply="worker": the averaged gradients become this worker's own, and it steps."""
        self._worker.refresh()
        for index, (name, param) in enumerate(self._params):
            applied = self._worker.times_updated(name)
            if applied == self._applied[index]:
                param.grad = None  # nobody had a gradient
                continue
            self._applied[index] = applied
            mean = self._worker.weights(name)
            if param.grad is None:
                param.grad = mean.clone()
            else:
                param.grad.copy_(mean)
        if self._max_grad_norm is not None:
            params = [param for _, param in self._params if param.grad is not None]
            torch.nn.utils.clip_grad_norm_(params, self._max_grad_norm)
        self._wrapped.step()

    def _seen_weights(self) -> list[tuple[int, int]]:
        """What changes when somebody writes to a parameter, or puts other memory in its place."""
        return [(param._version, param.data_ptr()) for _, param in self._params]

    def _remember_weights(self) -> None:
        self._versions = self._seen_weights()
        if self._apply == "worker":
            self._applied = [self._worker.times_updated(name) for name, _ in self._params]

    def _check_weights(self) -> None:
        if self._apply == "worker":
            return
        now = self._seen_weights()
        if now == self._versions:
            return
        for (name, _), seen, known in zip(self._params, now, self._versions, strict=True):
            if seen != known:
                raise WeightsModified(
                    f"the parameter {name!r} was written on rank {self._worker.rank}, but the hub "
                    "holds the weights: call opt.publish() on every worker after loading or "
                    "re-initialising them"
                )

    def _states_used(self) -> list[set[str]]:
        """The states of each parameter that the hub has, by the options it was last told."""
        if not self._spec.native:
            return [set() for _ in self._params]
        rule = registry.rule(self._spec.name)
        used = {
            id(param): set(rule.state_used(hypers))
            for group, hypers in zip(self.param_groups, self._told, strict=True)
            for param in group["params"]
        }
        return [used[id(param)] for _, param in self._params]

    def _by_param(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The states of `state_dict` in the order of our parameters, not cast to their dtypes."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        number_of = {id(param): n for n, param in zip(numbers, params, strict=True)}
        return [dict(state_dict["state"].get(number_of[id(p)], {})) for _, p in self._params]


def _named(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> Params:
    """The optimizer's parameters with the names the model knows them by, each once."""
    known = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    params: Params = []
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            name = known.get(id(param), f"group{group_index}.{index}")
            if param.device.type != "cpu":
                raise UnsupportedError(
                    f"the parameter {name!r} is on {param.device}; this version trains on the CPU"
                )
            params.append((name, param))
    # A bucket holds one dtype: norms in fp32 between weights in bf16 would cut it to pieces.
    return sorted(params, key=lambda entry: str(entry[1].dtype))


def _followers(
    model: torch.nn.Module | None, params: Params, *, whole: bool
) -> dict[str, torch.Tensor]:
    """What follows rank 0 without being trained by the hub: buffers, and parameters left out."""
    followers: dict[str, torch.Tensor] = {}
    trained = {id(param) for _, param in params}
    if model is not None:
        followers |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
        for name, param in model.named_parameters():
            if id(param) not in trained:
                followers[f"fixed {name}"] = param
    if whole:
        followers |= {f"weight {name}": param for name, param in params}
    return {name: tensor for name, tensor in followers.items() if tensor.device.type == "cpu"}
