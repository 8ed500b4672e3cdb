"""What a checkpoint from elsewhere may ask for, checked from its configuration and header before anything is built.

A checkpoint names an architecture, the arguments it is built with, its tensors and the size of its images, and each of
them may be anything. What is checked here is what :func:`load_checkpoint`, :func:`load_training` and the commands rely
on: no argument makes timm load something, nothing is built that the weights beside it do not fill, and running the
model on its images stays within a budget.
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

# Of one image: the largest tensor of a forward pass in float64, and the products that it takes. A ResNet-152 at 2,048
# pixels takes an eighth of the one and a quarter of the other.
MOST_BYTES = 4 * 2**30
MOST_MACS = 4 * 10**12
# Tensors of a checkpoint; the CNNs of timm have less than a third of that, with layers of any variant.
MOST_TENSORS = 2**14
_MOST_OPERATIONS = 500_000
_MOST_ITEMS = 64
_LONGEST_TEXT = 256
_LARGEST_NUMBER = 2**24
# A name of a layer, a kind of pooling, a pattern of module names: no address and no path.
_TEXT = re.compile(r'[\w.*?\[\]!, -]*', re.ASCII)
# Arguments that timm's builders take beside those of the class, and that decide what is built.
_BUILDERS = ('bn_eps', 'bn_momentum', 'output_stride')
# What makes timm take weights, or code for reading them, from elsewhere than the folder.
_ELSEWHERE = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')
_LOADING = ('checkpoint_path', 'cache_dir', 'pruned', 'scriptable', 'exportable', 'no_jit')


def check_folder(folder: Path) -> nn.Module:
    """Check the configuration of a checkpoint folder against the header of its weights, before anything is built.

    Args:
        folder: Checkpoint folder.

    Returns:
        The model that it stands for, on the meta device.

    Raises:
        ReparamError: The configuration asks for other weights than those in the folder, for anything else than a model,
            for another model than the one that the weights are of, or for more than the budget.
    """
    config = read_config(folder)
    place, cfg = f'{folder.name}/{CONFIG_NAME}', config['pretrained_cfg']
    elsewhere = [key for key in _ELSEWHERE if cfg.get(key)]
    if elsewhere:
        raise ReparamError(f'{place}: pretrained_cfg.{elsewhere[0]}: would take the weights from elsewhere; remove it')
    arguments = check_arguments(config['architecture'], config['model_args'], place)
    if not (folder / WEIGHTS_NAME).is_file():
        raise ReparamError(f'{folder / WEIGHTS_NAME}: not found; only safetensors are loaded')
    model: Any = build_for_shapes(config['architecture'], arguments, read_shapes(folder / WEIGHTS_NAME), folder.name)
    for where, values in (('', config), ('pretrained_cfg.', cfg)):
        # another number makes timm leave the classifier at its random start
        if 'num_classes' in values and values['num_classes'] != model.num_classes:
            raise ReparamError(
                f'{place}: {where}num_classes: expected {model.num_classes}, that of the weights, got '
                f'{values["num_classes"]!r:.80}'
            )
    size = check_size(cfg.get('input_size', (3, 224, 224)), f'{place}: pretrained_cfg.input_size')
    check_cost(model, size, place)
    return model


def check_arguments(architecture: Any, arguments: Any, place: str) -> dict[str, Any]:
    """Check the arguments that a model is to be built with.

    Args:
        architecture: Name of the architecture.
        arguments: Arguments of ``timm.create_model``, as a checkpoint records them.
        place: Where they come from, for the message.

    Returns:
        The arguments, with the defaults that the checkpoint relies on.

    Raises:
        ReparamError: The architecture is unknown, or an argument is none of its model's own, or not made of numbers,
            short texts and short lists.
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
        raise ReparamError(f'{place}: model_args.{unknown[0]:.80}: is no argument of {architecture}; remove it')
    return saved_arguments(architecture, arguments)


def _check_value(value: Any, where: str, depth: int) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT or not _TEXT.fullmatch(value):
            raise ReparamError(f'{where}: expected a name, got {value!r:.80}; no path and no address is allowed here')
    elif isinstance(value, (int, float)):
        if not abs(value) <= _LARGEST_NUMBER:  # NaN is not, either
            raise ReparamError(f'{where}: expected a number of at most {_LARGEST_NUMBER}, got {value!r:.80}')
    elif isinstance(value, (list, tuple, dict)) and depth:
        if len(value) > _MOST_ITEMS:
            raise ReparamError(f'{where}: expected at most {_MOST_ITEMS} entries, got {len(value)}')
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in entries:
            _check_value(key, where, 0)
            _check_value(item, f'{where}.{key!s:.80}', depth - 1)
    else:
        raise ReparamError(f'{where}: expected numbers, texts and short lists of them, got {value!r:.80}')


