"""Planted faults in loading: what can be wrong when a layer takes a stock state dict, and whether the checks see it.

A fault is a line of `LOADING_FAULTS`, a context in which a layer class loads wrongly. `problems` loads stock entries,
some of a variant's own and foreign ones into a small network whose every parameter and statistic is random, and says
what is not as it should be: nothing, where the class is right.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from faults import Net
from stand_in import disturbed, images
from torch import nn

from timm_reparam import convert_model, is_variant
from timm_reparam.layers._base import ReparamLayer
from timm_reparam.variants import VARIANTS

# Entries that closed gates hide, which a lift leaves as they are.
HIDDEN = (
    *('vertical_weight', 'horizontal_weight', 'residual_weight', 'residual_bias', 'fc1.weight', 'fc1.bias'),
    *('point_weight', 'mean_weight', 'inner_weight', 'outer_weight', 'first_weight', 'pointwise_weight', 'prior'),
)
BOUND = 1e-12


def stock_net(seed: int) -> nn.Module:
    return disturbed(Net(), seed).double().eval()


def variant_net(variant: str) -> nn.Module:
    return disturbed(convert_model(Net(), variant), 2).double().eval()


def refused(model: nn.Module, entries: dict[str, torch.Tensor]) -> str:
    """The error of a strict load, '' if there is none."""
    try:
        model.load_state_dict(entries)
    except RuntimeError as error:
        return str(error)
    return ''


def problems(variant: str, broken: AbstractContextManager[Any] | None = None) -> list[str]:
    """What is wrong with how a variant loads; it loads in the given context, and is built before that."""
    torch.manual_seed(0)
    stock, model = stock_net(seed=5), variant_net(variant)
    with broken or nullcontext():
        return _problems(stock, model)


@torch.no_grad()
def _problems(stock: nn.Module, model: nn.Module) -> list[str]:
    found = []
    untouched, before, drawn = copy.deepcopy(model), copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    name, layer = next((name, module) for name, module in model.named_modules() if is_variant(module))
    added = [f'{name}.{key}' for key in layer.state_dict() if key not in ('weight', 'bias')]

    incomplete = {key: value for key, value in before.items() if key != added[0]}
    if len(added) > 1 and 'Missing' not in refused(model, incomplete):
        found.append('some of its own entries are enough')
    foreign = {**stock.state_dict(), f'{name}.of_another_method': torch.ones(2)}
    if 'Missing' not in refused(model, foreign):
        found.append("another method's entries pass")
    reshaped = {**stock.state_dict(), f'{name}.weight': torch.ones(1, 1, 1, 1)}
    if 'size mismatch' not in refused(model, reshaped):
        found.append('a kernel of another shape passes')
    if any(not torch.equal(before[key], model.state_dict()[key]) for key in added):
        found.append('a refused load moves what the method adds')

    model = untouched
    torch.random.set_rng_state(drawn)
    if message := refused(model, stock.state_dict()):
        return [*found, f'stock entries are refused: {message[:80]}']
    x = images(4, 3, 11, 12).double()
    expected = stock(x)
    if not (model(x) - expected).abs().max() <= BOUND * expected.abs().max():
        found.append('another function')
    if not torch.equal(torch.random.get_rng_state(), drawn):
        found.append('random numbers are drawn')
    if any(key.endswith(HIDDEN) and not torch.equal(before[key], value) for key, value in model.state_dict().items()):
        found.append('what the gates hide is drawn anew')
    return found


def _method(name: str, wrong: Callable[..., Any]) -> Callable[[type[ReparamLayer]], AbstractContextManager[Any]]:
    """A context in which a class has another method: `wrong`, called with the right one in front."""

    @contextmanager
    def broken(layer: type[ReparamLayer]) -> Iterator[None]:
        right = getattr(layer, name)
        with patch.object(layer, name, lambda self, *args: wrong(right, self, *args)):
            yield

    return broken


def _keep_open(of: int) -> Callable[..., None]:
    """Close the gates but the one of this number."""

    def close(right: Callable[..., None], layer: nn.Module) -> None:
        parameters = [(name, parameter.detach().clone()) for name, parameter in layer.named_parameters()]
        gammas = [(name, value) for name, value in parameters if name.endswith('_gamma')]
        gates = gammas or [(name, value) for name, value in parameters if name.endswith(GATES)]
        right(layer)
        if gates:
            name, kept = gates[of]
            layer.get_parameter(name).data.copy_(kept)

    return close


# of methods without factors
GATES = ('depthwise_weight', 'map_weight', 'fc2.weight', 'fc2.bias')


def _redraw(right: Callable[..., None], layer: nn.Module) -> None:
    right(layer)
    for name, parameter in layer.named_parameters():
        if name.endswith(HIDDEN):
            parameter.data.add_(1)


def _draw(right: Callable[..., None], layer: nn.Module) -> None:
    torch.rand(1)
    right(layer)


def _never(right: Callable[..., None], layer: nn.Module, *args: Any) -> None:
    nn.Conv2d._load_from_state_dict(layer, *args)


def _always(right: Callable[..., None], layer: nn.Module, entries: dict[str, Any], prefix: str, *args: Any) -> None:
    """Whatever else lies under the name of the layer."""
    for key in [key for key in entries if key.startswith(prefix)]:
        if key.removeprefix(prefix) not in ('weight', 'bias'):
            del entries[key]
    right(layer, entries, prefix, *args)


def _own_weight(right: Callable[..., None], layer: nn.Module, entries: dict[str, Any], prefix: str, *args: Any) -> None:
    if entries[f'{prefix}weight'].shape == layer.weight.shape:
        entries[f'{prefix}weight'] = layer.weight.detach().clone()
    right(layer, entries, prefix, *args)


def _at_once(right: Callable[..., None], layer: nn.Module, *args: Any) -> None:
    """Before anything is checked."""
    layer._close_gates()
    right(layer, *args)


LOAD, CLOSE = '_load_from_state_dict', '_close_gates'
LOADING_FAULTS: dict[str, tuple[tuple[str, ...], Callable[[type[ReparamLayer]], AbstractContextManager[Any]]]] = {
    'gates stay open': (tuple(VARIANTS), _method(CLOSE, lambda right, layer: None)),
    'the first gate stays open': (tuple(VARIANTS), _method(CLOSE, _keep_open(0))),
    'the last gate stays open': (tuple(VARIANTS), _method(CLOSE, _keep_open(-1))),
    'what the gates hide is changed': (('acconv', 'dbbconv', 'dyconv', 'orepaconv'), _method(CLOSE, _redraw)),
    'random numbers are drawn': (tuple(VARIANTS), _method(CLOSE, _draw)),
    'stock entries are never a lift': (tuple(VARIANTS), _method(LOAD, _never)),
    'any entries are a lift': (tuple(VARIANTS), _method(LOAD, _always)),
    'the kernel is not loaded': (tuple(VARIANTS), _method(LOAD, _own_weight)),
    'gates close before the check': (tuple(VARIANTS), _method(LOAD, _at_once)),
}


def found(fault: str, variant: str) -> list[str]:
    """What the checks say of a planted fault."""
    _, broken = LOADING_FAULTS[fault]
    return problems(variant, broken(VARIANTS[variant].layer))
