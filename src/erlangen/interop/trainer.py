"""Broken models in `transformers.Trainer`: our optimisers, the charges in its log, and one draw a step.

    from erlangen.interop import trainer as parts
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=parts.optimizer("ecd", args))
    trainer.add_callback(parts.ChargeCallback(trainer))

`Trainer` calls ``optimizer.step()`` without a loss, and Energy Conserving Descent needs one. Its optimiser is made from
the model, so it can listen there: what the model returns as its loss in training is multiplied by the derivative that
`Trainer`'s backward pass arrives with, and summed over the micro-batches of the step. That derivative is how `Trainer`
weighs a micro-batch (by their number, by tokens, by processes), so the sum is the loss that the gradients belong to.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from erlangen import _extras, breaking, optim
from erlangen.gauge import charges, head_layouts, unwrap

transformers: Any = _extras.require("transformers", "hf")
_extras.require("accelerate", "hf")  # Trainer is there without it, and fails when it is built

__all__ = ["ChargeCallback", "RedrawCallback", "optimizer"]


def optimizer(name: str, args: Any, **settings: Any) -> tuple[Callable, dict[str, Any]]:
    """One of our optimisers, as `Trainer` takes it in ``optimizer_cls_and_kwargs``.

    Weight decay is on parameters of two and more dimensions alone, as with the optimisers of `Trainer`. Embeddings and
    the head are told from hidden matrices by the modules that hold them, which is what Muon asks for.

    Args:
        name: a key of `erlangen.optim.OPTIMIZERS`.
        args: the ``TrainingArguments``: ``learning_rate`` and ``weight_decay`` are taken from there unless they are
            settings here. Their defaults are those of AdamW (5e-5 and 0), too small a rate for the others.
        **settings: as of `erlangen.optim.create`.

    Returns:
        What makes the optimiser from the model, and its keyword arguments.

    Raises:
        ValueError: no such optimiser or setting; or ECD, which needs the loss, where it cannot be had (fp16 scales it,
            DeepSpeed holds the weights elsewhere). ECD also raises at a step for which no loss was seen.
    """
    given = {"lr": args.learning_rate, "weight_decay": args.weight_decay} | settings
    optim.create(name, [torch.zeros(2, 2)], **given)  # says now what is wrong with the settings
    if name == "ecd" and args.fp16:
        raise ValueError("ECD needs the loss itself, and fp16 scales it: train with bf16=True or in full precision")
    if name == "ecd" and args.deepspeed is not None:
        raise ValueError("ECD needs whole parameters and their loss, and DeepSpeed keeps both: train without it")
    return _Factory, {"name": name, **given}


class _Factory:
    """What `Trainer` takes for a factory, as it is no class of optimisers: it makes one and calls it on the model."""

    def __call__(self, model: nn.Module, *, name: str, weight_decay: float, **settings: Any) -> torch.optim.Optimizer:
        named = [(label, parameter) for label, parameter in _labelled(model) if parameter.requires_grad]
        matrices = [pair for pair in named if pair[1].ndim >= 2]
        rest = [pair for pair in named if pair[1].ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        made = optim.create(name, [group for group in groups if group["params"]], **settings)
        if name == "ecd":
            made.register_step_pre_hook(_GiveLoss(_listen(model)))
        return made


def _labelled(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by name; "embedding" is put before that of one that Muon leaves to AdamW."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outer.add(id(head.weight))
    return [
        (f"embedding:{name}" if id(parameter) in outer else name, parameter)
        for name, parameter in model.named_parameters()
    ]


class _Loss:
    """Forward hook of the whole model: the loss that has been differentiated since it was last taken."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        found = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if isinstance(found, Tensor) and found.requires_grad and found.numel() == 1:
            value = found.detach().clone()  # Trainer scales the loss in place
            found.register_hook(lambda derivative: self._add(value * derivative))

    def _add(self, term: Tensor) -> None:
        term = term.detach().double().reshape(())
        self.value = term if self.value is None else self.value + term.to(self.value.device)

    def take(self) -> Tensor | None:
        """The sum, which starts anew."""
        value, self.value = self.value, None
        return value


