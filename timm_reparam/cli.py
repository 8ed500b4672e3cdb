"""``timm-reparam``: the package's functions on the command line."""

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
from timm.utils import ParseKwargs
from torch import nn

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
from .version import __version__

__all__ = ['main']

_PROFILE_FORMATS = {'text': format_profiles, 'csv': format_csv, 'json': format_json}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments of the command line; those of the process by default.

    Returns:
        Exit status: 0 if all went well, 1 if something was refused or not verified. Wrong usage exits with 2.
    """
    args = _parser().parse_args(argv)
    try:
        if 'timeout' in args:
            limit_requests(args.timeout)
        status = args.command(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # one line for the user, whatever it was; -v shows where it came from
        if args.verbose:
            print(without_secrets(traceback.format_exc()), end='', file=sys.stderr)
        print(f'timm-reparam: {one_line(error) or type(error).__name__}', file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    verbose: dict[str, Any] = dict(action='store_true', help='show the traceback of an error')
    common = argparse.ArgumentParser(add_help=False)  # -v after the command, which must not undo one before it
    common.add_argument('-v', '--verbose', default=argparse.SUPPRESS, **verbose)
    parser = argparse.ArgumentParser(
        prog='timm-reparam',
        description='Over-parameterised convolutions for timm backbones: train, fuse, verify the fusion.',
    )
    parser.add_argument('-v', '--verbose', **verbose)
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    key_values: dict[str, Any] = dict(nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')

    command = commands.add_parser('list', parents=[common], help='list the registered variants')
    command.add_argument(
        'filter', nargs='?', default='', help="names to list, with wildcards, for instance 'resnet18*'"
    )
    command.add_argument('--pretrained', action='store_true', help='list every name that has weights, with its tag')
    command.set_defaults(command=_list)

    sources = "architecture, checkpoint folder, or a file of timm's train script, last.pth.tar"
    command = commands.add_parser(
        'profile',
        parents=[common],
        help='measure what models cost: stock, train-time form and fused form side by side',
        description='Measure models side by side, in one interleaved run: of each variant the stock model, the'
        ' train-time form and the fused form.',
    )
    command.add_argument('models', nargs='+', metavar='MODEL', help=sources)
    command.add_argument('--train', action='store_true', help='a training step, too: activations, peak memory, time')
    command.add_argument('-b', '--batch-size', type=int, default=1, metavar='N', help='images in a batch (default: 1)')
    command.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help="default: the model's own")
    command.add_argument('--num-classes', type=int, metavar='N', help="classes of architectures (default: the model's)")
    command.add_argument('--model-kwargs', **key_values, help='arguments of the architectures')
    command.add_argument('--conv-options', **key_values, help="options of the variants' layers (not of a folder's)")
    command.add_argument('--runs', type=int, default=20, metavar='N', help='timed runs, 0 for none (default: 20)')
    command.add_argument('--device', default='cpu', help='device to measure on (default: cpu)')
    command.add_argument(
        '--precision',
        default='float32',
        metavar='NAME',
        help='float32, bfloat16, float16, amp (float16) or amp_bfloat16 (default: float32)',
    )
    command.add_argument('--channels-last', action='store_true', help='lay weights and images out channels last')
    command.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile them (backend: inductor)'
    )
    command.add_argument('--format', choices=tuple(_PROFILE_FORMATS), default='text', help='(default: text)')
    command.add_argument('-o', '--output', metavar='FILE', help='file to write that into (default: printed)')
    command.add_argument('--plot', metavar='FILE', help='draw the ratios to stock, into an .svg or .png for instance')
    command.set_defaults(command=_profile)

    picture = argparse.ArgumentParser(add_help=False)
    picture.add_argument('-o', '--output', required=True, metavar='FILE', help='picture to write: .svg, .png or .pdf')
    command = commands.add_parser(
        'plot',
        parents=[common],
        help='draw kernels, learning curves, or accuracy gained against training cost',
        description='Draw a picture from checkpoints, training runs or a results file.',
    )
    pictures = command.add_subparsers(title='pictures', metavar='PICTURE', required=True)
    command = pictures.add_parser(
        'kernels',
        parents=[common, picture],
        help='where kernels carry weight: mean magnitude over their grid, a row a model, a column a stage',
        description='Draw the mean magnitude over the kernel grid, as the ACNet paper does: a row of heat maps a model,'
        ' a column a stage. Variants count by their fused kernels.',
    )
    command.add_argument(
        'sources', nargs='+', metavar='SOURCE', help=f'{sources}; an architecture without a tag is not trained'
    )
    command.add_argument('--kernel-size', type=int, metavar='K', help='draw the K x K kernels (default: the commonest)')
    command.set_defaults(command=_plot_kernels)
    command = pictures.add_parser(
        'curves',
        parents=[common, picture],
        help='learning curves of training runs',
        description='Draw eval top-1 and train loss against the epoch. Runs whose names differ only in a seed at the'
        ' end (-s0, -s1) are one line, their mean, with a band from the smallest to the largest value.',
    )
    command.add_argument('runs', nargs='+', metavar='RUN', help='folder of a training run, with its summary.csv')
    command.set_defaults(command=_plot_curves)
    command = pictures.add_parser(
        'gains',
        parents=[common, picture],
        help='accuracy gained against training cost',
        description='Draw the paired difference of top-1 to stock, with its 95 %% confidence interval, against the'
        ' training step relative to stock, and print both as a table.',
    )
    command.add_argument('results', metavar='RESULTS', help='results file: csv, one row a run')
    command.set_defaults(command=_plot_gains)

    command = commands.add_parser(
        'fuse',
        parents=[common],
        help='fuse a train-time checkpoint into a checkpoint of the stock architecture',
        description='Fuse a train-time checkpoint, verify the fusion on real forward passes, and save it. From a file'
        " of timm's train script the train-time form is saved, too, beside the fused one: the pair that publish takes.",
    )
    command.add_argument('source', metavar='CHECKPOINT', help="folder, or a file of timm's train script, last.pth.tar")
    command.add_argument(
        'target', metavar='OUT', help='folder of the fused checkpoint; from a file, its name is MODEL.TAG_fused'
    )
    command.set_defaults(command=_fuse)

    command = commands.add_parser(
        'convert',
        parents=[common],
        help='make a train-time checkpoint of a fused or stock one, or of one trained with official code',
        description="Lift a stock checkpoint into a variant, or read one that a method's official code or timm's train "
        'script has made; verify it on real forward passes, and save it.',
    )
    command.add_argument('source', metavar='CHECKPOINT', help='folder, or file of weights')
    command.add_argument('--model', required=True, metavar='NAME', help='the variant, resnet18_doconv for instance')
    command.add_argument('-o', '--output', required=True, metavar='FOLDER', help='folder of the new checkpoint')
    command.add_argument('--conv-options', **key_values, help="options of the layers (default: the folder's)")
    command.add_argument('--model-kwargs', **key_values, help="arguments of the model (default: the folder's)")
    command.set_defaults(command=_convert)

    network = argparse.ArgumentParser(add_help=False)
    network.add_argument('--json', action='store_true', help='print the report as json')
    network.add_argument(
        '--timeout',
        type=float,
        default=60.0,
        metavar='S',
        help='seconds without an answer after which a request has failed (default: 60)',
    )
    sending = argparse.ArgumentParser(add_help=False)
    sending.add_argument('--license', metavar='ID', help='licence of weights of which none is known, mit for instance')
    sending.add_argument('--private', action='store_true', help='make the repos private')
    sending.add_argument('--revision', metavar='BRANCH', help='branch to commit to, which is there (default: main)')
    sending.add_argument('--dry-run', action='store_true', help='check and compare, but send nothing')

    command = commands.add_parser(
        'verify',
        parents=[common, network],
        help='verify again that two checkpoints are the two forms of one model',
        description='Verify a pair again: hashes, what the cards claim, and the train-time form against the fused one.',
    )
    command.add_argument(
        'target', metavar='FOLDER|REPO', help='either form: a folder, the other one beside it, or NAMESPACE/NAME'
    )
    command.add_argument('--fused', metavar='FOLDER', help='fused checkpoint, if it lies elsewhere')
    command.add_argument('--revision', metavar='REVISION', help='branch, tag or commit of a repo (default: main)')
    command.set_defaults(command=_verify)

    command = commands.add_parser(
        'publish',
        parents=[common, sending, network],
        help='publish both forms of a model on the Hub',
        description='Verify a pair of checkpoints, send what differs, one commit a repo, and fetch it back to compare.',
    )
    command.add_argument('folder', metavar='FOLDER', help='checkpoint of either form, the other one beside it')
    command.add_argument('namespace', metavar='NAMESPACE', help='user or organisation on the Hub')
    command.add_argument('--create-pr', action='store_true', help='propose each commit as a pull request')
    command.set_defaults(command=_publish)

    command = commands.add_parser(
        'sync',
        parents=[common, sending, network],
        help='make the Hub equal to a local zoo',
        description='Publish every pair of a zoo that differs from the Hub; what is equal is not sent again.',
    )
    command.add_argument('zoo', metavar='ZOO', help='folder of pairs')
    command.add_argument('namespace', metavar='NAMESPACE', help='user or organisation on the Hub')
    command.add_argument('--workers', type=int, default=4, metavar='N', help='models at a time (default: 4)')
    command.set_defaults(command=_sync)

    command = commands.add_parser(
        'pull',
        parents=[common, network],
        help='fetch both forms of a model, or of all models of a namespace',
        description=(
            'Fetch pairs from the Hub into a local zoo; hashes are compared, only safetensors are read. A pair that is '
            'in the zoo already and differs is replaced.'
        ),
    )
    command.add_argument('source', metavar='REPO|NAMESPACE', help='NAMESPACE/NAME of either form, or NAMESPACE')
    command.add_argument('zoo', metavar='ZOO', help='folder of pairs')
    command.add_argument('--revision', metavar='REVISION', help='branch, tag or commit (default: main)')
    command.set_defaults(command=_pull)

    command = commands.add_parser(
        'run',
        parents=[common],
        help='run a script, one of timm for instance, with the variants registered',
        description='Run a Python script with the variants registered. Under torchrun: torchrun ... -m timm_reparam run'
        ' SCRIPT ARGS',
    )
    command.add_argument('script', metavar='SCRIPT', help='path of the script')
    command.add_argument('args', metavar='ARGS', nargs=argparse.REMAINDER, help='everything after it is its own')
    command.set_defaults(command=_run)
    return parser


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
            raise ReparamError('--plot: expected at least one run to draw, got --runs 0')
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
    """The models by name, a variant as stock, train-time and fused form; for each, the index of its stock model."""
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
        raise ReparamError('--conv-options: expected a variant among the architectures, resnet18_doconv for instance')
    for name in args.models:
        options = {'conv_options': args.conv_options} if name in variants else {}
        model = load_model(name, **model_args, **options)
        if Path(name).exists():
            stock, stock_args = f'{name}, stock', {'num_classes': model.num_classes, **get_model_args(model)}
            stock_args.pop('conv_options', None)
            # measured at the size of the checkpoint, as its forms are
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
    """Load the model of a checkpoint folder or of a file of the train script, or build an architecture by name.

    Args:
        source: Folder, file or architecture, variants of any architecture of timm included.
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
            layer.training_warning = ''  # it is measured or drawn, not trained
        return model
    raise ReparamError(
        f'{source}: neither an architecture that timm knows nor a folder nor a file; see timm-reparam list'
    )


def _stock_name(model: nn.Module) -> str:
    name = stock_architecture(model)
    assert name is not None  # timm has created it under a name
    return name


def _plot_kernels(args: argparse.Namespace) -> int:
    check_plot(args.output)
    models, names = [], []
    for source in args.sources:
        tag = source.partition('.')[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for architectures without trained weights: the same picture every time
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
        read_config(Path(args.target).absolute())  # there is a checkpoint
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
        raise ReparamError(f'{args.script}: expected the path of a Python script, found no file there')
    for word in args.args:
        ensure_registered(word.rpartition('=')[2])  # the script creates the models that it is told to
    argv, path = sys.argv, list(sys.path)
    sys.argv = [args.script, *args.args]
    sys.path.insert(0, str(script.absolute().parent))
    try:
        runpy.run_path(args.script, run_name='__main__')
    except Exception:  # the script's own: shown as Python shows it
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = argv, path
    return 0
