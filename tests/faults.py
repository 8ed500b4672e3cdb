"""Planted faults: what can be wrong with a fusion, and whether `verify_fusion` finds it.

A fault is a line of `FAULTS`: what is broken, where, and how. `found` plants it in the fusion of a small network whose
every parameter and statistic is random, and says what verification makes of it; `planted` plants it in any model with
such a place (hub/test_gate_faults.py: in checkpoints). Where a fault names ``{block}``, it is planted in a block that
the output shows or in one that gamma = 0 hides. A layer class can be broken, too, while the model is fused and
verified.

A new method adds its own faults; those of the kernels, norms and settings hold for it as they are.
"""

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from stand_in import disturbed, images
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from timm_reparam import ACBlock2d, ReparamError, convert_model, fuse_model, verify_fusion
from timm_reparam.variants import VARIANTS

STATIC = tuple(name for name, variant in VARIANTS.items() if not variant.input_dependent)
DYNAMIC = tuple(name for name in VARIANTS if name not in STATIC)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = 6


class Block(nn.Module):
    """A residual block; where its last norm has gamma = 0, all that lies before that norm is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.act1 = nn.LeakyReLU(0.1)
        self.idle = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)
        self.bn2 = BatchNormAct2d(CHANNELS, apply_act=False)
        self.act2 = nn.Hardswish()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act2(x + self.bn2(self.conv2(self.idle(self.act1(self.bn1(self.conv1(x)))))))


class Net(nn.Module):
    """Every kind of layer around two blocks, the second one hidden; `spare` is not reached, `again` runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.blocks = nn.Sequential(Block(), Block())
        self.block = ACBlock2d(CHANNELS, CHANNELS, 3, padding=1, groups=2, last_norm=True)
        self.again = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.same = Conv2dSame(CHANNELS, CHANNELS, 3, stride=2)
        self.norm_act = BatchNormAct2d(CHANNELS, act_layer=nn.SiLU)
        self.up = nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        self.reflect = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode='reflect', groups=CHANNELS)
        self.spare = nn.Conv2d(CHANNELS, CHANNELS, 3)
        self.point = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.pool = nn.AvgPool2d(2)
        self.pools = nn.Sequential(nn.Hardtanh(), nn.Tanh())
        self.group_norm = nn.GroupNorm(2, CHANNELS)
        self.scale = 0.5
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.blocks(self.bn(self.stem(x))))
        x = self.again(self.again(x)) * self.scale
        x = self.reflect(self.up(self.norm_act(self.same(x))))
        x = self.group_norm(self.pools(self.pool(self.point(x))))
        return self.head(x.mean((2, 3)))


