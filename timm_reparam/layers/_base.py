"""Base classes of the over-parameterised convolutions: construction from a plain convolution, and fusion.

A variant is a small subclass of ``nn.Conv2d`` (or ``nn.ConvTranspose2d``) whose ``weight`` and ``bias`` keep the stock
names and shapes. Everything that a method adds lies beside them and is a residual from identity. Each method is one
file of this folder. Its class defines the parameters that it adds (``__init__``), their initial values
(``_init_variant_parameters`` and ``_close_gates``) and the equivalent kernel (``_compose``). A method that is more than
one convolution with that kernel also defines ``_forward_impl``.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, register_notrace_module
from timm.layers.padding import pad_same
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import ReparamError
from ._fusible import HOOKS, Fusible
from ._tensor import autocast_disabled, float64_copy, materialize

__all__ = [
    'Method',
    'PaddingMode',
    'ReparamLayer',
    'ReparamConv2d',
    'ReparamConvTranspose2d',
    'check_init',
    'conv_arguments',
]

PaddingMode = Literal['zeros', 'reflect', 'replicate', 'circular']


def _fx_leaf(layer: nn.Module, *inputs: Any) -> Any:
    """Record a call of the layer as one node of the graph that torch.fx is tracing, as for torch's own layers."""
    tracer = inputs[0].tracer
    return tracer.create_proxy('call_module', tracer.path_of_module(layer), inputs, {})


def check_init(owner: str, init: str) -> None:
    """Raise ReparamError unless `init` is 'lift' or 'scratch'."""
    if init not in ('lift', 'scratch'):
        raise ReparamError(f"{owner}: init must be 'lift' (exactly the given convolution) or 'scratch', got {init!r}")


@dataclasses.dataclass(frozen=True)
class Method:
    """Description and citation of a method.

    Attributes:
        name: Name of the method.
        summary: What it does, in a sentence or two.
        title: Title of the paper.
        authors: Authors in BibTeX format.
        venue: Journal or conference.
        year: Year of publication.
        arxiv: arXiv identifier.
    """

    name: str
    summary: str
    title: str
    authors: str
    venue: str
    year: str
    arxiv: str


@functools.cache
def _attributes_of(conv_type: Any) -> frozenset[str]:
    """Names of the instance attributes of a new convolution of this type."""
    return frozenset(vars(conv_type(1, 1, 1, device='meta')))


