"""Check an untrusted checkpoint by its configuration and the header of its weights, before anything is built.

A checkpoint names an architecture, its arguments, its tensors and the size of its images, and may put any value there.
:func:`load_checkpoint`, :func:`load_training` and the commands rely on these checks: no argument makes timm load
anything, the model is no larger than the weights, and a forward pass stays within a budget.
"""

import functools
import inspect
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from timm.models import model_entrypoint
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from .._evaluation import removed_afterwards
from ..errors import ReparamError
from ..models._registry import ensure_registered, is_variant_name, saved_arguments
from .client import one_line
from .facts import CONFIG_NAME, WEIGHTS_NAME, is_size, read_config

__all__ = [
    'MOST_BYTES',
    'MOST_MACS',
    'MOST_TENSORS',
    'build_for_shapes',
    'build_on_meta',
    'check_arguments',
    'check_cost',
    'check_folder',
    'check_size',
    'read_shapes',
]

# The budget for one image: the largest tensor of a forward pass in float64, and its multiply-adds. A ResNet-152 at
# 2,048 pixels needs an eighth of the former and a quarter of the latter.
MOST_BYTES = 4 * 2**30
MOST_MACS = 4 * 10**12
# Tensors of a checkpoint. The CNNs of timm have less than a third of that, with layers of any variant.
MOST_TENSORS = 2**14
_MOST_OPERATIONS = 500_000
_MOST_ITEMS = 64
_LONGEST_TEXT = 256
_LARGEST_NUMBER = 2**24
# Names of layers, kinds of pooling, patterns of module names; no addresses and no paths.
_TEXT = re.compile(r'[\w.*?\[\]!, -]*', re.ASCII)
# Arguments of timm's builders, beside those of the class, that decide what is built.
_BUILDERS = ('bn_eps', 'bn_momentum', 'output_stride')
# Entries of pretrained_cfg that make timm load weights, or code that reads them, from elsewhere than the folder.
_ELSEWHERE = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')
_LOADING = ('checkpoint_path', 'cache_dir', 'pruned', 'scriptable', 'exportable', 'no_jit')


def check_folder(folder: Path) -> nn.Module:
    """Check the configuration of a checkpoint folder against the header of its weights, before anything is built.

    Args:
        folder: Checkpoint folder.

    Returns:
        The model, on the meta device.

    Raises:
        ReparamError: The configuration names weights outside the folder, is not that of a model, does not fit the
            weights, or exceeds the budget.
    """
    config = read_config(folder)
    place, cfg = f'{folder.name}/{CONFIG_NAME}', config['pretrained_cfg']
    elsewhere = [key for key in _ELSEWHERE if cfg.get(key)]
    if elsewhere:
        raise ReparamError(f'{place}: pretrained_cfg.{elsewhere[0]}: would load weights from elsewhere; remove it')
    arguments = check_arguments(config['architecture'], config['model_args'], place)
    if not (folder / WEIGHTS_NAME).is_file():
        raise ReparamError(f'{folder / WEIGHTS_NAME}: not found; only safetensors are loaded')
    model: Any = build_for_shapes(config['architecture'], arguments, read_shapes(folder / WEIGHTS_NAME), folder.name)
    for where, values in (('', config), ('pretrained_cfg.', cfg)):
        # with another number timm leaves the classifier at its random initialisation
        if 'num_classes' in values and values['num_classes'] != model.num_classes:
            raise ReparamError(
                f'{place}: {where}num_classes: expected {model.num_classes}, as in the weights, got '
                f'{values["num_classes"]!r:.80}'
            )
    size = check_size(cfg.get('input_size', (3, 224, 224)), f'{place}: pretrained_cfg.input_size')
    check_cost(model, size, place)
    return model


