"""The arguments of the command line, ``timm-reparam``."""

import argparse
from typing import Any

from timm.utils import ParseKwargs

from .version import __version__

__all__ = ['build_parser']


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the attribute `command` of its result is the name of the command."""
    verbose: dict[str, Any] = dict(action='store_true', help='show the traceback of an error')
    common = argparse.ArgumentParser(add_help=False)  # for -v after the command
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
        'filter', nargs='?', default='', help="pattern of the names, with wildcards, such as 'resnet18*'"
    )
    command.add_argument('--pretrained', action='store_true', help='list the names that have weights, with their tags')
    command.set_defaults(command='list')

    sources = "architecture, checkpoint folder, or a file of timm's train script, last.pth.tar"
    command = commands.add_parser(
        'profile',
        parents=[common],
        help='measure the cost of models: stock, train-time form and fused form side by side',
        description='Measure models side by side in one interleaved run. A variant is measured as stock model,'
        ' train-time form and fused form.',
    )
    command.add_argument('models', nargs='+', metavar='MODEL', help=sources)
    command.add_argument(
        '--train', action='store_true', help='also measure a training step: activations, peak memory, time'
    )
    command.add_argument('-b', '--batch-size', type=int, default=1, metavar='N', help='images in a batch (default: 1)')
    command.add_argument('--input-size', nargs=3, type=int, metavar=('C', 'H', 'W'), help="default: the model's own")
    command.add_argument(
        '--num-classes', type=int, metavar='N', help="number of classes of architectures (default: the model's)"
    )
    command.add_argument('--model-kwargs', **key_values, help='arguments of the architectures')
    command.add_argument('--conv-options', **key_values, help='options of the layers of variants given by name')
    command.add_argument('--runs', type=int, default=20, metavar='N', help='timed runs, 0 for none (default: 20)')
    command.add_argument('--device', default='cpu', help='device to measure on (default: cpu)')
    command.add_argument(
        '--precision',
        default='float32',
        metavar='NAME',
        help='float32, bfloat16, float16, amp (float16) or amp_bfloat16 (default: float32)',
    )
    command.add_argument('--channels-last', action='store_true', help='use the channels_last memory format')
    command.add_argument(
        '--torchcompile',
        nargs='?',
        const='inductor',
        metavar='BACKEND',
        help='compile the models (default backend: inductor)',
    )
    command.add_argument(
        '--format', choices=('text', 'csv', 'json'), default='text', help='output format (default: text)'
    )
    command.add_argument('-o', '--output', metavar='FILE', help='output file (default: standard output)')
    command.add_argument('--plot', metavar='FILE', help='draw the ratios to stock into this .svg, .png or .pdf file')
    command.set_defaults(command='profile')

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
        help='mean magnitude of kernels at each position, one row for each model, one column for each stage',
        description='Draw the mean magnitude of kernels at each position, as in the ACNet paper: one row of heat maps'
        ' for each model, one column for each stage. Variants are drawn with their fused kernels.',
    )
    command.add_argument(
        'sources', nargs='+', metavar='SOURCE', help=f'{sources}; an architecture without a tag is not trained'
    )
    command.add_argument(
        '--kernel-size', type=int, metavar='K', help='draw the K x K kernels (default: the most common)'
    )
    command.set_defaults(command='plot kernels')
    command = pictures.add_parser(
        'curves',
        parents=[common, picture],
        help='learning curves of training runs',
        description='Draw eval top-1 and train loss against the epoch. Runs whose names differ only in a seed at the'
        ' end (-s0, -s1) form one line: their mean, with a band from the smallest to the largest value.',
    )
    command.add_argument('runs', nargs='+', metavar='RUN', help='folder of a training run, with its summary.csv')
    command.set_defaults(command='plot curves')
    command = pictures.add_parser(
        'gains',
        parents=[common, picture],
        help='accuracy gained against training cost',
        description='Draw the paired difference of top-1 to stock, with its 95 % confidence interval, against the'
        ' training step relative to stock, and print both as a table.',
    )
    command.add_argument('results', metavar='RESULTS', help='results file: csv with one row for each run')
    command.set_defaults(command='plot gains')

    command = commands.add_parser(
        'fuse',
        parents=[common],
        help='fuse a train-time checkpoint into a checkpoint of the stock architecture',
        description='Fuse a train-time checkpoint, verify the fusion on forward passes, and save it. For a file of'
        " timm's train script the train-time form is saved, too: both folders are the pair that publish takes.",
    )
    command.add_argument('source', metavar='CHECKPOINT', help="folder, or a file of timm's train script, last.pth.tar")
    command.add_argument(
        'target', metavar='OUT', help='folder of the fused checkpoint; for a file, its name must be MODEL.TAG_fused'
    )
    command.set_defaults(command='fuse')

    command = commands.add_parser(
        'convert',
        parents=[common],
        help='convert a stock, fused or official checkpoint to a train-time checkpoint',
        description="Lift a stock checkpoint into a variant, or read a checkpoint of a method's official code or of"
        " timm's train script. It is verified on forward passes and saved.",
    )
    command.add_argument('source', metavar='CHECKPOINT', help='folder, or file of weights')
    command.add_argument('--model', required=True, metavar='NAME', help='the variant, such as resnet18_doconv')
    command.add_argument('-o', '--output', required=True, metavar='FOLDER', help='folder of the new checkpoint')
    command.add_argument('--conv-options', **key_values, help="options of the layers (default: the folder's)")
    command.add_argument('--model-kwargs', **key_values, help="arguments of the model (default: the folder's)")
    command.set_defaults(command='convert')

    network = argparse.ArgumentParser(add_help=False)
    network.add_argument('--json', action='store_true', help='print the report as JSON')
    network.add_argument(
        '--timeout',
        type=float,
        default=60.0,
        metavar='S',
        help='seconds without a response after which a request fails (default: 60)',
    )
    sending = argparse.ArgumentParser(add_help=False)
    sending.add_argument('--license', metavar='ID', help='licence of the weights if it is unknown, such as mit')
    sending.add_argument('--private', action='store_true', help='create private repos')
    sending.add_argument('--revision', metavar='BRANCH', help='existing branch to commit to (default: main)')
    sending.add_argument('--dry-run', action='store_true', help='check and compare without sending')

    command = commands.add_parser(
        'verify',
        parents=[common, network],
        help='verify again that two checkpoints are the two forms of one model',
        description='Verify a pair again: hashes, the claims of the cards, and the train-time form against the fused'
        ' form.',
    )
    command.add_argument(
        'target', metavar='FOLDER|REPO', help='either form: a folder with the other form beside it, or NAMESPACE/NAME'
    )
    command.add_argument('--fused', metavar='FOLDER', help='fused checkpoint, if it is elsewhere')
    command.add_argument('--revision', metavar='REVISION', help='branch, tag or commit of a repo (default: main)')
    command.set_defaults(command='verify')

    command = commands.add_parser(
        'publish',
        parents=[common, sending, network],
        help='publish both forms of a model on the Hub',
        description='Verify a pair of checkpoints, send the files that differ in one commit for each repo, and fetch'
        ' them back to compare.',
    )
    command.add_argument('folder', metavar='FOLDER', help='checkpoint of either form, with the other form beside it')
    command.add_argument('namespace', metavar='NAMESPACE', help='user or organisation on the Hub')
    command.add_argument('--create-pr', action='store_true', help='propose each commit as a pull request')
    command.set_defaults(command='publish')

    command = commands.add_parser(
        'sync',
        parents=[common, sending, network],
        help='make the Hub equal to a local zoo',
        description='Publish every pair of a zoo that differs from the Hub. Equal files are not sent again.',
    )
    command.add_argument('zoo', metavar='ZOO', help='folder of pairs')
    command.add_argument('namespace', metavar='NAMESPACE', help='user or organisation on the Hub')
    command.add_argument('--workers', type=int, default=4, metavar='N', help='number of models at a time (default: 4)')
    command.set_defaults(command='sync')

    command = commands.add_parser(
        'pull',
        parents=[common, network],
        help='fetch both forms of a model, or of all models of a namespace',
        description=(
            'Fetch pairs from the Hub into a local zoo. Hashes are compared, and only safetensors are read. A pair in '
            'the zoo that differs is replaced.'
        ),
    )
    command.add_argument('source', metavar='REPO|NAMESPACE', help='NAMESPACE/NAME of either form, or NAMESPACE')
    command.add_argument('zoo', metavar='ZOO', help='folder of pairs')
    command.add_argument('--revision', metavar='REVISION', help='branch, tag or commit (default: main)')
    command.set_defaults(command='pull')

    command = commands.add_parser(
        'run',
        parents=[common],
        help='run a script, such as one of timm, with the variants registered',
        description='Run a Python script with the variants registered. With torchrun: torchrun ... -m timm_reparam run'
        ' SCRIPT ARGS',
    )
    command.add_argument('script', metavar='SCRIPT', help='path of the script')
    command.add_argument('args', metavar='ARGS', nargs=argparse.REMAINDER, help='arguments of the script')
    command.set_defaults(command='run')
    return parser