def _listen(model: nn.Module) -> _Loss:
    """Put the hook in, in the place of that of an earlier optimiser."""
    for key in [key for key, hook in model._forward_hooks.items() if isinstance(hook, _Loss)]:
        del model._forward_hooks[key]
    loss = _Loss()
    model.register_forward_hook(loss)
    return loss


class _GiveLoss:
    """Pre-hook of the optimiser's step: hand it the loss, its mean over the processes."""

    def __init__(self, loss: _Loss) -> None:
        self.loss = loss

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        value = self.loss.take()
        if kwargs.get("loss") is not None or any(argument is not None for argument in args[1:]):
            return None
        if value is None:
            if not any(group["lr"] for group in optimizer.param_groups):
                return None
            raise ValueError(
                "ECD saw no loss for this step: it takes the loss from the output of the model, so let the model "
                "compute it (labels in the batch, no compute_loss_func and no label smoothing)"
            )
        sharded = any(hasattr(p, "full_tensor") for group in optimizer.param_groups for p in group["params"])
        distributed = torch.distributed
        if not sharded and distributed.is_available() and distributed.is_initialized():  # shards: ECD takes the mean
            distributed.all_reduce(value)
            value = value / distributed.get_world_size()
        return args, kwargs | {"loss": value}


class ChargeCallback(transformers.TrainerCallback):
    """Logs `erlangen.gauge.charges` during training, through `Trainer`'s own log.

    Names are "charge/qk/0" and so on: sector and layer, the mean over the heads. They reach ``state.log_history`` and
    every tracker. `Trainer` hands its callbacks no way to its log, so this one is given the trainer:
    ``trainer.add_callback(ChargeCallback(trainer))``.

    Where there is no charge to be had (an optimiser without momentum), it warns once and training goes on.

    Args:
        trainer: the `Trainer` that it is added to.
        every: optimiser steps between two records. None: whenever the loss is logged or the model evaluated.

    Raises:
        TypeError, ValueError: when training starts: the layouts of the model are unknown, or its heads are sharded
            in a way that does not leave whole tensors (FSDP1, DeepSpeed).
    """

    def __init__(self, trainer: Any, *, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, received {every}")
        self.trainer, self.every = trainer, every
        self._last, self._warned = -1, False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Refuse what could not be measured."""
        if model is None:
            return
        if args.deepspeed is not None or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
            raise ValueError(
                "charges need whole heads, and FSDP1 and DeepSpeed cut parameters anywhere: train with DDP or "
                "FSDP2 (fsdp_version 2), or leave ChargeCallback out"
            )
        head_layouts(unwrap(model))
        self._last, self._warned = -1, False

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """After a step."""
        due = control.should_log or control.should_evaluate
        if due if self.every is None else state.global_step % self.every == 0:
            self._log(state, control, **parts)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """After an epoch, where `Trainer` logs or evaluates by epochs."""
        if self.every is None and (control.should_log or control.should_evaluate):
            self._log(state, control, **parts)

    def _log(self, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **_: Any) -> None:
        if state.global_step == self._last:
            return
        if not optimizer.state and any(group.get("momentum", 1) for group in optimizer.param_groups):
            return  # the first step was left out, as fp16 does when its scale is too large
        try:
            found = charges(model, optimizer)  # accelerate's wrapper of an optimiser hands on its state
        except ValueError as error:
            if not self._warned:
                warnings.warn(f"no charges are logged: {error}", stacklevel=2)
            self._warned = True
            return
        self._last = state.global_step
        due = control.should_log  # a log of ours is not that of the loss, which is still to come
        self.trainer.log(
            {
                f"charge/{sector}/{layer}": sum(heads) / len(heads)
                for layer, sectors in found.items()
                for sector, heads in sectors.items()
            }
        )
        control.should_log = due


class RedrawCallback(transformers.TrainerCallback):
    """One draw for each step of the optimiser in a model broken with ``redraw="step"``, all its micro-batches alike."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Before the first micro-batch of a step."""
        if model is not None:
            breaking.redraw(model)