def check_arguments(architecture: Any, arguments: Any, place: str) -> dict[str, Any]:
    """Check the architecture and the model arguments of a checkpoint.

    Args:
        architecture: Name of the architecture.
        arguments: Arguments of ``timm.create_model``, as a checkpoint records them.
        place: Origin of the arguments, for error messages.

    Returns:
        The arguments, with the defaults that the checkpoint relies on.

    Raises:
        ReparamError: The architecture is unknown, the model has no such argument, or a value is not made of numbers,
            short strings and short lists.
    """
    if not isinstance(architecture, str) or len(architecture) > _LONGEST_TEXT or not ensure_registered(architecture):
        raise ReparamError(f'{place}: expected an architecture that timm knows, got {architecture!r:.80}')
    if not isinstance(arguments, Mapping):
        raise ReparamError(f'{place}: model_args: expected a dict, got {type(arguments).__name__}')
    for name, value in arguments.items():
        where = f'{place}: model_args.{name!s:.80}'
        if not isinstance(name, str) or name in _LOADING or name.startswith('pretrained'):
            raise ReparamError(f'{where}: is a loading option and not allowed here; remove it')
        _check_value(value, where, depth=2)
    known = _argument_names(architecture) if arguments else frozenset()
    unknown = sorted(arguments.keys() - known)
    if unknown:
        raise ReparamError(f'{place}: model_args.{unknown[0]:.80}: is not an argument of {architecture}; remove it')
    return saved_arguments(architecture, arguments)


def _check_value(value: Any, where: str, depth: int) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT or not _TEXT.fullmatch(value):
            raise ReparamError(f'{where}: expected a name, got {value!r:.80}; paths and addresses are not allowed here')
    elif isinstance(value, (int, float)):
        if not abs(value) <= _LARGEST_NUMBER:  # also rejects NaN
            raise ReparamError(f'{where}: expected a number of at most {_LARGEST_NUMBER}, got {value!r:.80}')
    elif isinstance(value, (list, tuple, dict)) and depth:
        if len(value) > _MOST_ITEMS:
            raise ReparamError(f'{where}: expected at most {_MOST_ITEMS} entries, got {len(value)}')
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in entries:
            _check_value(key, where, 0)
            _check_value(item, f'{where}.{key!s:.80}', depth - 1)
    else:
        raise ReparamError(f'{where}: expected numbers, strings and short lists of them, got {value!r:.80}')


