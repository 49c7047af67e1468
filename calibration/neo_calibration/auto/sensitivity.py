"""Measures sensitivities: the KL divergence from float32 with only one group quantized.

This takes one sweep over the layers, with one layer's weights in memory. At layer i, each of its
groups is quantized in each candidate storage, with activations rounded as the kernels round them.
The resulting hidden states are a *variant*, which continues through the later layers in float32. At
the end every variant has logits to compare. All variants together cost half as many passes over
the model as there are variants, and hidden states of `variants × positions` are held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
from neo_export.comparison.metrics import kl_divergence
from neo_export.comparison.reference import LayeredReference
from neo_export.gpt_neo.parameters import EMBEDDING, HEAD, LAYER_INPUTS, head_name, readers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from neo_export.checkpoint.whole import Checkpoint
    from neo_export.quantize.plan import Storage
    from neo_runtime.bundle.manifest import ModelSpec
    from numpy.typing import NDArray

    from neo_calibration.auto.stored_form import StoredForm

__all__ = ["Group", "groups_of", "measure_sensitivities", "reference_logits"]


@dataclass(frozen=True)
class Group:
    """Matrices that share a storage: those that read the same input."""

    names: tuple[str, ...]
    layer: int | None
    """None for the token embedding or an untied head."""


def groups_of(spec: ModelSpec, keep: Sequence[str] = ()) -> tuple[Group, ...]:
    """All matrices of the model in groups, except those that match a shell pattern in `keep`."""
    groups = [Group((EMBEDDING,), None)]
    if not spec.tie_word_embeddings:
        groups.append(Group((HEAD,), None))
    for layer in range(spec.num_layers):
        places = [f"transformer.h.{layer}.{kind}" for kind in LAYER_INPUTS]
        groups += [Group(readers_of(place), layer) for place in places]

    def left(group: Group) -> tuple[str, ...]:
        return tuple(n for n in group.names if not any(fnmatchcase(n, p) for p in keep))

    return tuple(Group(left(group), group.layer) for group in groups if left(group))


@dataclass
class _Variant:
    """The model with one group quantized: its hidden states so far, [n, S, H]."""

    group: Group
    storage: Storage
    hidden: Any


def measure_sensitivities(
    checkpoint: Checkpoint,
    contexts: NDArray[np.int64],
    stored: StoredForm,
    candidates: Sequence[Storage],
    groups: Sequence[Group],
    progress: Callable[[int, int], None],
) -> dict[tuple[Group, Storage], float]:
    """Mean KL(float32 ‖ variant) over all positions, in nats, of each group in each storage.

    Args:
        checkpoint: the model.
        contexts: token ids [n, S], each from position 0.
        stored: rounds matrices and inputs for a storage.
        candidates: storages other than fp32, whose divergence is 0.
        groups: the groups to quantize, one at a time.
        progress: called with the number of layers done and the total.
    """
    reference = LayeredReference(checkpoint)
    spec = checkpoint.spec
    import torch

    with torch.inference_mode():
        hidden = torch.from_numpy(np.stack([reference.embed(ids) for ids in contexts]))
        variants = list(_of_tables(checkpoint, contexts, hidden, groups, stored, candidates))
        for layer in range(spec.num_layers):
            block = reference.load_block(layer)
            for variant in variants:
                variant.hidden = block(variant.hidden)[0]
            own = [group for group in groups if group.layer == layer]
            variants += list(_of_layer(block, hidden, own, stored, candidates))
            hidden = block(hidden)[0]
            progress(layer + 1, spec.num_layers + 1)
        found = _divergences(checkpoint, reference, hidden, variants, stored)
    progress(1, 1)
    return found


def reference_logits(
    checkpoint: Checkpoint, contexts: NDArray[np.int64]
) -> list[NDArray[np.float32]]:
    """PyTorch's logits [S, V] of each context, float32."""
    reference = LayeredReference(checkpoint)
    hidden = [reference.embed(ids) for ids in contexts]
    for index in range(checkpoint.spec.num_layers):
        layer = reference.layer(index)
        hidden = [layer.places(states)["residual"] for states in hidden]
    return [reference.logits(reference.final_norm(states)) for states in hidden]


def _of_tables(
    checkpoint: Checkpoint,
    contexts: NDArray[np.int64],
    hidden: Any,
    groups: Sequence[Group],
    stored: StoredForm,
    candidates: Sequence[Storage],
) -> Iterator[_Variant]:
    """Variants that start at the embedding; those of an untied head differ only at the end."""
    import torch

    for group in groups:
        if group.layer is not None:
            continue
        [name] = group.names
        weight = checkpoint.tensors[name].read()
        for storage in candidates:
            states = hidden
            if name == EMBEDDING:
                off = stored.weights({name: weight}, storage)[name][contexts] - weight[contexts]
                states = hidden + torch.from_numpy(off)
            yield _Variant(group, storage, states)


def _of_layer(
    block: Any,
    hidden: Any,
    groups: Sequence[Group],
    stored: StoredForm,
    candidates: Sequence[Storage],
) -> Iterator[_Variant]:
    """Variants that start in one layer; the block's weights are restored afterwards."""
    import torch

    for group in groups:
        modules = {name: _module(block, name) for name in group.names}
        kept = {name: module.weight.data for name, module in modules.items()}
        for storage in candidates:
            hooks = []
            made = stored.weights({name: kept[name].numpy() for name in modules}, storage)
            for name, module in modules.items():
                module.weight.data = torch.from_numpy(made[name])
                hooks.append(
                    module.register_forward_pre_hook(
                        lambda _module, inputs, n=name, s=storage: (stored.inputs(n, inputs[0], s),)
                    )
                )
            yield _Variant(group, storage, block(hidden)[0])
            for hook in hooks:
                hook.remove()
        for name, module in modules.items():
            module.weight.data = kept[name]


def _module(block: Any, name: str) -> Any:
    """The linear module inside a block, by its name in the checkpoint."""
    return block.get_submodule(".".join(name.split(".")[3:-1]))


def _divergences(
    checkpoint: Checkpoint,
    reference: LayeredReference,
    hidden: Any,
    variants: Sequence[_Variant],
    stored: StoredForm,
) -> dict[tuple[Group, Storage], float]:
    import torch

    norm = reference.load_final_norm()
    name = head_name(tied=checkpoint.spec.tie_word_embeddings)
    weight = checkpoint.tensors[name].read()
    table = torch.from_numpy(np.array(weight))
    finals = norm(hidden)
    found = {}
    for variant in variants:
        states, head = norm(variant.hidden), table
        if name in variant.group.names:
            head = torch.from_numpy(stored.weights({name: weight}, variant.storage)[name])
            states = stored.inputs(name, states, variant.storage)
        sums = [
            kl_divergence((exact @ table.T).numpy(), (own @ head.T).numpy()).sum()
            for exact, own in zip(finals, states, strict=True)
        ]
        found[variant.group, variant.storage] = float(sum(sums) / finals[..., 0].numel())
    return found
