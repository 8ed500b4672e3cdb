"""The command line of train.py: flags of timm's train script with their names, defaults and meaning, and a few more."""

import argparse
import ast
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ReparamError
from ..hub.names import check_tag
from ..variants import VARIANTS

__all__ = ['build_parser', 'dataset_kind', 'parse_args', 'result_tag']

# Defaults of `python train.py` without a dataset. Flags and keys of --config override them.
DEFAULT_RECIPE: dict[str, Any] = dict(
    dataset='digits',
    model='resnet18_doconv',
    epochs=10,
    batch_size=64,
    opt='adamw',
    lr=2e-3,
    weight_decay=0.05,
    warmup_epochs=2,
    sched_on_updates=True,
    workers=0,
)

# Defaults of the data flags with --dataset digits: small grey images, which must not be flipped.
DIGITS_DATA: dict[str, Any] = dict(
    input_size=[3, 32, 32],
    num_classes=10,
    crop_pct=1.0,
    hflip=0.0,
    color_jitter=0.0,
    scale=[0.7, 1.0],
    ratio=[0.85, 1.18],
)

# Flags of timm's train script that train.py does not have, including those of older releases, with the defaults that a
# complete args.yaml contains.
# fmt: off
OTHER_FLAGS: dict[str, Any] = {
    **dict.fromkeys((
        'train_num_samples', 'val_num_samples', 'input_img_mode', 'target_format', 'gp', 'head_init_scale',
        'head_init_bias', 'model_dtype', 'layer_decay_no_opt_scale', 'start_epoch', 'bce_pos_weight', 'drop_connect',
        'drop_block', 'bn_momentum', 'bn_eps', 'train_img_sizes', 'train_batch_sizes', 'train_size_probs',
        'train_batches_per_epoch', 'naflex_patch_sizes', 'naflex_patch_size_probs', 'kd_student_feature_dim',
        'kd_teacher_feature_dim', 'loss', 'loss_class_weight', 'loss_pos_weight', 'class_stats', 'loss_weight_max',
        'poly_alpha', 'lr_decay_fn', 'lr_stable_timescale', 'sweep_locks', 'sweep_attempt', 'dynamo_backend',
        'train_crop_mode', 'torchcompile_mode', 'cutmix_minmax', 'color_jitter_prob', 'grayscale_prob',
        'gaussian_blur_prob', 'kd_model_name', 'distill_loss_weight', 'task_loss_weight',
    )),
    **dict.fromkeys((
        'dataset_trust_remote_code', 'fast_norm', 'torchscript', 'no_ddp_bb', 'synchronize_step', 'model_ema_force_cpu',
        'save_images', 'use_multi_epochs_loader', 'naflex_loader', 'naflex_patchify_channels_first', 'aot_autograd',
        'apex_amp', 'native_amp', 'bn_tf', 'dynamo', 'bce_sum', 'no_prefetcher',
    ), False),
    'fuser': '', 'wandb_resume_id': '', 'wandb_tags': [], 'save_epochs': [],
    'local_rank': 0, 'epoch_repeats': 0.0, 'tta': 0, 'num_gpu': 1, 'validation_batch_size_multiplier': 1,
    'patience_epochs': 10, 'amp_impl': 'native', 'task': 'classification', 'multilabel_threshold': 0.5,
    'worker_seeding': 'all', 'lr_noise_std': 1.0, 'lr_cycle_mul': 1.0, 'lr_cycle_decay': 0.5, 'lr_cycle_limit': 1,
    'lr_k_decay': 1.0, 'lr_noise_pct': 0.67, 'lr_base_scale': '', 'layer_decay_min_scale': 0, 'class_map': '',
    'mixup_mode': 'batch', 'recount': 1, 'kd_distill_type': 'logit', 'kd_temperature': 4.0,
    'train_size_schedule': 'constant', 'train_size_schedule_spread': 0.65, 'train_size_random_mix': 0.1,
    'variable_batch_loss_scale': 'none', 'naflex_train_seq_lens': [128, 256, 576, 784, 1024],
    'naflex_max_seq_len': 576, 'naflex_loss_scale': 'linear', 'kd_loss_type': 'kl', 'kd_token_distill_type': 'soft',
    'loss_weight_power': 1.0, 'loss_weight_beta': 0.999, 'asl_gamma_pos': 1.0, 'asl_gamma_neg': 4.0, 'asl_clip': 0.05,
    'asl_reduction': 'batchmean', 'poly_epsilon': 2.0, 'poly_gamma': 0.0, 'twoway_tp': 4.0, 'twoway_tn': 1.0,
    'db_neg_scale': 2.0, 'db_init_bias': 0.05, 'db_focal_gamma': 2.0,
}
# fmt: on
_OTHER_SCRIPT = "run timm's own script with --device-modules timm_reparam, then timm-reparam fuse"
_OTHER_WAY = f"a flag of timm's train script that train.py does not have; {_OTHER_SCRIPT}"

