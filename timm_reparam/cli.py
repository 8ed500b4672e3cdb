"""``timm-reparam``: the package's functions on the command line."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from .convert import VARIANTS, fuse_model, variant_of
from .errors import ReparamError
from .hub import fuse_checkpoint, load_checkpoint, verify_checkpoint
from .profile import compare_profiles, format_profiles
from .version import __version__

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments of the command line; those of the process by default.

    Returns:
        Exit status: 0 if all went well, 1 if something was refused or a proof failed. Wrong usage exits with 2.
    """
    args = _parser().parse_args(argv)
    try:
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
            traceback.print_exc()
        message = '; '.join(line.strip() for line in str(error).splitlines() if line.strip())
        print(f'timm-reparam: {message or type(error).__name__}', file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    verbose: dict[str, Any] = dict(action='store_true', help='show the traceback of an error')
    common = argparse.ArgumentParser(add_help=False)  # -v after the command, which must not undo one before it
    common.add_argument('-v', '--verbose', default=argparse.SUPPRESS, **verbose)
    parser = argparse.ArgumentParser(
        prog='timm-reparam',
        description='Over-parameterised convolutions for timm backbones: train with them, fuse them, prove the fusion.',
    )
    parser.add_argument('-v', '--verbose', **verbose)
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)

    command = commands.add_parser('list', parents=[common], help='list the registered variants')
    command.add_argument(
        'filter', nargs='?', default='', help="names to list, with wildcards, for instance 'resnet18*'"
    )
    command.add_argument('--pretrained', action='store_true', help='list every name that has weights, with its tag')
    command.set_defaults(command=_list)

    command = commands.add_parser(
        'profile',
        parents=[common],
        help='measure parameters, MACs and latency, train-time form beside fused form',
        description='Measure models side by side; a variant is measured in its train-time form and in its fused form.',
    )
    command.add_argument('models', nargs='+', metavar='MODEL', help='architecture, or folder of a checkpoint')
    command.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help="default: the model's own")
    command.add_argument('--batch-size', type=int, default=1, metavar='N', help='images in a batch (default: 1)')
    command.add_argument('--runs', type=int, default=20, metavar='N', help='timed runs, 0 for none (default: 20)')
    command.add_argument('--device', default='cpu', help='device to measure on (default: cpu)')
    command.set_defaults(command=_profile)

    command = commands.add_parser(
        'fuse',
        parents=[common],
        help='fuse a train-time checkpoint into a checkpoint of the stock architecture',
        description='Fuse a train-time checkpoint, prove the fusion on real forward passes, and save it.',
    )
    command.add_argument('folder', metavar='CHECKPOINT_FOLDER', help='train-time checkpoint')
    command.add_argument('target', metavar='OUT', help='folder of the fused checkpoint')
    command.set_defaults(command=_fuse)

    command = commands.add_parser(
        'verify',
        parents=[common],
        help='prove again that two checkpoints are the two forms of one model',
        description='Compare a train-time checkpoint with the fused one beside it (FOLDER_fused).',
    )
    command.add_argument('folder', metavar='FOLDER', help='train-time checkpoint, or the fused one beside it')
    command.add_argument('--fused', metavar='FOLDER', help='fused checkpoint, if it lies elsewhere')
    command.set_defaults(command=_verify)
    return parser


def _list(args: argparse.Namespace) -> int:
    names = timm.list_pretrained(args.filter) if args.pretrained else timm.list_models(args.filter)
    for name in names:
        stock, _, variant = name.partition('.')[0].rpartition('_')
        if variant in VARIANTS and timm.is_model(stock):
            print(name)
    return 0


def _profile(args: argparse.Namespace) -> int:
    names, models = [], []
    for name in args.models:
        if Path(name).is_dir():
            model = load_checkpoint(name)
        elif timm.is_model(name):
            channels = {'in_chans': args.input_size[0]} if args.input_size else {}
            model = timm.create_model(name, **channels)
        else:
            raise ReparamError(f'{name}: neither an architecture that timm knows nor a folder; see timm-reparam list')
        model = model.to(args.device).eval()
        names.append(name)
        models.append(model)
        if variant_of(model):
            names.append(f'{name}, fused')
            models.append(fuse_model(model))
    profiles = compare_profiles(*models, input_size=args.input_size, batch_size=args.batch_size, runs=args.runs)
    print(format_profiles([replace(profile, name=name) for profile, name in zip(profiles, names)]))
    return 0


def _fuse(args: argparse.Namespace) -> int:
    folder, report = fuse_checkpoint(args.folder, args.target)
    print(report)
    print(f'saved {folder}')
    return 0


def _verify(args: argparse.Namespace) -> int:
    report = verify_checkpoint(args.folder, args.fused)
    print(report)
    return 0 if report.passed else 1
