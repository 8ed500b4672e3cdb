"""The command line, ``timm-reparam``."""

import argparse
import json
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import nn

from ._cli_parser import build_parser
from ._files import check_folder, write_whole
from .errors import ReparamError
from .fuse import fuse_model
from .hub import convert_checkpoint, fuse_checkpoint, load_checkpoint, publish, pull, sync, verify, verify_pair
from .hub.client import limit_requests, one_line, without_secrets
from .hub.facts import read_config
from .hub.names import train_time_path
from .hub.training import load_training
from .models._registry import ensure_registered, is_variant_name
from .plot import check_plot, plot_curves, plot_gains, plot_kernels, plot_profiles
from .profile import compare_profiles, format_csv, format_json, format_profiles
from .results import format_summary, read_results, summarize
from .timm_model import config_of, stock_architecture
from .variants import VARIANTS, is_variant, variant_of

__all__ = ['main']

_PROFILE_FORMATS = {'text': format_profiles, 'csv': format_csv, 'json': format_json}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Command-line arguments; those of the process by default.

    Returns:
        Exit status: 0 on success, 1 on an error or a failed verification. Wrong usage exits with 2.
    """
    args = build_parser().parse_args(argv)
    try:
        if 'timeout' in args:
            limit_requests(args.timeout)
        status = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # one line for any error; -v shows the traceback
        if args.verbose:
            print(without_secrets(traceback.format_exc()), end='', file=sys.stderr)
        print(f'timm-reparam: {one_line(error) or type(error).__name__}', file=sys.stderr)
        return 1


def _list(args: argparse.Namespace) -> int:
    names = timm.list_pretrained(args.filter) if args.pretrained else timm.list_models(args.filter)
    for name in names:
        stock, _, variant = name.partition('.')[0].rpartition('_')
        if variant in VARIANTS and timm.is_model(stock):
            print(name)
    return 0


def _profile(args: argparse.Namespace) -> int:
    if args.plot is not None:
        check_plot(args.plot)
        if args.runs == 0:
            raise ReparamError('--plot: expected at least one run to draw, got --runs 0; give more')
    if args.output is not None:
        check_folder(args.output)
    names, models, references = _models_to_profile(args)
    options = ('input_size', 'batch_size', 'runs', 'train', 'precision', 'channels_last', 'torchcompile')
    profiles = compare_profiles(
        *models, names=names, references=references, **{name: getattr(args, name) for name in options}
    )
    text = _PROFILE_FORMATS[args.format](profiles)
    if args.output is None:
        print(text)
    else:
        write_whole(args.output, f'{text}\n'.encode())
    if args.plot is not None:
        plot_profiles(profiles, args.plot)
    return 0


def _models_to_profile(args: argparse.Namespace) -> tuple[list[str], list[nn.Module], list[int]]:
    """Names and models, a variant in its stock, train-time and fused form, and for each the index of its reference."""
    models: dict[str, nn.Module] = {}
    stocks: dict[str, str] = {}
    model_args = dict(args.model_kwargs)
    if args.num_classes is not None:
        model_args['num_classes'] = args.num_classes
    if args.input_size:
        model_args['in_chans'] = args.input_size[0]

    def add(name: str, model: nn.Module, stock: str) -> None:
        models.setdefault(name, model.to(args.device).eval())
        stocks.setdefault(name, stock)

    variants = {name for name in args.models if ensure_registered(name) and is_variant_name(name)}
    if args.conv_options and not variants:
        raise ReparamError('--conv-options: expected a variant among the architectures, such as resnet18_doconv')
    for name in args.models:
        options = {'conv_options': args.conv_options} if name in variants else {}
        model = load_model(name, **model_args, **options)
        if Path(name).exists():
            stock, stock_args = f'{name}, stock', {'num_classes': model.num_classes, **get_model_args(model)}
            stock_args.pop('conv_options', None)
            # Measured at the input size of the checkpoint.
            stock_args['pretrained_cfg_overlay'] = {'input_size': config_of(model)['input_size']}
        else:
            stock, stock_args = _stock_name(model), model_args
        if variant_of(model):
            add(stock, timm.create_model(_stock_name(model), **stock_args), stock)
            add(name, model, stock)
            add(f'{name}, fused', fuse_model(model), stock)
        else:
            add(name, model, next(iter(models), name))
    names = list(models)
    return names, list(models.values()), [names.index(stocks[name]) for name in names]


def load_model(source: str, **model_args: Any) -> Any:
    """Load the model of a checkpoint folder or of a file of the train script, or create an architecture by name.

    Args:
        source: Folder, file or architecture, including variants of any architecture of timm.
        **model_args: Arguments of ``timm.create_model``, for architectures only.

    Returns:
        The model.

    Raises:
        ReparamError: The source is none of these, or its weights cannot be loaded.
    """
    if Path(source).is_dir():
        return load_checkpoint(source)
    if Path(source).is_file():
        model: Any
        model, data_config, _ = load_training(source)
        model.pretrained_cfg = {**config_of(model), 'input_size': data_config['input_size']}
        return model
    if ensure_registered(source):
        model = timm.create_model(source, **model_args)
        for layer in filter(is_variant, model.modules()):
            layer.training_warning = ''  # the model is measured or drawn, not trained
        return model
    raise ReparamError(
        f'{source}: expected an architecture of timm, a folder or a file, found none of them; see timm-reparam list'
    )


def _stock_name(model: nn.Module) -> str:
    name = stock_architecture(model)
    assert name is not None  # true of every model that timm created
    return name


def _plot_kernels(args: argparse.Namespace) -> int:
    check_plot(args.output)
    models, names = [], []
    for source in args.sources:
        tag = source.partition('.')[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # reproducible pictures of untrained architectures
            models.append(load_model(source, pretrained=bool(tag)))
        path = Path(source).absolute()
        if path.is_dir():
            names.append(path.name)
        elif path.is_file():
            names.append(f'{path.parent.name}/{path.name}')
        else:
            names.append(source if tag else f'{source} (not trained)')
    plot_kernels(models, args.output, names=names, kernel_size=args.kernel_size)
    return 0


def _plot_curves(args: argparse.Namespace) -> int:
    check_plot(args.output)
    plot_curves(args.runs, args.output)
    return 0


def _plot_gains(args: argparse.Namespace) -> int:
    check_plot(args.output)
    summaries = summarize(read_results(args.results))
    plot_gains(summaries, args.output)
    print(format_summary(summaries))
    return 0


def _fuse(args: argparse.Namespace) -> int:
    folder, report = fuse_checkpoint(args.source, args.target)
    print(report)
    if Path(args.source).is_file():
        print(f'saved {train_time_path(folder)}')
    print(f'saved {folder}')
    return 0


def _convert(args: argparse.Namespace) -> int:
    options = {'conv_options': args.conv_options} if args.conv_options else {}
    folder, report = convert_checkpoint(args.source, args.output, args.model, **args.model_kwargs, **options)
    print(report)
    print(f'saved {folder}')
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.fused is not None:
        report = verify_pair(args.target, args.fused)
    elif '/' not in args.target or Path(args.target).is_absolute() or Path(args.target).is_dir():
        read_config(Path(args.target).absolute())  # raises if there is no checkpoint
        report = verify_pair(args.target)
    else:
        report = verify(args.target, revision=args.revision)
    _print(report, args.json)
    return 0 if report.passed else 1


def _publish(args: argparse.Namespace) -> int:
    report = publish(args.folder, args.namespace, create_pr=args.create_pr, **_sending(args))
    _print(report, args.json)
    return 0 if report.ok else 1


def _sync(args: argparse.Namespace) -> int:
    report = sync(args.zoo, args.namespace, workers=args.workers, **_sending(args))
    _print(report, args.json)
    return 0 if report.ok else 1


def _pull(args: argparse.Namespace) -> int:
    report = pull(args.source, args.zoo, revision=args.revision)
    _print(report, args.json)
    return 0 if report.ok else 1


def _sending(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ('license', 'private', 'revision', 'dry_run')}


def _print(report: Any, as_json: bool) -> None:
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)


def _run(args: argparse.Namespace) -> int:
    script = Path(args.script)
    if not script.is_file():
        raise ReparamError(f'{args.script}: expected the path of a Python script, found no file there; check the path')
    for word in args.args:
        ensure_registered(word.rpartition('=')[2])  # the script may create the models in its arguments
    argv, path = sys.argv, list(sys.path)
    sys.argv = [args.script, *args.args]
    sys.path.insert(0, str(script.absolute().parent))
    try:
        runpy.run_path(args.script, run_name='__main__')
    except Exception:  # an error of the script, with its traceback
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = argv, path
    return 0


_COMMANDS = {
    'list': _list,
    'profile': _profile,
    'plot kernels': _plot_kernels,
    'plot curves': _plot_curves,
    'plot gains': _plot_gains,
    'fuse': _fuse,
    'convert': _convert,
    'verify': _verify,
    'publish': _publish,
    'sync': _sync,
    'pull': _pull,
    'run': _run,
}