# Flags that apply to some kinds of dataset only.
_READ_BY = {
    'data_dir': ('folder', 'torch', 'hfds'),
    'dataset_download': ('torch',),
    'input_key': ('folder', 'hfds'),
    'target_key': ('hfds',),
}


def _number(kind: Callable[[str], Any], least: float, below: float = math.inf) -> Callable[[str], Any]:
    """Return an argparse type: a number that is at least `least` and less than `below`."""

    def convert(text: str) -> Any:
        number = kind(text)
        if not least <= number < below:
            limit = '' if below == math.inf else f' and less than {below:g}'
            raise argparse.ArgumentTypeError(f'expected at least {least:g}{limit}, got {text}')
        return number

    convert.__name__ = kind.__name__  # for the error message of argparse
    return convert


def _key_value(text: str) -> tuple[str, Any]:
    """Parse ``key=value``; the value is a Python literal or a string."""
    key, separator, value = text.partition('=')
    if not separator:
        raise argparse.ArgumentTypeError(f'expected key=value, got {text!r}')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        'train.py',
        usage='train.py [DIR] [flags]',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    switch: dict[str, Any] = dict(action='store_true')
    pairs: dict[str, Any] = dict(type=_key_value, nargs='*', default={}, metavar='KEY=VALUE')
    whole: dict[str, Any] = dict(type=int, metavar='N')
    count: dict[str, Any] = dict(type=_number(int, 1), metavar='N')
    number: dict[str, Any] = dict(type=float, metavar='X')
    # fmt: off
    parser.add_argument('data', nargs='?', metavar='DIR', help='same as --data-dir')
    parser.add_argument('-c', '--config', metavar='FILE', help='args.yaml of a run; flags on the command line win')

    add = parser.add_argument_group('data').add_argument
    add('--data-dir', metavar='DIR', help='root folder of the dataset, or a .tar file')
    add('--dataset', default='', metavar='NAME', help='torch/NAME, hfds/NAME, or digits; a folder or tar if empty')
    add('--train-split', default='train', metavar='NAME', help='split to train on')
    add('--val-split', default='validation', metavar='NAME', help='split to validate on; empty for none')
    add('--dataset-download', **switch, help='download a missing torch/ dataset')
    add('--input-key', metavar='NAME', help='field of a sample with the image')
    add('--target-key', metavar='NAME', help='field of a sample with the label')

    add = parser.add_argument_group('model').add_argument
    add('--model', default='resnet50', metavar='NAME', help='architecture[.tag], variants included: resnet18_doconv')
    add('--pretrained', **switch, help='start from the published weights of that tag')
    add('--pretrained-path', metavar='PATH', help='start from this checkpoint, adapted; implies --pretrained')
    add('--initial-checkpoint', default='', metavar='FILE', help='load a checkpoint of exactly this architecture')
    add('--num-classes', **count, help='size of the classifier (default: that of the model)')
    add('--img-size', **count, help='side of square input images')
    add('--in-chans', **count, help='channels of the input images')
    add('--input-size', type=_number(int, 1), nargs=3, metavar=('C', 'H', 'W'),
        help='channels and size of the images (default: those of the model)')
    add('--crop-pct', **number, help='share of a validation image that the centre crop keeps')
    add('--mean', **number, nargs='+', help='mean of the pixel values, one number or one per channel')
    add('--std', **number, nargs='+', help='standard deviation of the pixel values, likewise')
    add('--interpolation', default='', metavar='NAME', help='interpolation of validation images')
    add('--drop', **number, default=0.0, help='dropout before the classifier')
    add('--drop-path', **number, help='probability with which a residual branch is dropped')
    add('--model-kwargs', **pairs, help='further arguments of the model')
    add('--grad-checkpointing', **switch, help='recompute activations in the backward pass to save memory')

    add = parser.add_argument_group('batches and device').add_argument
    add('-b', '--batch-size', **count, default=128, help='images in a training batch, in each process')
    add('-vb', '--validation-batch-size', **count, help='images in a validation batch (default: --batch-size)')
    add('--grad-accum-steps', **count, default=1, help='batches whose gradients are added up before an update')
    # timm's default is cuda
    add('--device', metavar='NAME', help='device to train on (default: the accelerator, if there is one, or cpu)')
    add('--device-modules', nargs='+', metavar='NAME', help='Python modules to import first, such as those of a device')
    add('--amp', **switch, help='train in mixed precision')
    add('--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='low precision of --amp')
    add('--channels-last', **switch, help='use the channels_last memory format')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the training step (torch.compile); validation runs the fused copy uncompiled')

    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='sgd', metavar='NAME', help="timm's name of the optimizer")
    add('--opt-eps', **number, help="the optimizer's epsilon")
    add('--opt-betas', **number, nargs='+', help="the optimizer's betas")
    add('--momentum', **number, default=0.9, help="the optimizer's momentum")
    add('--weight-decay', **number, default=2e-5, help='weight decay; one-dimensional parameters have none')
    add('--clip-grad', **number, help='limit of the gradients, see --clip-mode')
    add('--clip-mode', choices=('norm', 'value', 'agc'), default='norm',
        help='agc is adaptive; parameters that a variant adds are exempt from it')
    add('--layer-decay', **number, help='factor on the learning rate from each layer to the one before it')
    add('--opt-kwargs', **pairs, help='further arguments of the optimizer')

    add = parser.add_argument_group('learning rate').add_argument
    add('--sched', default='cosine', metavar='NAME', help="timm's name of the schedule")
    add('--sched-on-updates', **switch, help='move the schedule at every update, not at every epoch')
    add('--lr', **number, help='learning rate (default: from --lr-base and the batch size)')
    add('--lr-base', **number, default=0.1,
        help='learning rate for --lr-base-size images an update, scaled to the batch')
    add('--lr-base-size', **count, default=256, help='images an update that --lr-base is meant for')
    add('--lr-noise', **number, nargs='+', help='fractions of the schedule at which noise on the rate starts and stops')
    add('--warmup-lr', **number, default=1e-5, help='rate at which the warm-up starts')
    add('--min-lr', **number, default=0, help='rate at which the schedule ends')
    add('--epochs', **count, default=300, help='epochs of the schedule')
    add('--stop-epoch', **count, help='stop after N epochs of an unchanged schedule')
    add('--decay-milestones', **whole, nargs='+', default=[90, 180, 270], help='epochs of the multistep schedule')
    add('--decay-epochs', **number, help='epochs between drops of step (90); fraction of wsd that decays (0.2)')
    add('--warmup-epochs', type=_number(int, 0), metavar='N', default=5, help='epochs of warm-up')
    add('--warmup-prefix', **switch, help='put the warm-up before the schedule, not inside it')
    add('--cooldown-epochs', **whole, default=0, help='epochs at the lowest rate after the schedule')
    add('--decay-rate', '--dr', **number, default=0.1, help='factor of a drop; the power of the poly schedule')

    add = parser.add_argument_group('augmentation').add_argument
    add('--no-aug', **switch, help='no augmentation at all')
    add('--scale', **number, nargs='+', default=[0.08, 1.0], help='range of the area that a random crop keeps')
    add('--ratio', **number, nargs='+', default=[3 / 4, 4 / 3], help='range of the aspect ratio of a random crop')
    add('--hflip', **number, default=0.5, help='probability of a horizontal flip')
    add('--vflip', **number, default=0.0, help='probability of a vertical flip')
    add('--color-jitter', **number, default=0.4, help='strength of colour jitter')
    add('--aa', metavar='POLICY', help="AutoAugment, RandAugment, AugMix or 3-Augment, in timm's notation")
    add('--aug-repeats', **number, default=0, help='copies of an image across the processes of a distributed run')
    add('--aug-splits', type=_number(int, 0), metavar='N', default=0,
        help='differently augmented copies of a batch, the first one clean; 0 or at least 2')
    add('--reprob', **number, default=0.0, help='probability of random erasing')
    add('--remode', choices=('const', 'rand', 'pixel'), default='pixel', help='black, one random colour, or noise')
    add('--resplit', **switch, help='no random erasing in the first, clean split')
    add('--mixup', **number, default=0.0, help='alpha of mixup; 0 is off')
    add('--cutmix', **number, default=0.0, help='alpha of cutmix; 0 is off')
    add('--mixup-prob', **number, default=1.0, help='probability that a batch is mixed')
    add('--mixup-switch-prob', **number, default=0.5, help='probability of cutmix when both are on')
    add('--mixup-off-epoch', **whole, default=0, help='first epoch without mixing; 0 for never')
    add('--train-interpolation', default='random', metavar='NAME', help='random, bilinear or bicubic')

    add = parser.add_argument_group('loss').add_argument
    add('--smoothing', type=_number(float, 0, 1), metavar='X', default=0.1, help='label smoothing')
    add('--jsd-loss', **switch, help='Jensen-Shannon divergence between the predictions of the --aug-splits')
    add('--bce-loss', **switch, help='binary cross-entropy for each class')
    add('--bce-target-thresh', **number, help='targets above this count as 1 in that loss, others as 0')

    add = parser.add_argument_group('batch norm and weight averaging').add_argument
    add('--sync-bn', **switch, help='batch statistics over all processes')
    add('--dist-bn', choices=('reduce', 'broadcast', ''), default='reduce',
        help='average, or copy, running statistics after an epoch')
    add('--split-bn', **switch, help='separate batch norm layers for each augmentation split')
    add('--model-ema', **switch, help='validate and save a moving average of the weights')
    add('--model-ema-decay', **number, default=0.9998, help='decay of the average per update')
    add('--model-ema-warmup', **switch, help='start with a smaller decay')

    add = parser.add_argument_group('run').add_argument
    add('--output', default='', metavar='DIR', help='folder of experiments (output/train if empty)')
    add('--experiment', default='', metavar='NAME', help="name of the run's folder; date, time and model if empty")
    add('--resume', default='', metavar='FILE', help='resume from this checkpoint; "auto": the newest of --experiment')
    add('--no-resume-opt', **switch, help='resume the weights only, with a fresh optimizer')
    add('--seed', type=_number(int, 0), metavar='N', default=42, help='seed of all random numbers')
    add('--val-interval', **count, default=1, help='epochs between two validations and checkpoints')
    add('--recovery-interval', type=_number(int, 0), metavar='N', default=0,
        help='updates between two recovery checkpoints; 0 for none')
    add('--checkpoint-hist', **count, default=10, help='number of best checkpoints to keep')
    add('--eval-metric', choices=('top1', 'top5', 'loss'), default='top1', help='metric of the best checkpoint')
    add('--log-interval', **count, default=50, help='updates between two lines of the log')
    add('--log-wandb', **switch, help='also log to Weights & Biases')
    add('--wandb-project', metavar='NAME', help='project of --log-wandb')
    add('-j', '--workers', type=_number(int, 0), metavar='N', default=4, help='loader processes')
    add('--pin-mem', **switch, help='pin memory of batches before they go to the device')

    add = parser.add_argument_group("train.py's own").add_argument
    add('--variant', choices=sorted(VARIANTS), help='turn --model into this variant')
    add('--conv-options', **pairs, help="options of the variant's convolutions, such as depth_multiplier=18")
    add('--variant-lr', type=_number(float, 0), metavar='FACTOR', default=1.0,
        help='factor on the learning rate of the kernels and maps that the variant adds')
    add('--tag', metavar='NAME', help="name of the result (default: the dataset's name)")
    add('--zoo', default='zoo', metavar='DIR', help='folder in which both forms are saved at the end')
    add('--publish', metavar='OWNER', help='publish both forms on the Hub at the end, under this user or organisation')
    add('--license', metavar='NAME', help='licence of the weights, if that of the initial weights is unknown')
    add('-v', '--verbose', **switch, help='more log messages, and tracebacks of errors')
    # fmt: on
    for action in parser._actions:
        if action.default not in (None, '', False, [], {}, argparse.SUPPRESS):
            action.help = f'{action.help} (default: %(default)s)'
    return parser