class ReparamLayer(Fusible, _ConvNd):
    """Mixin in front of a torch convolution: ``from_conv``, ``equivalent_kernel`` and ``fuse``.

    Attributes:
        method: Description and citation of the method.
        conv_types: Exact types of convolution that this layer replaces.
        needs_trained_weights: Whether the method only makes sense with trained weights to start from.
        schedule_options: Options of a training schedule. One of them is None in the form for inference.
        training_warning: Warning of the first forward pass in training mode; loading weights clears it.
    """

    method: ClassVar[Method]
    conv_types: ClassVar[tuple[type[_ConvNd], ...]] = ()
    needs_trained_weights: ClassVar[bool] = False
    schedule_options: ClassVar[tuple[str, ...]] = ()
    training_warning: str = ''

    @classmethod
    @functools.cache
    def option_names(cls) -> tuple[str, ...]:
        """Names of the method's own options: the keyword-only arguments of the constructor."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)

    @classmethod
    def default_options(cls) -> dict[str, Any]:
        """The method's own options with their defaults."""
        parameters = inspect.signature(cls.__init__).parameters
        return {name: parameters[name].default for name in cls.option_names()}

    def options(self) -> dict[str, Any]:
        """The method's own options that this layer was built with."""
        return {name: getattr(self, name) for name in self.option_names()}

    def scale_outputs(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Change the layer so that its output y becomes ``scale * y + shift``, with one rounding.

        Only layers whose kernel depends on the input define it.

        Args:
            scale: Scale of each output channel, (out_channels,), in float64.
            shift: Shift of each output channel, (out_channels,), in float64.
        """
        raise NotImplementedError

    @classmethod
    def is_for_inference(cls, options: Mapping[str, Any]) -> bool:
        """Whether a layer with these options is the form for inference, to which an input-dependent layer fuses."""
        return any(options.get(name, 0) is None for name in cls.schedule_options)

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        """Whether the method over-parameterises this convolution when a whole model is converted.

        Args:
            conv: A convolution of one of `conv_types`.
            is_stem: Whether its input is the image.

        Returns:
            True if `convert_model` should replace it.
        """
        raise NotImplementedError

    @classmethod
    def check_lift(cls, **options: Any) -> None:
        """Raise ReparamError if a layer with these options cannot start as exactly the given convolution."""

    @classmethod
    def from_conv(cls, conv: nn.Module, *, init: str = 'lift', **options: Any) -> 'ReparamLayer':
        """Build the layer from a plain convolution, which is not changed.

        The layer reuses the Parameter objects of `conv` wherever they stay parameters, so that ties, device, dtype and
        ``requires_grad`` survive. Their values are kept with either `init`. The added parameters are frozen if the
        weight of `conv` is. Attributes that were set on `conv` are kept.

        Args:
            conv: The convolution, of one of `conv_types` exactly.
            init: Initial values of the added parameters: 'lift' gives exactly the function of `conv`, 'scratch' the
                method's own random initialisation.
            **options: The method's own options, as in the constructor.

        Returns:
            The new layer, in the mode (training or evaluation) of `conv`.

        Raises:
            ReparamError: `conv` is of another type, carries hooks, tensors or modules beside its weights, or has
                weights that are not real, or an option is unknown or not possible here.
        """
        name = cls.__name__
        check_init(name, init)
        if not isinstance(conv, _ConvNd) or type(conv) not in cls.conv_types:
            expected = ' or '.join(t.__name__ for t in cls.conv_types)
            raise ReparamError(
                f'{name} replaces {expected} exactly, got {type(conv).__name__}; leave it out with skip='
            )
        added = cls._check_contents(conv)
        unknown = sorted(set(options) - set(cls.option_names()))
        if unknown:
            known = ', '.join(cls.option_names()) or 'none'
            raise ReparamError(f'{name}: unknown option {", ".join(unknown)}; its options are: {known}')
        if init == 'lift':
            cls.check_lift(**options)
        # Built on the meta device, so that no random weight is drawn only to be replaced.
        layer = cls(**conv_arguments(conv), device='meta', dtype=conv.weight.dtype, **options)
        taken = sorted(attribute for attribute in added if hasattr(layer, attribute))
        if taken:
            raise ReparamError(
                f'{name}: expected attributes beside those of the layer, got a convolution with {", ".join(taken)} set '
                'on it; remove them first, or leave it out with skip='
            )
        vars(layer).update({attribute: vars(conv)[attribute] for attribute in added})
        layer._assign_from_conv(conv)
        materialize(layer, conv.weight.device)
        layer._reset_variant_parameters(init)
        for parameter_name, parameter in layer.named_parameters():
            if parameter_name not in ('weight', 'bias'):
                parameter.requires_grad_(conv.weight.requires_grad)
        return layer.train(conv.training)

    @classmethod
    def _check_contents(cls, conv: _ConvNd) -> set[str]:
        """Raise ReparamError if conversion would lose a part of `conv`; return the attributes that were set on it."""
        name = cls.__name__
        conv_type: Any = type(conv)
        added = vars(conv).keys() - _attributes_of(conv_type)
        hiding = sorted(attribute for attribute in added if hasattr(conv_type, attribute))
        if any(getattr(conv, hooks, None) for hooks in HOOKS):
            raise ReparamError(
                f'{name}: expected a convolution without hooks, got one that carries hooks (of a weight or spectral '
                'norm, for instance), which conversion would lose; remove them first, or leave it out with skip='
            )
        if hiding:
            raise ReparamError(
                f'{name}: expected the methods of the class, got a convolution with its own {", ".join(hiding)}, which '
                'conversion would lose; remove them first, or leave it out with skip='
            )
        for role in ('weight', 'bias'):
            value = getattr(conv, role, None)
            if not isinstance(value, nn.Parameter) and (role == 'weight' or value is not None):
                found = 'buffer' if role in conv._buffers else type(value).__name__
                raise ReparamError(f'{name}: expected {role} to be a parameter, got a {found}; leave it out with skip=')
        contents = sorted({*conv._parameters, *conv._buffers, *conv._modules} - {'weight', 'bias'})
        if contents:
            raise ReparamError(
                f'{name}: expected a convolution with weight and bias alone, got one that also holds '
                f'{", ".join(contents)}, which conversion would lose; remove them first, or leave it out with skip='
            )
        if not conv.weight.is_floating_point():
            raise ReparamError(f'{name}: expected real weights, got {conv.weight.dtype}; leave it out with skip=')
        return added

    # Defined by a method

    def _init_variant_parameters(self, init: str) -> None:
        """Initialise every parameter and buffer beside `weight` and `bias`.

        Args:
            init: 'lift' or 'scratch', as in :meth:`from_conv`.
        """
        raise NotImplementedError

    def _close_gates(self) -> None:
        """Close the gates: set the parameters with which the layer equals the plain convolution with its `weight`.

        The gates are gammas, factors or residual kernels. No random numbers are drawn.
        """
        raise NotImplementedError

    def _compose(self) -> torch.Tensor:
        """Compute the equivalent kernel from the parameters and buffers, in their own dtype."""
        raise NotImplementedError

    # Shared by all methods

    def _assign_from_conv(self, conv: _ConvNd) -> None:
        """Assign the parameters of a plain convolution, the objects themselves, to the layer."""
        self.weight = conv.weight
        self.bias = conv.bias

    def _reset_variant_parameters(self, init: str) -> None:
        """Initialise the added parameters and buffers; constructors end with this call."""
        # The meta device has no values to set, and random numbers are slow there: torch runs them in Python.
        if not self.weight.is_meta:
            self._init_variant_parameters(init)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as torch does, and take the entries of a plain convolution as a lift.

        These are `weight`, of the right shape, and `bias`, with no other entry under the layer's name. The gates are
        closed, so that the layer equals that convolution. The parameters behind the gates keep their values: no random
        numbers are drawn, and the ranks of a distributed model stay equal. Loaders that bypass ``load_state_dict``,
        such as torch.distributed.checkpoint, bypass this, too.
        """
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        added = self._entries().keys() - {'weight', 'bias'}
        is_stock = 'weight' in given and given.keys() <= {'weight', 'bias'}
        if added and is_stock and given['weight'].shape == self.weight.shape:
            try:
                self.check_lift(**self.options())
            except ReparamError as error:
                error_msgs.append(f'{prefix}weight: of a plain convolution: {error}')
            else:
                if not self.weight.is_meta:
                    self._close_gates()
                elif local_metadata.get('assign_to_params_buffers', False):
                    materialize(self.to(given['weight'].dtype), given['weight'].device)
                    self._reset_variant_parameters('lift')
            # Also for the submodules, which torch loads next.
            state_dict.update((prefix + key, value) for key, value in self._entries().items() if key in added)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if 'weight' in given:
            self.training_warning = ''
        if not self.weight.is_meta:
            for name in self._non_persistent_buffers_set:  # still on meta after assign=True to a meta model
                buffer = self._buffers[name]
                if buffer is not None and buffer.is_meta:
                    self._buffers[name] = torch.zeros_like(buffer, device=self.weight.device)

    def _warn_of_training(self) -> None:
        if torch.compiler.is_compiling() or not self.training_warning or not self.training:
            return
        warnings.warn(self.training_warning, stacklevel=2)
        self.training_warning = ''

    def _entries(self) -> dict[str, torch.Tensor]:
        """The layer's entries of a state dict, without running its state dict hooks."""
        entries: dict[str, torch.Tensor] = {}
        for name, part in self.named_modules():
            part._save_to_state_dict(entries, name and f'{name}.', keep_vars=False)
        return entries

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as torch does, but reject a bias if the layer has none; assignments end here, too.

        Code that folds a BatchNorm into a convolution adds a bias (``torch.nn.utils.fusion.fuse_conv_bn_eval``). It
        would apply the scale of the BatchNorm to `weight` only, which is one part of the kernel.

        Raises:
            ReparamError: the layer was built without a bias.
        """
        if name == 'bias' and param is not None and self._parameters.get(name, param) is None:
            raise ReparamError(
                f'{type(self).__name__}: got a bias, but was built with bias=False; a BatchNorm cannot be folded into '
                'its weight, which is only one part of its kernel: use fuse_model(), with fold_bn=True if norms are to '
                'be folded'
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Initialise again as the constructor does: `weight` and `bias` as torch does, the rest with 'scratch'."""
        if not self.weight.numel():
            raise ReparamError(
                f'{type(self).__name__}: expected at least one input and output channel, got {self.in_channels} and '
                f'{self.out_channels}; leave it out with skip='
            )
        if not self.weight.is_meta:
            super().reset_parameters()
        # torch's constructor calls this before the method has added its parameters.
        if getattr(self, '_complete', False):
            self._reset_variant_parameters('scratch')

    def equivalent_kernel(self) -> torch.Tensor:
        """The kernel of the plain convolution that this layer equals in evaluation mode.

        Pure and differentiable; computed in the parameters' own dtype, outside autocast.

        Returns:
            The kernel, of `weight`'s shape and dtype.
        """
        if torch.jit.is_scripting():
            return self._compose()
        with autocast_disabled(self.weight.device.type):
            return self._compose()

    @torch.no_grad()
    def fuse(self) -> _ConvNd:
        """Fold the layer into a plain convolution; the layer itself is not changed.

        The kernel, and a computed bias, are computed in float64 and rounded once.

        Returns:
            A new convolution of the type this layer was built from, with the same device, dtype and mode, and the
            attributes that were set on the layer.
        """
        exact = float64_copy(self).eval()  # in training mode a spectral norm changes when it is read
        return self.plain_conv(exact.equivalent_kernel(), exact.bias)

    def plain_conv(self, kernel: torch.Tensor, bias: torch.Tensor | None) -> _ConvNd:
        """A new plain convolution with the geometry of this layer and these weights."""
        arguments = dict(conv_arguments(self), bias=bias is not None)
        conv_type = self.conv_types[0]
        if getattr(self, 'tf_same', False):
            conv_type = Conv2dSame
            arguments.pop('padding_mode')
        like = next(self.parameters())
        conv = conv_type(**arguments, device='meta', dtype=like.dtype)
        vars(conv).update(self.added_attributes())
        trainable = any(p.requires_grad for name, p in self.named_parameters() if name != 'bias')
        kernel = kernel.to(device=like.device, dtype=like.dtype, copy=True)
        conv.weight = nn.Parameter(kernel, requires_grad=trainable)
        if bias is not None:
            values = bias.detach().to(device=like.device, dtype=like.dtype, copy=True)
            conv.bias = nn.Parameter(values, requires_grad=bias.requires_grad)
        return conv.train(self.training)

    def _fresh(self) -> nn.Module:
        return type_before_parametrizations(self)(**conv_arguments(self), device='meta', **self.options())


def conv_arguments(conv: _ConvNd) -> dict[str, Any]:
    """Constructor arguments, without device and dtype, for a convolution of the same geometry."""
    names = ['in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'padding_mode']
    if isinstance(conv, nn.ConvTranspose2d):
        names.append('output_padding')
    return dict({name: getattr(conv, name) for name in names}, bias=conv.bias is not None)


# torch.fx must not trace into a layer: the graph would contain state that a forward pass changes as a constant, and
# kernels cannot be computed from proxies.
@register_notrace_module
class ReparamConv2d(ReparamLayer, nn.Conv2d):
    """Base of the variants of ``nn.Conv2d`` and of timm's ``Conv2dSame``.

    Attributes:
        tf_same: Whether the padding is TensorFlow's SAME, which depends on the input size (timm's ``Conv2dSame``).
    """

    __constants__ = [*nn.Conv2d.__constants__, 'tf_same']
    conv_types = (nn.Conv2d, Conv2dSame)
    tf_same: bool = False
    if TYPE_CHECKING:  # torch declares tuples of any length
        kernel_size: tuple[int, int]
        stride: tuple[int, int]
        dilation: tuple[int, int]

    def _assign_from_conv(self, conv: _ConvNd) -> None:
        super()._assign_from_conv(conv)
        self.tf_same = isinstance(conv, Conv2dSame)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pad the input as the plain convolution does."""
        if self.tf_same:
            # timm declares lists
            return pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode)

    def _pad_partly(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the input, padded if ``F.conv2d`` cannot do it, and the padding that is left to ``F.conv2d``."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.tf_same or self.padding_mode != 'zeros' or (left, top) != (right, bottom):
            return self._pad(x), (0, 0)
        return x, (top, left)

    def _convolve(self, x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Convolve with `kernel` and `bias`, padded as the plain convolution pads."""
        if self.tf_same:
            return F.conv2d(self._pad(x), kernel, bias, self.stride, (0, 0), self.dilation, self.groups)
        return self._conv_forward(x, kernel, bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve an input (batch, in_channels, height, width), batched or unbatched."""
        if not torch.jit.is_scripting():
            if isinstance(input, Proxy):  # torch.fx is tracing
                return _fx_leaf(self, input)
            self._warn_of_training()
        return self._forward_impl(input)

    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolve(x, self.equivalent_kernel(), self.bias)


@register_notrace_module
class ReparamConvTranspose2d(ReparamLayer, nn.ConvTranspose2d):
    """Base of the variants of ``nn.ConvTranspose2d``."""

    conv_types = (nn.ConvTranspose2d,)
    if TYPE_CHECKING:
        padding: tuple[int, int]  # never 'same' or 'valid'

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Apply the transposed convolution to an input (batch, in_channels, height, width), batched or unbatched."""
        if not torch.jit.is_scripting():
            if isinstance(input, Proxy):  # torch.fx is tracing
                return _fx_leaf(self, input, output_size)
            self._warn_of_training()
        return self._convolve(input, self.equivalent_kernel(), self.bias, output_size)

    def _convolve(
        self,
        x: torch.Tensor,
        kernel: torch.Tensor,
        bias: torch.Tensor | None,
        output_size: list[int] | None = None,
        groups: int | None = None,
    ) -> torch.Tensor:
        """Apply a transposed convolution with `kernel` and `bias`, and the geometry of the layer."""
        groups = self.groups if groups is None else groups
        # torch declares lists, and passes tuples itself
        output_pad = self._output_padding(x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)  # type: ignore[arg-type]
        return F.conv_transpose2d(x, kernel, bias, self.stride, self.padding, output_pad, groups, self.dilation)