@functools.cache
def _argument_names(architecture: str) -> frozenset[str]:
    """The names of the arguments of a model's class and of the function that builds it."""
    name = architecture.partition('.')[0]
    extra = {'conv_options'} if is_variant_name(name) else set()
    stock = name.rpartition('_')[0] if extra else name
    cls = type(build_on_meta(stock, {}, architecture))
    callables = [model_entrypoint(stock), *(each.__init__ for each in cls.__mro__ if issubclass(each, nn.Module))]
    names = {key for function in callables for key in inspect.signature(function).parameters}
    return frozenset((names | extra | set(_BUILDERS)) - {'self', 'args', 'kwargs', 'pretrained'})


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors from the header of a safetensors file.

    Args:
        path: The file.

    Raises:
        ReparamError: The file is not safetensors, or contains no tensors, too many, or empty ones.
    """
    place = f'{path.parent.name}/{path.name}'
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ReparamError(f'{path}: expected a path in UTF-8, which safetensors needs; move it') from error
    try:
        with safetensors.safe_open(path, 'pt') as file:
            names = list(file.keys())
            if len(names) > MOST_TENSORS:
                raise ReparamError(f'{place}: expected at most {MOST_TENSORS} tensors, got {len(names)}')
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise ReparamError(f'{place}: is not a safetensors file ({one_line(error)[:200]})') from error
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or not shapes:
        found = f'{empty[0]!r:.80} of shape {shapes[empty[0]]}' if empty else 'no tensor'
        raise ReparamError(f'{place}: expected tensors with values, got {found}')
    return shapes


def build_on_meta(architecture: str, arguments: Mapping[str, Any], place: str) -> nn.Module:
    """Build a model on the meta device.

    Args:
        architecture: Name of the architecture.
        arguments: Arguments of ``timm.create_model``.
        place: Origin of the arguments, for error messages.

    Raises:
        ReparamError: The model cannot be built.
    """
    try:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # warnings are shown when the model is built with memory
            return timm.create_model(architecture, **arguments)
    except Exception as error:  # wrong arguments may raise anything
        raise ReparamError(
            f'{place}: {architecture} cannot be built with {dict(arguments)!s:.200} ({type(error).__name__}: '
            f'{one_line(error)[:200]})'
        ) from error


def build_for_shapes(
    architecture: str, arguments: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str
) -> nn.Module:
    """Build the model of a checkpoint on the meta device, and compare its names and shapes with the tensors.

    Args:
        architecture: Name of the architecture.
        arguments: Its arguments, as :func:`check_arguments` returns them.
        shapes: Shapes of the checkpoint's tensors by name.
        place: Origin of the arguments, for error messages.

    Raises:
        ReparamError: The model cannot be built, has far more layers than there are tensors, or has other names or
            shapes.
    """
    with _limited_layers(8 * len(shapes) + 2048, architecture):
        model = build_on_meta(architecture, arguments, place)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise ReparamError(
            f'{place}: {wrong[0]}: expected shape {expected.get(wrong[0])}, got {shapes.get(wrong[0])} ({len(wrong)} '
            f'tensors differ from {architecture}: {", ".join(wrong[:5])})'
        )
    return model


@contextmanager
def _limited_layers(number: int, architecture: str) -> Iterator[None]:
    """Limit the number of modules and tensors that the current thread may add to models."""
    thread, count = threading.get_ident(), 0

    def hook(module: nn.Module, name: str, value: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > number:
            raise ReparamError(f'{architecture}: has more layers than the weights')

    handles = [
        torch_module.register_module_parameter_registration_hook(hook),
        torch_module.register_module_buffer_registration_hook(hook),
        torch_module.register_module_module_registration_hook(hook),
    ]
    with removed_afterwards(handles):
        yield


def check_size(size: Any, place: str) -> tuple[int, int, int]:
    """Check the image size of a checkpoint, (channels, height, width)."""
    if not is_size(size) or min(size) <= 0:
        raise ReparamError(f'{place}: expected (channels, height, width), three positive integers, got {size!r:.80}')
    channels, height, width = size
    return channels, height, width


def check_cost(model: nn.Module, input_size: tuple[int, int, int], place: str) -> None:
    """Check that a forward pass on one image stays within the budget, :data:`MOST_BYTES` and :data:`MOST_MACS`.

    Args:
        model: The model, on the meta device.
        input_size: Channels, height and width of the images.
        place: Origin of the model, for error messages.

    Raises:
        ReparamError: The model exceeds the budget, or does not run on such images.
    """
    largest = math.prod(input_size)
    if 8 * largest <= MOST_BYTES:
        try:
            with torch.no_grad(), _Cost() as cost:
                model.eval()(torch.empty(1, *input_size, device='meta'))
        except Exception as error:  # the model's code may raise anything
            raise ReparamError(
                f'{place}: {type(model).__name__} does not run on images of {input_size} ({type(error).__name__}: '
                f'{one_line(error)[:200]})'
            ) from error
        if 8 * cost.largest <= MOST_BYTES and cost.macs <= MOST_MACS:
            return
    raise ReparamError(
        f'{place}: images of {input_size} take more than the budget of {MOST_BYTES / 2**30:g} GiB for one tensor and '
        f'{MOST_MACS:.0e} multiply-adds for one image; use smaller images'
    )


class _Cost(TorchDispatchMode):
    """Measures the cost of a forward pass on the meta device.

    Attributes:
        largest: Number of elements of the largest result of an operation.
        macs: Multiply-adds of matrix products and convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.macs = self._operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        if self._operations > _MOST_OPERATIONS:
            raise ReparamError(f'expected at most {_MOST_OPERATIONS:,} operations for one image, got more')
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        if func._overloadpacket in flop_registry:
            self.macs += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result) // 2
        return result