@functools.cache
def _argument_names(architecture: str) -> frozenset[str]:
    """What the class of a model, and the function that builds it, take by name."""
    name = architecture.partition('.')[0]
    extra = {'conv_options'} if is_variant_name(name) else set()
    stock = name.rpartition('_')[0] if extra else name
    cls = type(build_on_meta(stock, {}, architecture))
    callables = [model_entrypoint(stock), *(each.__init__ for each in cls.__mro__ if issubclass(each, nn.Module))]
    names = {key for function in callables for key in inspect.signature(function).parameters}
    return frozenset((names | extra | set(_BUILDERS)) - {'self', 'args', 'kwargs', 'pretrained'})


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, which is not read further.

    Args:
        path: The file.

    Raises:
        ReparamError: It is no such file, or holds no tensors, too many, or some without entries.
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
        raise ReparamError(f'{place}: is no safetensors file ({one_line(error)[:200]})') from error
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or not shapes:
        found = f'{empty[0]!r:.80} of shape {shapes[empty[0]]}' if empty else 'no tensor'
        raise ReparamError(f'{place}: expected tensors with values, got {found}')
    return shapes


def build_on_meta(architecture: str, arguments: Mapping[str, Any], place: str) -> nn.Module:
    """Build a model without memory.

    Args:
        architecture: Name of the architecture.
        arguments: Arguments of ``timm.create_model``.
        place: Where they come from, for the message.

    Raises:
        ReparamError: It cannot be built.
    """
    try:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what there is to say about these arguments is said when it is built
            return timm.create_model(architecture, **arguments)
    except Exception as error:  # whatever wrong arguments make of it
        raise ReparamError(
            f'{place}: {architecture} cannot be built with {dict(arguments)!s:.200} ({type(error).__name__}: '
            f'{one_line(error)[:200]})'
        ) from error


def build_for_shapes(
    architecture: str, arguments: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], place: str
) -> nn.Module:
    """Build the model that a checkpoint stands for on the meta device, and compare it with the checkpoint's tensors.

    Args:
        architecture: Name of the architecture.
        arguments: Its arguments, as :func:`check_arguments` returns them.
        shapes: Shapes of the checkpoint's tensors by name.
        place: Where they come from, for the message.

    Raises:
        ReparamError: It cannot be built, is much larger than the tensors, or has other names or shapes.
    """
    with _at_most(8 * len(shapes) + 2048, architecture):
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
def _at_most(number: int, architecture: str) -> Iterator[None]:
    """While a model is built: at most so many modules and tensors."""
    thread, count = threading.get_ident(), 0

    def hook(module: nn.Module, name: str, value: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > number:
            raise ReparamError(f'{architecture} has more layers than the weights fill')

    handles = [
        torch_module.register_module_parameter_registration_hook(hook),
        torch_module.register_module_buffer_registration_hook(hook),
        torch_module.register_module_module_registration_hook(hook),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_size(size: Any, place: str) -> tuple[int, int, int]:
    """Check a size of images, (channels, height, width), as a checkpoint names it."""
    if not is_size(size) or min(size) <= 0:
        raise ReparamError(f'{place}: expected (channels, height, width), three positive integers, got {size!r:.80}')
    channels, height, width = size
    return channels, height, width


def check_cost(model: nn.Module, input_size: tuple[int, int, int], place: str) -> None:
    """Check that a model can be run on its images within the budget, :data:`MOST_BYTES` and :data:`MOST_MACS`.

    Args:
        model: The model, on the meta device.
        input_size: Channels, height and width of the images.
        place: Where they come from, for the message.

    Raises:
        ReparamError: It cannot, or does not run on such images at all.
    """
    largest = math.prod(input_size)
    if 8 * largest <= MOST_BYTES:
        try:
            with torch.no_grad(), _Cost() as cost:
                model.eval()(torch.empty(1, *input_size, device='meta'))
        except Exception as error:  # the model's own code may fail in any way
            raise ReparamError(
                f'{place}: {type(model).__name__} does not run on images of {input_size} ({type(error).__name__}: '
                f'{one_line(error)[:200]})'
            ) from error
        if 8 * cost.largest <= MOST_BYTES and cost.macs <= MOST_MACS:
            return
    raise ReparamError(
        f'{place}: images of {input_size} take more than the budget of {MOST_BYTES / 2**30:g} GiB for one tensor and '
        f'{MOST_MACS:.0e} multiply-adds for one image; expected smaller ones'
    )


class _Cost(TorchDispatchMode):
    """Counts what a forward pass on the meta device would take.

    Attributes:
        largest: Entries of the largest tensor that an operation makes.
        macs: Multiply-adds of products and convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.macs = self._operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        if self._operations > _MOST_OPERATIONS:
            raise ReparamError(f'more than {_MOST_OPERATIONS:,} operations for one image')
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        if func._overloadpacket in flop_registry:
            self.macs += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result) // 2
        return result