def parse_args(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Parse the command line.

    The command line takes precedence over the --config file, then come the defaults of the dataset and those of the
    flags.

    Args:
        argv: Command line without the name of the script; sys.argv by default.
        description: First text of --help.

    Returns:
        The arguments, checked as far as possible before anything is loaded.

    Raises:
        ReparamError: A flag or a key of the file is unknown, has a wrong value, or contradicts another.
    """
    parser = build_parser(description)
    named = _parse(parser, argv)
    if named.data and named.data_dir and named.data != named.data_dir:
        raise ReparamError(f'--data-dir {named.data_dir}: DIR is {named.data}; both have the same meaning, give one')
    config = _read_config(parser, named.config) if named.config else {}
    if named.data or named.data_dir:  # either form overrides both forms in the config
        config = {key: value for key, value in config.items() if key not in ('data', 'data_dir')}
    defaults: dict[str, Any] = {}
    places = named.data, named.data_dir, config.get('data'), config.get('data_dir')
    dataset = named.dataset or config.get('dataset') or ('' if any(places) else 'digits')
    if not (named.dataset or config.get('dataset') or any(places)):
        defaults.update(DEFAULT_RECIPE)
    if dataset == 'digits':
        defaults.update(DIGITS_DATA)
    parser.set_defaults(**{**defaults, **config, 'dataset': dataset})
    args = _parse(parser, argv)
    args.data_dir = args.data_dir or args.data
    args.data = args.data and args.data_dir  # so that args.yaml has one folder only
    for name in ('model_kwargs', 'opt_kwargs', 'conv_options'):
        setattr(args, name, dict(getattr(args, name)))
    check_args(args)
    return args


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; raises ReparamError with a one-line message."""
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ReparamError(str(error)) from None
    for word in unknown:
        name = word.partition('=')[0]
        if name.startswith('--') and name[2:].replace('-', '_') in OTHER_FLAGS:
            raise ReparamError(f'{name}: {_OTHER_WAY}')
    if unknown:
        raise ReparamError(f'unrecognized arguments: {" ".join(unknown)}; see train.py --help')
    return args


def _read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Read the flags in an args.yaml of this script or of timm's."""
    try:
        with open(path, encoding='utf-8') as file:
            config = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ReparamError(f'--config {path}: cannot be read as yaml ({error})') from error
    if not isinstance(config, dict):
        raise ReparamError(f'--config {path}: expected flags and their values, got a {type(config).__name__}')
    actions = {action.dest: action for action in parser._actions if action.dest not in ('config', 'help')}
    values = {}
    for key, value in config.items():
        if key in actions:
            # timm's script also writes None for defaults that it computes later.
            if value is not None or key == 'color_jitter':
                values[key] = _checked(parser, actions[key], value, f'--config {path}: {key}')
        elif key in OTHER_FLAGS:
            if value not in (OTHER_FLAGS[key], None, False, ''):
                raise ReparamError(f'--config {path}: {key}: {value}: {_OTHER_WAY}')
        elif value not in (None, False, '', [], {}):
            raise ReparamError(f'--config {path}: {key}: no flag of that name; see train.py --help')
    if values.get('device') == 'cuda':
        del values['device']  # timm's default, which is in every args.yaml
    return values


def _checked(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, place: str) -> Any:
    """Parse a value from a yaml file as on the command line."""
    if isinstance(action.default, dict) or action.nargs == 0 or value is None:
        kind = dict if isinstance(action.default, dict) else bool
        if value is not None and not isinstance(value, kind):
            raise ReparamError(f'{place}: expected {kind.__name__}, got {value!r}')
        return value
    several = action.nargs == '+' or isinstance(action.nargs, int)
    items = value if several and isinstance(value, (list, tuple)) else [value]
    if several and not items:
        return action.default
    try:
        parsed = [parser._get_value(action, str(item)) for item in items]
        for item in parsed:
            parser._check_value(action, item)
    except argparse.ArgumentError as error:
        raise ReparamError(f'{place}: {error}') from None
    return parsed if several else parsed[0]


def dataset_kind(args: argparse.Namespace) -> str:
    """Kind of the dataset: digits, folder (or tar), torch or hfds."""
    prefix, slash, _ = args.dataset.partition('/')
    prefix = prefix.lower()
    if slash and prefix in ('hfids', 'tfds', 'wds'):
        raise ReparamError(f'--dataset {args.dataset}: streams are not supported; {_OTHER_SCRIPT}')
    return prefix if args.dataset == 'digits' or (slash and prefix in ('torch', 'hfds')) else 'folder'


def check_args(args: argparse.Namespace) -> None:
    """Raise ReparamError if arguments conflict or cannot be used, before anything is loaded or written."""
    own = vars(build_parser().parse_args([]))  # without --config and the defaults of the dataset
    kind = dataset_kind(args)
    for name, kinds in _READ_BY.items():
        value, flag = getattr(args, name), '--' + name.replace('_', '-')
        if kind not in kinds and (value or own[name]) != own[name]:
            raise ReparamError(
                f'{flag} {value}: expected a dataset of kind {" or ".join(kinds)}, got {kind}; leave the flag out'
            )
    mixing = args.mixup > 0 or args.cutmix > 0
    scratch = not args.pretrained or args.pretrained_path or args.initial_checkpoint
    # fmt: off
    for wrong, message in (
        (kind == 'folder' and not args.data_dir, f'--dataset {args.dataset}: expected a folder; give --data-dir'),
        (args.sched == 'plateau', f'--sched plateau: deprecated by timm; {_OTHER_SCRIPT}'),
        (args.aug_splits == 1, '--aug-splits: expected 0 or at least 2, got 1'),
        (args.jsd_loss and args.bce_loss, '--jsd-loss and --bce-loss: choose one'),
        (args.jsd_loss and args.aug_splits < 2, '--jsd-loss: compares augmentation splits; add --aug-splits 3'),
        (args.split_bn and not args.aug_splits, '--split-bn: needs --aug-splits'),
        (args.split_bn and args.sync_bn, '--split-bn and --sync-bn: both replace the same layers; choose one'),
        (mixing and args.aug_splits, '--mixup and --cutmix with --aug-splits: splits are not mixed; choose one'),
        (mixing and args.batch_size % 2,
         f'--batch-size {args.batch_size}: --mixup and --cutmix pair the images of a batch; give an even size'),
        (args.variant_lr != 1 and args.sched == 'none',
         f'--variant-lr {args.variant_lr:g}: the schedule applies the factor; give --sched constant, not none'),
        (args.resume == 'auto' and not args.experiment,
         '--resume auto: needs the folder of a run; add --experiment'),
        (args.license and not args.publish, '--license: needs --publish; add it'),
        (args.publish and not args.license and scratch,
         '--publish: the licence of weights trained from scratch, or from a file, is unknown; add --license'),
        (args.log_wandb and importlib.util.find_spec('wandb') is None,
         '--log-wandb: the package wandb is not installed; pip install wandb, or leave the flag out'),
    ):
        if wrong:
            raise ReparamError(message)
    # fmt: on
    check_tag(result_tag(args))


def result_tag(args: argparse.Namespace) -> str:
    """Name of the result: --tag, or the dataset's name with other characters replaced."""
    if args.tag is not None:
        return args.tag
    if dataset_kind(args) in ('folder', 'digits'):
        name = args.dataset if args.dataset == 'digits' else Path(args.data_dir).resolve().name.removesuffix('.tar')
    else:
        name = args.dataset.partition('/')[2] or Path(args.data_dir or 'data').resolve().name
    return re.sub(r'[-.]*([-.])', r'\1', re.sub(r'[^A-Za-z0-9._-]', '-', name)).strip('-.') or 'data'