@functools.cache
def right(variant: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A network, its right fusion, and inputs; all are shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = disturbed(convert_model(Net(), variant)).to(dtype).eval()
        with torch.no_grad():
            for module in model.modules():
                if variant in DYNAMIC and hasattr(module, 'attention'):
                    module.attention.fc2.weight.mul_(10)  # an attention that tells samples apart
            model.blocks[1].bn2.weight.zero_()
    return model, fuse_model(model), images(4, 3, 11, 12)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A way in which a fusion can be wrong.

    Args:
        name: What is broken.
        where: Name of the module, with ``{block}`` for a shown or a hidden block.
        how: Breaks it, given the module, the whole fused model and the module of the train-time model; what it
            returns, if anything, takes the module's place.
        variants: The variants in which it can be broken so.
        broken: Instead of `how`, the context in which a layer class is wrong, given the class.
    """

    name: str
    where: str = ''
    how: Callable[[Any, nn.Module, Any], nn.Module | None] | None = None
    variants: tuple[str, ...] = tuple(VARIANTS)
    broken: Callable[[type[nn.Module]], AbstractContextManager[Any]] | None = None

    def __str__(self) -> str:
        return self.name.replace(' ', '_')

    @property
    def places(self) -> tuple[str, ...]:
        if '{block}' in self.where:
            return self.where.format(block='blocks.0'), self.where.format(block='blocks.1')
        return (self.where,)


@contextmanager
def planted(fault: Fault, place: str, variant: str, model: nn.Module, fused: nn.Module) -> Iterator[nn.Module]:
    """A copy of the right fusion with a fault in it; what is broken of a layer class is so until it is left."""
    with nullcontext() if fault.broken is None else fault.broken(VARIANTS[variant].layer):
        fused = copy.deepcopy(fused) if fault.broken is None else fuse_model(model)
        if fault.how is not None:
            new = fault.how(fused.get_submodule(place), fused, model.get_submodule(place))
            if new is not None and place:
                parent, _, name = place.rpartition('.')
                setattr(fused.get_submodule(parent), name, new)
            fused = fused if place or new is None else new
        yield fused


@torch.no_grad()
def found(fault: Fault, place: str, variant: str, dtype: torch.dtype) -> str:
    """What verification says of a planted fault; empty if it passes."""
    model, fused, x = right(variant, dtype)
    with planted(fault, place, variant, model, fused) as fused:
        try:
            report = verify_fusion(model, fused, inputs=x)
        except ReparamError as error:
            return str(error)
        assert report.passed == (not report.layers_off and not report.problems) or report.stored > report.bound
        return '' if report.passed else str(report)


def set_values(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """A fault that changes the values of a tensor of the module."""

    def how(module: nn.Module, fused: nn.Module, of_model: nn.Module) -> None:
        tensor = getattr(module, name)
        tensor.copy_(change(tensor.clone()))

    return how


def set_attributes(**values: Any) -> Callable[..., None]:
    """A fault that changes attributes of the module."""

    def how(module: nn.Module, fused: nn.Module, of_model: nn.Module) -> None:
        for name, value in values.items():
            setattr(module, name, value)

    return how


def instead(make: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    """A fault that puts another module into the place."""
    return lambda module, fused, of_model: make().to(next(fused.parameters()).dtype).eval()


def at(index: tuple[Any, ...], change: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of some entries of a tensor."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = change(tensor[index])
        return tensor

    return changed


def swapped(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A tensor with the first two entries of a dimension swapped."""
    return lambda tensor: tensor.index_select(dim, torch.tensor([1, 0, *range(2, tensor.shape[dim])]))


def few_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Values rounded to a quarter of the dtype's precision."""
    step = 4 * torch.finfo(tensor.dtype).eps * tensor.abs().max()
    return (tensor / step).round() * step


def two_units(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 2 * torch.finfo(tensor.dtype).eps * 2.0 ** tensor.abs().log2().floor()


class Doubling(nn.Conv2d):
    """A convolution of the right name of settings, and of another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def doubling(module: Any, fused: nn.Module, of_model: Any) -> nn.Module:
    module = copy.copy(module)
    module.__class__ = Doubling
    return module


class Ten(nn.Identity):
    """Nothing that is idle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * x


def reordered(module: nn.Module, fused: nn.Module, of_model: nn.Module) -> None:
    module._modules = dict(reversed(module._modules.items()))


def of_another_layer(module: Any, fused: nn.Module, of_model: Any) -> nn.Module:
    """The first other layer whose parameters have the same shapes."""
    shapes = [parameter.shape for parameter in module.parameters()]
    layers = [layer for layer in fused.modules() if type(layer) is type(module) and layer is not module]
    return copy.deepcopy(next(layer for layer in layers if [p.shape for p in layer.parameters()] == shapes))


def stock_kernel(module: Any, fused: nn.Module, of_model: Any) -> None:
    module.weight.copy_(of_model.weight)


def without_its_same_padding(module: Any, fused: nn.Module, of_model: Any) -> nn.Module:
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1, dtype=module.weight.dtype)
    conv.load_state_dict(module.state_dict())
    return conv


def new_bias(module: Any, fused: nn.Module, of_model: Any) -> None:
    module.bias = nn.Parameter(torch.full_like(module.weight[:, 0, 0, 0], 0.125))


def not_divided(module: Any, fused: nn.Module, of_model: Any) -> None:
    module.attention.fc2.load_state_dict(of_model.attention.fc2.state_dict())


def other_dtype(module: nn.Module, fused: nn.Module, of_model: nn.Module) -> None:
    module.to(torch.float64)


def method(name: str, function: Callable[..., Any]) -> Callable[[type[nn.Module]], AbstractContextManager[Any]]:
    """A layer class with another method in the place of one of its own."""
    return lambda layer: patch.object(layer, name, function)


def wrapped(name: str, change: Callable[[Any, Any], Any]) -> Callable[[type[nn.Module]], AbstractContextManager[Any]]:
    """A layer class with a method whose result is changed, by a function of the layer and the result."""

    def broken(layer: type[nn.Module]) -> AbstractContextManager[Any]:
        original = getattr(layer, name)
        return patch.object(layer, name, lambda self, *args, **kwargs: change(self, original(self, *args, **kwargs)))

    return broken


def composed_with(**values: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., AbstractContextManager[Any]]:
    """A layer class that composes its kernel from changed parameters."""

    def broken(layer: type[Any]) -> AbstractContextManager[Any]:
        original = layer._compose

        def compose(self: Any) -> torch.Tensor:
            changed = copy.deepcopy(self)
            for name, change in values.items():
                tensor = getattr(changed, name, None)
                if tensor is not None:  # not every layer has every branch
                    tensor.copy_(change(tensor.clone()))
            return original(changed)

        return patch.object(layer, '_compose', compose)

    return broken


def without_bias(conv: Any) -> Any:
    if conv.bias is not None:
        conv.bias = nn.Parameter(torch.zeros_like(conv.bias))
    return conv


def with_stride(conv: Any) -> Any:
    conv.stride = (1, 1) if conv.stride != (1, 1) else (2, 2)
    return conv


def at_temperature_1(layer: Any, of_model: Any) -> Any:
    layer.attention.load_state_dict(of_model.attention.state_dict())
    return layer


def fused_after(change: Callable[[Any], Any]) -> Callable[..., nn.Module]:
    """A fault that puts the fusion of a changed block into the place of that of the right one."""

    def how(module: nn.Module, fused: nn.Module, of_model: Any) -> nn.Module:
        block = copy.deepcopy(of_model)
        change(block)
        return block.fuse()

    return how


def in_block(name: str, change: Callable[[Any], Any]) -> Callable[[type[nn.Module]], AbstractContextManager[Any]]:
    """ACNet's block with a method whose result is changed."""
    return lambda layer: wrapped(name, lambda block, result: change(result))(ACBlock2d)


CONV1, CONV2, BN1, BN2 = '{block}.conv1', '{block}.conv2', '{block}.bn1', '{block}.bn2'
TRANSPOSED = ('doconv', 'refconv')
FAULTS = (
    # the kernel of a layer
    Fault('a tap two units in the last place off', CONV1, set_values('weight', at((1, 2, 0, 1), two_units))),
    Fault('a tap that is zero', CONV1, set_values('weight', at((1, 2, 0, 1), lambda tap: 0))),
    Fault('a tap of the other sign', CONV1, set_values('weight', at((3, 1, 2, 2), torch.neg))),
    Fault('a tap that is not a number', CONV1, set_values('weight', at((0, 0, 1, 1), lambda tap: float('nan')))),
    Fault('two taps swapped', CONV1, set_values('weight', at((2, 3, 1), lambda row: row.flip(0)))),
    Fault('two output channels swapped', CONV1, set_values('weight', swapped(0))),
    Fault('two input channels swapped', CONV1, set_values('weight', swapped(1))),
    Fault('inputs and outputs transposed', CONV1, set_values('weight', lambda kernel: kernel.transpose(0, 1))),
    Fault('rows and columns transposed', CONV1, set_values('weight', lambda kernel: kernel.transpose(2, 3))),
    Fault('a kernel turned round', CONV1, set_values('weight', lambda kernel: kernel.flip(2, 3))),
    Fault('a kernel one column off', CONV1, set_values('weight', lambda kernel: kernel.roll(1, 3))),
    Fault('a kernel 3 % too large', CONV1, set_values('weight', lambda kernel: 1.03 * kernel)),
    Fault('one output channel 1 % too large', CONV1, set_values('weight', at((4,), lambda kernel: 1.01 * kernel))),
    Fault('a kernel of the other sign', CONV1, set_values('weight', torch.neg)),
    Fault('a kernel of zeros', CONV1, set_values('weight', torch.zeros_like)),
    Fault('a kernel of fewer bits', CONV1, set_values('weight', few_bits)),
    Fault('a kernel of the mean of the taps', CONV1, set_values('weight', lambda k: k.mean((2, 3), True).expand_as(k))),
    Fault('the stock kernel', CONV1, stock_kernel, STATIC),
    Fault("another layer's parameters", CONV1, of_another_layer),
    Fault('two groups swapped', CONV2, set_values('weight', lambda kernel: kernel.roll(CHANNELS // 2, 0))),
    Fault('a tap of a grouped kernel', CONV2, set_values('weight', at((5, 0, 2, 2), lambda tap: tap + 0.25))),
    Fault('a tap of the stem', 'stem', set_values('weight', at((5, 2, 2, 2), lambda tap: tap + 0.25))),
    Fault('a tap of a depthwise kernel', 'reflect', set_values('weight', at((5, 0, 2, 2), lambda tap: tap + 0.25))),
    Fault('a tap of a layer that runs twice', 'again', set_values('weight', at((5, 2, 2, 2), lambda tap: tap + 0.25))),
    Fault('a tap of a layer that is not reached', 'spare', set_values('weight', at((0, 0, 0, 0), lambda tap: tap + 1))),
    Fault('a tap of a plain layer', 'point', set_values('weight', at((0, 0, 0, 0), two_units))),
    Fault('a transposed kernel turned round', 'up', set_values('weight', lambda k: k.flip(2, 3)), TRANSPOSED),
    Fault('a transposed kernel transposed', 'up', set_values('weight', lambda k: k.transpose(0, 1)), TRANSPOSED),
    # its bias
    Fault('a bias of zeros', CONV2, set_values('bias', torch.zeros_like)),
    Fault('a bias of the other sign', CONV2, set_values('bias', torch.neg)),
    Fault('two biases swapped', CONV2, set_values('bias', swapped(0))),
    Fault('no bias', CONV2, set_attributes(bias=None)),
    Fault('a bias that is new', CONV1, new_bias),
    # its settings and its type
    Fault('another stride', CONV1, set_attributes(stride=(2, 2))),
    Fault('no padding', CONV1, set_attributes(padding=(0, 0))),
    Fault('another dilation', CONV1, set_attributes(dilation=(2, 2), padding=(2, 2))),
    Fault('another padding mode', CONV1, set_attributes(padding_mode='circular')),
    Fault('a padding mode lost', 'reflect', set_attributes(padding_mode='zeros')),
    Fault('padding on one side', 'reflect', set_attributes(_reversed_padding_repeated_twice=[2, 0, 2, 0])),
    Fault('SAME padding lost', 'same', without_its_same_padding, STATIC),
    Fault('an output padding', 'up', set_attributes(output_padding=(1, 1)), TRANSPOSED),
    Fault('a class of another function', CONV1, doubling, STATIC),
    Fault('a layer that is skipped', CONV1, instead(nn.Identity)),
    Fault('a forward of its own', CONV1, set_attributes(forward=lambda x: x)),
    Fault(
        'a bias in another dtype',
        'spare',
        lambda module, fused, layer: setattr(module, 'bias', nn.Parameter(module.bias.double())),
    ),
    # norms
    Fault('means lost', BN1, set_values('running_mean', torch.zeros_like)),
    Fault('variances lost', BN1, set_values('running_var', torch.ones_like)),
    Fault('a variance two units off', BN1, set_values('running_var', at((1,), two_units))),
    Fault('two weights of a norm swapped', BN1, set_values('weight', swapped(0))),
    Fault('a bias of a norm', BN1, set_values('bias', at((1,), lambda value: value + 0.25))),
    Fault('a bias of the last norm', BN2, set_values('bias', at((1,), lambda value: value + 0.25))),
    Fault('the gamma that hides', 'blocks.1.bn2', set_values('weight', torch.ones_like)),
    Fault('another eps', BN1, set_attributes(eps=1e-4)),
    Fault('another momentum', BN1, set_attributes(momentum=0.2)),
    Fault('a norm with a forward of its own', BN1, set_attributes(forward=lambda x: x)),
    Fault('a norm that is skipped', BN1, instead(nn.Identity)),
    Fault('a norm of another kind', BN1, instead(lambda: nn.InstanceNorm2d(CHANNELS, affine=True))),
    Fault('another number of groups', 'group_norm', set_attributes(num_groups=3)),
    # what lies between
    Fault('another slope', '{block}.act1', set_attributes(negative_slope=0.2)),
    Fault('another activation', '{block}.act1', instead(nn.ReLU)),
    Fault('an activation that is skipped', '{block}.act1', instead(nn.Identity)),
    Fault('another activation of a norm', 'norm_act.act', instead(nn.ReLU)),
    Fault('an activation that is new', '{block}.bn2.act', instead(nn.ReLU)),
    Fault('an idle module that is none', '{block}.idle', instead(Ten)),
    Fault('an idle module with a forward of its own', '{block}.idle', set_attributes(forward=lambda x: 2 * x)),
    Fault(
        'a class of the same name',
        '{block}.act1',
        instead(
            type('LeakyReLU', (nn.LeakyReLU,), {'forward': lambda self, x: x, '__module__': nn.LeakyReLU.__module__})
        ),
    ),
    Fault('modules in another order', 'pools', reordered),
    Fault('another pooling', 'pool', set_attributes(ceil_mode=True)),
    Fault('pooling of another kind', 'pool', instead(lambda: nn.MaxPool2d(2))),
    Fault('another number of the model', '', set_attributes(scale=0.51)),
    Fault('a weight of the head', 'head', set_values('weight', at((1, 1), two_units))),
    Fault('two classes swapped', 'head', set_values('bias', swapped(0))),
    Fault('a block that is skipped', 'blocks.1', instead(nn.Identity)),
    Fault('a block in another dtype', '{block}.conv1', other_dtype),
    # the models as a whole
    Fault('the model itself', '', lambda module, fused, model: model),
    Fault('a copy of the model', '', lambda module, fused, model: copy.deepcopy(model)),
    Fault('one layer that is not fused', CONV1, lambda module, fused, layer: copy.deepcopy(layer)),
    # classes
    Fault(
        'fuse forgets what the method adds',
        variants=STATIC,
        broken=method('fuse', lambda self: self.plain_conv(self.weight.detach(), self.bias)),
    ),
    Fault(
        'the kernel forgets what the method adds', variants=STATIC, broken=method('_compose', lambda self: self.weight)
    ),
    Fault(
        'the kernel is composed in half precision',
        variants=STATIC,
        broken=wrapped('_compose', lambda self, kernel: kernel.bfloat16().to(kernel)),
    ),
    Fault(
        'the kernel is composed 1e-7 too large',
        variants=STATIC,
        broken=wrapped('_compose', lambda self, kernel: kernel * (1 + 1e-7)),
    ),
    Fault('fuse forgets the bias', broken=wrapped('fuse', lambda self, conv: without_bias(conv))),
    Fault('fuse forgets the stride', broken=wrapped('fuse', lambda self, conv: with_stride(conv))),
    Fault(
        'statistics of a branch ignored',
        variants=('acconv',),
        broken=composed_with(vertical_running_var=torch.ones_like),
    ),
    Fault(
        'eps of a branch ignored',
        variants=('acconv',),
        broken=composed_with(horizontal_running_var=lambda variance: variance - 1e-5),
    ),
    Fault(
        'gammas of the branches exchanged',
        variants=('acconv',),
        broken=composed_with(vertical_gamma=lambda gamma: gamma.flip(0)),
    ),
    Fault('a branch of zeros', variants=('acconv',), broken=composed_with(vertical_weight=torch.zeros_like)),
    Fault('no mean', variants=('dbbconv', 'orepaconv'), broken=composed_with(mean_weight=torch.zeros_like)),
    Fault(
        'E of a 1x1 kernel forgotten',
        variants=('dbbconv', 'orepaconv'),
        broken=lambda layer: patch.object(sys.modules[layer.__module__], 'identity_kernel', torch.zeros_like),
    ),
    Fault(
        'variances of the branches exchanged',
        variants=('dbbconv',),
        broken=composed_with(sequential_running_var=lambda variance: variance.roll(1, 0)),
    ),
    Fault(
        'gammas of the channels exchanged',
        variants=('dbbconv', 'orepaconv'),
        broken=composed_with(point_gamma=lambda gamma: gamma.flip(0)),
    ),
    Fault(
        'cosines of another channel',
        variants=('orepaconv',),
        broken=composed_with(prior=lambda prior: prior.roll(1, 0)),
    ),
    Fault(
        'depthwise kernels of another channel',
        variants=('orepaconv',),
        broken=composed_with(depthwise_weight=lambda weight: weight.roll(8, 0)),
    ),
    Fault(
        'the own factor of the kernel ignored',
        variants=('orepaconv',),
        broken=composed_with(weight_gamma=torch.ones_like),
    ),
    Fault(
        'D transposed',
        variants=('doconv',),
        broken=composed_with(depthwise_weight=lambda depthwise: depthwise.transpose(1, 2)),
    ),
    Fault(
        'D of another channel',
        variants=('doconv',),
        broken=composed_with(depthwise_weight=lambda depthwise: depthwise.roll(1, 0)),
    ),
    Fault(
        'D without its identity',
        variants=('doconv',),
        broken=wrapped('_compose', lambda self, kernel: kernel - self.weight),
    ),
    Fault('a map turned round', variants=('refconv',), broken=composed_with(map_weight=lambda maps: maps.flip(2, 3))),
    Fault(
        'maps of other kernels', variants=('refconv',), broken=composed_with(map_weight=lambda maps: maps.roll(1, 0))
    ),
    Fault(
        'a map without its base',
        variants=('refconv',),
        broken=wrapped('_compose', lambda self, kernel: kernel - self.weight),
    ),
    Fault('a layer that is not what its method says', broken=wrapped('forward', lambda self, y: 1.5 * y)),
    # a block that is fused, whatever the variant of the layers around it
    Fault('a tap of a block', 'block', set_values('weight', at((5, 0, 2, 2), two_units))),
    Fault('a bias of a block', 'block', set_values('bias', at((1,), lambda value: value + 0.25))),
    Fault('no bias of a block', 'block', set_attributes(bias=None)),
    Fault('a branch of a block dropped', 'block', fused_after(lambda block: block.ver_conv.weight.zero_())),
    Fault('a norm of a block dropped', 'block', fused_after(lambda block: block.hor_bn.reset_parameters())),
    Fault('the last norm of a block dropped', 'block', fused_after(lambda block: setattr(block, 'last_bn', None))),
    Fault('another number of groups of a block', 'block', set_attributes(groups=1)),
    Fault('a block that is not fused', 'block', lambda module, fused, block: copy.deepcopy(block)),
    Fault('fuse forgets the bias of a block', 'block', broken=in_block('fuse', lambda conv: without_bias(conv))),
    Fault(
        'the kernel of a block is composed 1e-7 too large',
        'block',
        broken=in_block('_fold', lambda folded: (folded[0] * (1 + 1e-7), folded[1])),
    ),
    # dynamic convolution
    Fault('a temperature that is not folded in', CONV1, not_divided, DYNAMIC),
    Fault('residual kernels of zeros', CONV1, set_values('residual_weight', torch.zeros_like), DYNAMIC),
    Fault('residual kernels of the other sign', CONV1, set_values('residual_weight', torch.neg), DYNAMIC),
    Fault('two residual kernels swapped', CONV1, set_values('residual_weight', lambda k: k.roll(CHANNELS, 0)), DYNAMIC),
    Fault('residual biases of zeros', CONV2, set_values('residual_bias', torch.zeros_like), DYNAMIC),
    Fault('a weight of the attention', f'{CONV1}.attention.fc1', set_values('weight', at((0, 0), torch.neg)), DYNAMIC),
    Fault('a schedule that is left', CONV1, lambda module, fused, layer: copy.deepcopy(layer), DYNAMIC),
    Fault(
        'an attention without effect',
        variants=DYNAMIC,
        broken=wrapped('_coefficients', lambda self, coefficients: torch.zeros_like(coefficients)),
    ),
    Fault(
        'fuse at temperature 1',
        variants=DYNAMIC,
        broken=wrapped('fuse', lambda self, layer: at_temperature_1(layer, self)),
    ),
)
