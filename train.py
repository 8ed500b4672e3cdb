"""Train a timm backbone with over-parameterised convolutions, fuse it, verify the fusion, save both forms.

    python train.py                                                         # the handwritten digits, no download
    python train.py --data-dir photos --model resnet18_doconv --num-classes 10 --epochs 90 --amp
    python train.py --data-dir photos --model resnet18.a1_in1k --variant refconv --pretrained --num-classes 10
    python train.py --config args.yaml --variant acconv                     # the recipe of a run of timm's own script
    python train.py --config args.yaml --experiment first --resume auto     # go on where a killed run stopped
    torchrun --nproc-per-node 4 train.py --config args.yaml                 # one process for each GPU

data -> training, each epoch validated on a fused copy -> best checkpoint -> fused -> verified on the whole validation
set -> ZOO/<model>.<tag>/ and ZOO/<model>.<tag>_fused/ -> a table of both.

Flags have the names, defaults and meanings of timm's train script (`python train.py --help` lists them). A run writes
its checkpoints, `summary.csv` and `args.yaml` to OUTPUT/EXPERIMENT/. Resumed from any of its checkpoints it does what
it would have done without the interruption, bit for bit.
"""

import argparse
import copy
import gc
import importlib
import importlib.util
import logging
import math
import os
import random
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, which it would keep alive in its functions' defaults
import torchvision
import yaml
from timm import utils
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    create_dataset,
    create_loader,
    resolve_input_data_config,
)
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import (
    CLASS_WEIGHT_METHODS,
    LOSS_TYPES,
    create_classification_loss,
    load_class_stats,
    resolve_class_weights,
)
from timm.models import clean_state_dict, get_model_args, load_checkpoint, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
    evaluation_sample_limit,
)
from torch import nn

import timm_reparam
from timm_reparam import (
    DynamicConv2d,
    FusionReport,
    ReparamError,
    fuse_model,
    is_variant,
    register_variant,
    verify_fusion,
)
from timm_reparam.convert import VARIANTS, record_options, variant_of
from timm_reparam.hub import publish
from timm_reparam.hub.client import CLIENT_ERRORS, check_repo_id, limit_requests, one_line, without_secrets
from timm_reparam.hub.facts import missing_license
from timm_reparam.hub.folder import check_pair, check_tag, folder_name, save_checkpoint, save_pair
from timm_reparam.hub.training import base_model_facts, read_training, told_settings
from timm_reparam.profile import compare_profiles, format_comparison, format_profiles

_logger = logging.getLogger('train')

# What timm lets through, also of the Hub's client: its error of a dropped connection is none of Python's.
TIMM_ERRORS: tuple[type[Exception], ...] = (
    *(AssertionError, ImportError, LookupError, TypeError, ValueError),
    *CLIENT_ERRORS,
)

# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------

# What `python train.py` does when no data is named. A flag or a key of --config that names the same thing wins.
DEFAULT_RECIPE = dict(
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

# What --dataset digits means for the data flags that nobody set: small grey images, in which left and right matter.
DIGITS_DATA = dict(
    input_size=[3, 32, 32],
    num_classes=10,
    crop_pct=1.0,
    hflip=0.0,
    color_jitter=0.0,
    scale=[0.7, 1.0],
    ratio=[0.85, 1.18],
)

# Flags by group: name(s), kind, default, meaning. A kind is a type; [type] takes one or more values; a tuple lists the
# allowed words; bool is a switch; dict takes key=value pairs. Names, defaults and meanings are timm's, unless a comment
# says otherwise.
# fmt: off
FLAGS: dict[str, tuple[tuple[str, Any, Any, str], ...]] = {
    'data': (
        ('--data-dir', str, None, 'root folder of the dataset, or a .tar file'),
        ('--dataset', str, '', 'torch/, hfds/, hfids/, wds/ or tfds/NAME, or digits; a folder or tar if empty'),
        ('--train-split', str, 'train', 'split to train on'),
        ('--val-split', str, 'validation', 'split to validate on; an empty name trains without validation'),
        ('--train-num-samples', int, None, 'size of the training split, where a stream does not tell'),
        ('--val-num-samples', int, None, 'size of the validation split, where a stream does not tell'),
        ('--dataset-download', bool, False, 'download the dataset if it is missing and its kind can'),
        ('--class-map', str, '', 'file that maps class names to class indices'),
        ('--input-img-mode', str, None, 'PIL mode that images are converted to; RGB or L by the number of channels'),
        ('--input-key', str, None, 'field of a sample that holds the image'),
        ('--target-key', str, None, 'field of a sample that holds the label'),
        ('--dataset-trust-remote-code', bool, False, "let a Hub dataset run its repository's code on this machine"),
        ('--task', ('classification', 'multilabel'), 'classification', 'multilabel is refused'),
        ('--target-format', ('indices', 'multihot'), None, 'refused: format of multi-label targets'),
        ('--multilabel-threshold', float, 0.5, 'refused: for multi-label targets'),
    ),
    'model': (
        ('--model', str, 'resnet50', 'architecture[.tag], variants included: resnet18_doconv, mobilenetv2_100_dyconv'),
        ('--pretrained', bool, False, 'start from the published weights of that tag'),
        ('--pretrained-path', str, None, 'start from this checkpoint file or folder, adapted; implies --pretrained'),
        ('--initial-checkpoint', str, '', 'load this checkpoint of the very same architecture before training'),
        ('--resume', str, '', 'go on from this checkpoint; "auto" takes the newest one of --experiment, if any'),
        ('--no-resume-opt', bool, False, 'resume the weights only, with a fresh optimizer'),
        ('--num-classes', int, None, 'size of the classifier; the default is that of the model'),
        ('--gp', str, None, 'global pooling: fast, avg, max, avgmax or catavgmax; the default is that of the model'),
        ('--img-size', int, None, 'side of square input images'),
        ('--in-chans', int, None, 'channels of the input images (3 unless given)'),
        ('--input-size', [int, int, int], None, 'channels, height and width; the default is that of the model'),
        ('--crop-pct', float, None, 'share of a validation image that the centre crop keeps'),
        ('--mean', [float], None, 'mean of the pixel values, one number or one a channel'),
        ('--std', [float], None, 'standard deviation of the pixel values, likewise'),
        ('--interpolation', str, '', 'how validation images are resized; the default is that of the model'),
        ('-b --batch-size', int, 128, 'images in a training batch, in each process'),
        ('-vb --validation-batch-size', int, None, 'images in a validation batch; the default is --batch-size'),
        ('--channels-last', bool, False, 'keep weights and images in channels_last order'),
        ('--fuser', str, '', 'refused: fusers of old TorchScript releases'),
        ('--grad-accum-steps', int, 1, 'batches whose gradients are added up before an update'),
        ('--grad-checkpointing', bool, False, 'recompute activations in the backward pass to save memory'),
        ('--fast-norm', bool, False, 'run normalisation layers in the low precision of autocast'),
        ('--model-kwargs', dict, {}, 'further arguments of the model'),
        ('--head-init-scale', float, None, "factor on the classifier's initial weights and bias"),
        ('--head-init-bias', float, None, "value for the classifier's initial bias"),
        ('--torchcompile-mode', str, None, 'mode of torch.compile'),
    ),
    'device': (
        # timm's default is cuda; without the flag, this script takes the accelerator that is there, or the CPU
        ('--device', str, None, 'device to train on; the default is the accelerator, if there is one, or else cpu'),
        ('--amp', bool, False, 'train in mixed precision'),
        ('--amp-dtype', ('float16', 'bfloat16'), 'float16', 'low precision of --amp'),
        ('--model-dtype', ('float32', 'bfloat16', 'float16'), None, 'precision of the weights, without --amp'),
        ('--no-ddp-bb', bool, False, 'do not copy buffers from the first process to the others at every step'),
        ('--synchronize-step', bool, False, 'wait for the device after every update'),
        ('--local_rank --local-rank', int, 0, 'number of the process on its machine, where LOCAL_RANK is not set'),
        ('--device-modules', [str], None, 'Python modules to import first, for instance the backend of a device'),
    ),
    'optimizer': (
        ('--opt', str, 'sgd', "timm's name of the optimizer"),
        ('--opt-eps', float, None, "the optimizer's epsilon"),
        ('--opt-betas', [float], None, "the optimizer's betas"),
        ('--momentum', float, 0.9, "the optimizer's momentum"),
        ('--weight-decay', float, 2e-5, 'weight decay; biases and one-dimensional parameters have none'),
        ('--clip-grad', float, None, 'limit of the gradients, in the sense of --clip-mode'),
        ('--clip-mode', ('norm', 'value', 'agc'), 'norm', 'agc is adaptive; what a variant adds is exempt from it'),
        ('--layer-decay', float, None, 'factor on the learning rate from each layer to the one before it'),
        ('--layer-decay-min-scale', float, 0, 'least product of those factors'),
        ('--layer-decay-no-opt-scale', float, None, 'layers with a product below this are not trained'),
        ('--opt-kwargs', dict, {}, 'further arguments of the optimizer'),
    ),
    'learning rate': (
        ('--sched', str, 'cosine', "timm's name of the schedule"),
        ('--sched-on-updates', bool, False, 'move the schedule at every update, not at every epoch'),
        ('--lr', float, None, 'learning rate; the default follows from --lr-base and the batch size'),
        ('--lr-base', float, 0.1, 'learning rate for --lr-base-size images an update'),
        ('--lr-base-size', int, 256, 'images an update that --lr-base is meant for'),
        ('--lr-base-scale', ('', 'linear', 'sqrt'), '', 'how the rate grows with the batch; by the optimizer if empty'),
        ('--lr-noise', [float], None, 'shares of the schedule at which noise on the rate starts and stops'),
        ('--lr-noise-pct', float, 0.67, 'largest relative noise'),
        ('--lr-noise-std', float, 1.0, 'standard deviation of the noise'),
        ('--lr-cycle-mul', float, 1.0, 'factor on the length from one cycle to the next'),
        ('--lr-cycle-decay', float, 0.5, 'factor on the rate from one cycle to the next'),
        ('--lr-cycle-limit', int, 1, 'number of cycles'),
        ('--lr-k-decay', float, 1.0, 'k of cosine and poly schedules with k-decay'),
        ('--warmup-lr', float, 1e-5, 'rate at which the warm-up starts'),
        ('--min-lr', float, 0, 'rate at which the schedule ends'),
        ('--epochs', int, 300, 'epochs of the schedule'),
        ('--epoch-repeats', float, 0.0, 'passes over a streamed dataset that make an epoch'),
        ('--start-epoch', int, None, 'epoch to start with, whatever a resumed checkpoint says'),
        ('--stop-epoch', int, None, 'stop after so many epochs of the schedule, which stays as it is'),
        ('--decay-milestones', [int], [90, 180, 270], 'epochs at which the multistep schedule drops'),
        ('--decay-epochs', float, None, 'epochs between drops of step (90); share of wsd or rsqrt that decays (0.2)'),
        ('--lr-decay-fn', str, None, 'decay of wsd and rsqrt: linear, 1-sqrt, cosine, power or exp'),
        ('--lr-stable-timescale', float, None, 'timescale of rsqrt in epochs; the default is --warmup-epochs'),
        ('--warmup-epochs', int, 5, 'epochs of warm-up'),
        ('--warmup-prefix', bool, False, 'put the warm-up in front of the schedule, not inside it'),
        ('--cooldown-epochs', int, 0, 'epochs at the lowest rate after the schedule'),
        ('--patience-epochs', int, 10, 'epochs without gain before the plateau schedule drops'),
        ('--decay-rate --dr', float, 0.1, 'factor of a drop; the power of the poly schedule'),
    ),
    'augmentation': (
        ('--no-aug', bool, False, 'no augmentation at all'),
        ('--train-crop-mode', ('rrc', 'rkrc', 'rkrr'), None, 'how training images are cropped'),
        ('--scale', [float], [0.08, 1.0], 'least and largest share of the area that a random crop keeps'),
        ('--ratio', [float], [3 / 4, 4 / 3], 'least and largest aspect ratio of a random crop'),
        ('--hflip', float, 0.5, 'probability of a horizontal flip'),
        ('--vflip', float, 0.0, 'probability of a vertical flip'),
        ('--color-jitter', float, 0.4, 'strength of colour jitter'),
        ('--color-jitter-prob', float, None, 'probability of colour jitter, where it is not applied to every image'),
        ('--grayscale-prob', float, None, 'probability of a conversion to grey'),
        ('--gaussian-blur-prob', float, None, 'probability of a Gaussian blur'),
        ('--aa', str, None, 'AutoAugment, RandAugment, AugMix or 3-Augment policy, in the spelling of timm'),
        ('--aug-repeats', float, 0, 'differently augmented copies of an image over the processes of a distributed run'),
        ('--aug-splits', int, 0, 'differently augmented copies of a batch, the first one clean; 0 or at least 2'),
        ('--reprob', float, 0.0, 'probability of random erasing'),
        ('--remode', ('const', 'rand', 'pixel'), 'pixel', 'what is put in: black, one random colour, or noise'),
        ('--recount', int, 1, 'most regions erased in an image'),
        ('--resplit', bool, False, 'erase nothing in the first, clean split'),
        ('--mixup', float, 0.0, 'alpha of mixup; 0 is off'),
        ('--cutmix', float, 0.0, 'alpha of cutmix; 0 is off'),
        ('--cutmix-minmax', [float], None, 'least and largest side of the cutmix box; switches cutmix on'),
        ('--mixup-prob', float, 1.0, 'probability that a batch is mixed'),
        ('--mixup-switch-prob', float, 0.5, 'probability of cutmix instead of mixup, when both are on'),
        ('--mixup-mode', ('batch', 'pair', 'elem', 'half'), 'batch', 'what shares its mixing'),
        ('--mixup-off-epoch', int, 0, 'first epoch without mixing; 0 mixes to the end'),
        ('--smoothing', float, 0.1, 'label smoothing'),
        ('--train-interpolation', str, 'random', 'how training images are resized: random, bilinear or bicubic'),
        ('--drop', float, 0.0, 'dropout before the classifier'),
        ('--drop-connect', float, None, 'refused: use --drop-path'),
        ('--drop-path', float, None, 'probability with which a residual branch is dropped'),
        ('--drop-block', float, None, 'probability of DropBlock'),
    ),
    'loss': (
        ('--loss', LOSS_TYPES, None, 'ce (cross-entropy) by default; twoway, zlpr, db are for multi-label targets'),
        ('--jsd-loss', bool, False, 'the same as --loss jsd: pull the predictions of the --aug-splits together'),
        ('--bce-loss', bool, False, 'the same as --loss bce: binary cross-entropy for each class'),
        ('--bce-sum', bool, False, 'sum that loss over the classes instead of averaging'),
        ('--bce-target-thresh', float, None, 'targets above this count as 1 in that loss, others as 0'),
        ('--bce-pos-weight', float, None, 'weight of the positive targets in that loss'),
        ('--loss-pos-weight', str, None, 'the same: a number, a list 1,2,3, a file, or neg_pos (see --class-stats)'),
        ('--loss-class-weight', str, None, 'weights of the classes in that loss; methods are inv_freq, effective_num'),
        ('--class-stats', str, None, "label counts, made by timm's class_weights.py, that those methods start from"),
        ('--loss-weight-power', float, 1.0, 'exponent of neg_pos and inv_freq'),
        ('--loss-weight-beta', float, 0.999, 'beta of effective_num'),
        ('--loss-weight-max', float, None, 'limit of the weights of these methods'),
        ('--asl-gamma-pos', float, 1.0, 'focus on positive targets in the asymmetric loss (asl)'),
        ('--asl-gamma-neg', float, 4.0, 'focus on negative targets in it'),
        ('--asl-clip', float, 0.05, 'refused: for multi-label targets'),
        ('--asl-reduction', str, 'batchmean', 'refused: for multi-label targets'),
        ('--poly-epsilon', float, 2.0, 'coefficient of the poly loss'),
        ('--poly-gamma', float, 0.0, 'refused: for multi-label targets'),
        ('--poly-alpha', float, None, 'refused: for multi-label targets'),
        ('--twoway-tp', float, 4.0, 'refused: for multi-label targets'),
        ('--twoway-tn', float, 1.0, 'refused: for multi-label targets'),
        ('--db-neg-scale', float, 2.0, 'refused: for multi-label targets'),
        ('--db-init-bias', float, 0.05, 'refused: for multi-label targets'),
        ('--db-focal-gamma', float, 2.0, 'refused: for multi-label targets'),
    ),
    'batch norm': (
        ('--bn-momentum', float, None, 'momentum of the running statistics, for the models of timm that take it'),
        ('--bn-eps', float, None, 'epsilon, for the models of timm that take it'),
        ('--sync-bn', bool, False, 'batch statistics over all processes'),
        ('--dist-bn', ('reduce', 'broadcast', ''), 'reduce', 'average, or copy, running statistics after an epoch'),
        ('--split-bn', bool, False, 'batch norm layers of its own for each augmentation split'),
    ),
    'weight averaging': (
        ('--model-ema', bool, False, 'keep a moving average of the weights, validate it and save it as the result'),
        ('--model-ema-force-cpu', bool, False, 'keep it on the CPU of the first process, without validating it'),
        ('--model-ema-decay', float, 0.9998, 'share of the average that an update keeps'),
        ('--model-ema-warmup', bool, False, 'start with a smaller share'),
    ),
    'run': (
        ('--seed', int, 42, 'seed of all random numbers'),
        ('--worker-seeding', ('all', 'part'), 'all', "whether loader processes seed NumPy's random state too"),
        ('--log-interval', int, 50, 'updates between two lines of the log'),
        ('--val-interval', int, 1, 'epochs between two validations, and checkpoints'),
        ('--recovery-interval', int, 0, 'updates between two recovery checkpoints; 0 writes none'),
        ('--checkpoint-hist', int, 10, 'number of checkpoints kept, the best ones'),
        ('--save-epochs', [int], [], 'numbers of epochs after which a checkpoint is kept for good, as milestone-N'),
        ('-j --workers', int, 4, 'loader processes'),
        ('--save-images', bool, False, 'save a training batch as an image at every line of the log'),
        ('--pin-mem', bool, False, 'page-locked memory for batches on their way to the device'),
        ('--no-prefetcher', bool, False, 'normalise and erase in the loader processes, not on the device'),
        ('--output', str, '', 'folder of experiments (output/train if empty)'),
        ('--experiment', str, '', "name of the run's folder; date, time and model if empty"),
        ('--eval-metric', ('top1', 'top5', 'loss'), 'top1', 'what the best checkpoint is best in'),
        ('--tta', int, 0, 'refused above 1: test-time augmentation'),
        ('--use-multi-epochs-loader', bool, False, 'keep loader processes over epochs (resuming is then not exact)'),
        ('--log-wandb', bool, False, 'also log to Weights & Biases'),
        ('--wandb-project', str, None, 'its project'),
        ('--wandb-tags', [str], [], 'its tags'),
        ('--wandb-resume-id', str, '', 'its run to go on with; needs --resume'),
    ),
    'scheduled resolutions': (
        ('--train-img-sizes', [int], None, 'image sides to train on, each batch with one of them'),
        ('--train-batch-sizes', [int], None, 'batch size for each of them; the default is --batch-size'),
        ('--train-size-probs', [float], None, 'weight of each of them'),
        ('--train-size-schedule', ('constant', 'progressive'), 'constant', 'progressive: from first to last size'),
        ('--train-size-schedule-spread', float, 0.65, 'width of the progressive choice, in sizes'),
        ('--train-size-random-mix', float, 0.1, 'share of batches of any size in the progressive choice'),
        ('--train-batches-per-epoch --train-steps-per-epoch', int, None, 'batches that make an epoch'),
        ('--variable-batch-loss-scale', ('none', 'sqrt', 'linear'), 'none', 'how the loss grows with the batch size'),
    ),
    'refused: sequences of patches': (
        ('--naflex-loader', bool, False, ''),
        ('--naflex-train-seq-lens', [int], [128, 256, 576, 784, 1024], ''),
        ('--naflex-max-seq-len', int, 576, ''),
        ('--naflex-patch-sizes', [int], None, ''),
        ('--naflex-patch-size-probs', [float], None, ''),
        ('--naflex-loss-scale', ('none', 'sqrt', 'linear'), 'linear', ''),
        ('--naflex-patchify-channels-first', bool, False, ''),
    ),
    'refused: runs of a sweep': (
        ('--sweep-locks', [str], None, ''),
        ('--sweep-attempt', [str, str], None, ''),
    ),
    'distillation': (
        ('--kd-model-name', str, None, 'pretrained model to learn from'),
        ('--kd-distill-type', ('logit', 'feature', 'token'), 'logit', 'what is learned from it'),
        ('--kd-loss-type', ('kl',), 'kl', 'loss between the logits'),
        ('--distill-loss-weight', float, None, 'weight of that loss; 1, or what --task-loss-weight leaves'),
        ('--task-loss-weight', float, None, 'weight of the loss against the labels'),
        ('--kd-temperature', float, 4.0, 'temperature of the softmax'),
        ('--kd-student-feature-dim', int, None, 'features of this model, if timm cannot tell'),
        ('--kd-teacher-feature-dim', int, None, 'features of the other model, if timm cannot tell'),
        ('--kd-token-distill-type', ('soft', 'hard'), 'soft', 'targets of a distillation token'),
    ),
    "this script's own": (
        ('--variant', str, None, f'turn --model into a variant: {", ".join(sorted(VARIANTS))}'),
        ('--conv-options', dict, {}, "options of the variant's convolutions, for instance depth_multiplier=18"),
        ('--tag', str, None, "name of the result; the default is the dataset's name"),
        ('--zoo', str, 'zoo', 'folder in which both forms are saved at the end'),
        ('--publish', str, None, 'publish both forms on the Hub at the end, under this user or organisation'),
        ('--license', str, None, 'licence of published weights that start from none with a licence, apache-2.0 say'),
        ('-v --verbose', bool, False, 'more lines in the log, and errors with their traceback'),
    ),
}
# fmt: on

_MULTILABEL = 'this script classifies images with one label each, its accuracies and cards mean that'
_SWEEP = "timm's sweep.py passes it to timm's own train script"
_NAFLEX = 'these batches are sequences of patches, for transformers; see --train-img-sizes for images of several sizes'
# Flags of timm that are known and not honoured. Their defaults pass, so a complete args.yaml of timm can be read.
REFUSED = {
    'fuser': 'it chooses among TorchScript fusers that current PyTorch no longer has; see --torchcompile',
    'drop_connect': 'timm no longer reads it; use --drop-path',
    'tta': "timm's loaders deliver one copy of an image, so that different images would be averaged; leave it at 0",
    **{f'naflex_{name}': _NAFLEX for name in ('loader', 'train_seq_lens', 'max_seq_len', 'patch_sizes')},
    **{f'naflex_{name}': _NAFLEX for name in ('patch_size_probs', 'loss_scale', 'patchify_channels_first')},
    **dict.fromkeys(('task', 'target_format', 'multilabel_threshold', 'asl_clip', 'asl_reduction'), _MULTILABEL),
    **dict.fromkeys(('poly_gamma', 'poly_alpha', 'twoway_tp', 'twoway_tn'), _MULTILABEL),
    **dict.fromkeys(('db_neg_scale', 'db_init_bias', 'db_focal_gamma'), _MULTILABEL),
    **dict.fromkeys(('sweep_locks', 'sweep_attempt'), _SWEEP),
}
# Keys that older releases of timm wrote to args.yaml, with the values that ask for nothing.
RETIRED = {
    'aot_autograd': (False, 'use --torchcompile'),
    'amp_impl': ('native', 'only the mixed precision of PyTorch is supported'),
    'apex_amp': (False, 'use --amp'),
    'native_amp': (False, 'use --amp'),
    'bn_tf': (False, 'use --bn-momentum and --bn-eps'),
    'dynamo': (False, 'use --torchcompile'),
    'dynamo_backend': (None, 'use --torchcompile'),
    'num_gpu': (1, 'start one process for each GPU with torchrun'),
    'validation_batch_size_multiplier': (1, 'use --validation-batch-size'),
}
# Least values.
LEAST = {
    **dict.fromkeys(('batch_size', 'validation_batch_size', 'grad_accum_steps', 'checkpoint_hist'), 1),
    **dict.fromkeys(('val_interval', 'log_interval', 'train_batches_per_epoch', 'epochs', 'stop_epoch'), 1),
    **dict.fromkeys(('seed', 'workers', 'recovery_interval', 'aug_splits', 'start_epoch'), 0),
}
# Flags that only some kinds of dataset read.
STREAMS = ('hfids', 'tfds', 'wds')
READ_BY = {
    'data_dir': ('folder', 'torch', 'hfds', *STREAMS),
    'train_num_samples': STREAMS,
    'val_num_samples': STREAMS,
    'epoch_repeats': STREAMS,
    'dataset_download': ('torch', 'hfids', 'tfds'),
    'class_map': ('folder', 'hfds', *STREAMS),
    'input_img_mode': ('digits', 'folder', 'hfds', *STREAMS),
    'input_key': ('folder', 'hfds', *STREAMS),
    'target_key': ('hfds', *STREAMS),
    'dataset_trust_remote_code': ('hfds', 'hfids'),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of this package: one line, not the usage of 200 flags."""

    def error(self, message: str) -> NoReturn:
        raise ReparamError(message)


class KeyValues(utils.ParseKwargs):
    """``key=value`` pairs as a dict; values are Python literals, or text."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string}: expected key=value, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser from the table of flags."""
    parser = Parser(
        usage='train.py [DIR] [flags]',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('data', nargs='?', metavar='DIR', help='the same as --data-dir')
    parser.add_argument('-c', '--config', metavar='FILE', help='args.yaml of a run; flags on the command line win')
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for names, kind, default, text in rows:
            if default not in (None, '', False, [], {}):
                shown = ' '.join(map(str, default)) if isinstance(default, list) else default
                text = f'{text} (default: {shown})'.strip()
            group.add_argument(*names.split(), default=default, help=text, **_argparse_kind(kind))
    codegen = parser.add_argument_group('code generation')
    codegen.add_argument('--torchscript', action='store_true', help='train the scripted model (torch.jit.script)')
    codegen.add_argument(
        '--torchcompile',
        nargs='?',
        const='inductor',
        metavar='BACKEND',
        help='compile the training step (torch.compile); validation runs the fused copy uncompiled',
    )
    return parser


def _argparse_kind(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return dict(action='store_true')
    if kind is dict:
        return dict(action=KeyValues, nargs='*', metavar='KEY=VALUE')
    if isinstance(kind, tuple):
        return dict(choices=kind)
    metavars = {str: 'NAME', int: 'N', float: 'X'}
    if isinstance(kind, list):
        return dict(type=kind[0], nargs=len(kind) if len(kind) > 1 else '+', metavar=metavars[kind[0]])
    return dict(type=kind, metavar=metavars[kind])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line over the --config file over the defaults of the dataset over the flags' own defaults."""
    parser = build_parser()
    named = parser.parse_args(argv)
    if named.data and named.data_dir and named.data != named.data_dir:
        raise ReparamError(f'--data-dir {named.data_dir}: DIR is {named.data}; both mean the same, give one of them')
    config = read_args_file(parser, named.config) if named.config else {}
    if named.data or named.data_dir:  # in either form over that of the config in either form
        config = {key: value for key, value in config.items() if key not in ('data', 'data_dir')}
    parser.set_defaults(**config)
    named = parser.parse_args(argv)
    if not (named.dataset or named.data_dir or named.data):
        parser.set_defaults(**{**DEFAULT_RECIPE, **config, 'dataset': 'digits'})
        named = parser.parse_args(argv)
    if named.dataset == 'digits':
        parser.set_defaults(**{**DIGITS_DATA, **{key: value for key, value in config.items() if value is not None}})
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or args.data
    args.data = args.data and args.data_dir  # args.yaml does not tell of two
    check_args(args, parser)
    return args


def read_args_file(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Read the flags in an args.yaml, this script's or timm's."""
    try:
        with open(path, encoding='utf-8') as file:
            config = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ReparamError(f'--config {path}: cannot be read as yaml ({error})') from error
    if not isinstance(config, dict):
        raise ReparamError(f'--config {path}: expected flags and their values, got a {type(config).__name__}')
    actions = {action.dest: action for action in parser._actions}
    values = {}
    for key, value in config.items():
        if key in RETIRED:
            idle, advice = RETIRED[key]
            if value not in (idle, None, False, ''):
                raise ReparamError(f'--config {path}: {key}: {value}: no longer a flag; {advice}')
        elif key not in actions or key in ('config', 'help'):
            if value not in (None, False, '', [], {}):
                raise ReparamError(f'--config {path}: {key}: no flag of that name; see train.py --help')
            _logger.warning('--config %s: %s: no flag of that name; left out, since it is empty', path, key)
        else:
            values[key] = _from_yaml(actions[key], value, f'--config {path}: {key}')
    if values.get('device') == 'cuda':
        values['device'] = None  # timm writes its default to every args.yaml: that asks for nothing in particular
    return values


def _from_yaml(action: argparse.Action, value: Any, place: str) -> Any:
    """Give a value from a yaml file the type that the command line would give it."""
    if action.choices is not None and value in (None, ''):
        return '' if '' in action.choices else action.default
    if value is None:  # timm's script also writes it where it works the default out later
        return action.default if isinstance(action, KeyValues) or action.dest == 'smoothing' else None
    kind: Any = dict if isinstance(action, KeyValues) else bool if action.nargs == 0 else action.type or str
    takes_several = action.nargs == '+' or (isinstance(action.nargs, int) and action.nargs > 1)
    items = value if takes_several and isinstance(value, (list, tuple)) else [value]
    try:
        if any(
            isinstance(item, bool) != (kind is bool) or (kind is dict and not isinstance(item, dict)) for item in items
        ):
            raise ValueError
        converted = [kind(item) for item in items]
        if kind is int and any(float(item) != number for item, number in zip(items, converted)):
            raise ValueError
        if action.choices is not None and converted[0] not in action.choices:
            raise ValueError
    except (TypeError, ValueError):
        expected = f'one of {", ".join(action.choices)}' if action.choices else kind.__name__
        raise ReparamError(f'{place}: expected {expected}, got {value!r}') from None
    return converted if takes_several else converted[0]


def check_args(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse flags that cannot be honoured, by name; checked before anything is loaded or written."""
    flag = {action.dest: (action.option_strings or [action.dest])[-1] for action in parser._actions}
    own = {action.dest: action.default for action in build_parser()._actions}  # without --config and dataset defaults
    for name, reason in REFUSED.items():
        if getattr(args, name) not in (None, own[name], 1 if name == 'tta' else own[name]):
            raise ReparamError(f'{flag[name]} {getattr(args, name)}: {reason}')
    kind = dataset_kind(args)
    for name, kinds in READ_BY.items():
        if kind not in kinds and (getattr(args, name) or own[name]) != own[name]:
            raise ReparamError(
                f'{flag[name]} {getattr(args, name)}: read by datasets of kind {", ".join(kinds)} only, not by {kind}'
            )
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    for name, least in LEAST.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ReparamError(f'{flag[name]} {getattr(args, name)}: expected at least {least}')
    sizes = 'train_batch_sizes' if args.train_img_sizes and args.train_batch_sizes else 'batch_size'
    batches = args.train_batch_sizes if sizes == 'train_batch_sizes' else [args.batch_size]
    # fmt: off
    for wrong, message in (
        (args.variant not in (None, *VARIANTS), f'--variant {args.variant}: expected one of {", ".join(VARIANTS)}'),
        (kind == 'folder' and not args.data_dir, f'--dataset {args.dataset}: its folder is missing; give --data-dir'),
        (args.amp and args.model_dtype not in (None, 'float32'), '--amp: needs float32 weights, not --model-dtype'),
        (args.aug_splits == 1, '--aug-splits 1: one split is no split; expected 0 or at least 2'),
        (len({name for name in (args.loss, 'jsd' * args.jsd_loss, 'bce' * args.bce_loss) if name}) > 1,
         '--loss, --jsd-loss and --bce-loss: choose one'),
        (loss_type(args) == 'jsd' and args.aug_splits < 2,
         '--jsd-loss: compares augmentation splits; add --aug-splits 3'),
        (None not in (args.bce_pos_weight, args.loss_pos_weight) and args.loss_pos_weight != str(args.bce_pos_weight),
         '--bce-pos-weight and --loss-pos-weight: are the same; choose one'),
        (args.class_stats and not {args.loss_class_weight, args.loss_pos_weight} & {*CLASS_WEIGHT_METHODS},
         f'--class-stats: for a --loss-pos-weight or --loss-class-weight of {", ".join(CLASS_WEIGHT_METHODS)}'),
        (args.split_bn and not (args.aug_splits or args.resplit), '--split-bn: needs --aug-splits or --resplit'),
        (args.split_bn and args.sync_bn, '--split-bn and --sync-bn: both replace the same layers; choose one'),
        (args.sync_bn and args.torchscript, '--sync-bn: does not work on a scripted model; leave out --torchscript'),
        (args.torchscript and args.torchcompile, '--torchscript and --torchcompile: choose one'),
        (mixing and args.aug_splits and not args.no_prefetcher,
         '--mixup and --cutmix with --aug-splits: the prefetcher cannot mix split batches; add --no-prefetcher'),
        (mixing and any(size * max(args.aug_splits, 1) % 2 for size in batches),
         f'{flag[sizes]} {" ".join(map(str, batches))}: --mixup and --cutmix pair the images of a batch; give even'
         ' sizes'),
        (not 0 <= args.smoothing < 1, f'--smoothing {args.smoothing}: expected 0 or more, and less than 1'),
        (args.train_img_sizes and args.aug_splits, '--train-img-sizes: does not work with --aug-splits'),
        (args.use_multi_epochs_loader and (args.train_img_sizes or args.mixup_off_epoch),
         '--use-multi-epochs-loader: its processes would not see --mixup-off-epoch or --train-img-sizes at work'),
        (args.resume == 'auto' and not args.experiment,
         '--resume auto: looks into the folder of --experiment; name one'),
        (args.wandb_resume_id and not args.resume, '--wandb-resume-id: needs --resume'),
        (args.license and not args.publish, '--license: is for --publish; add it'),
        (args.publish and not args.license
         and (not args.pretrained or args.pretrained_path or args.initial_checkpoint),
         '--publish: weights trained from scratch, or from a file, have no known licence; add --license'),
        (args.log_wandb and importlib.util.find_spec('wandb') is None,
         '--log-wandb: the package wandb is not installed; pip install wandb, or leave the flag out'),
    # fmt: on
    ):
        if wrong:
            raise ReparamError(message)
    check_tag(result_tag(args))


def result_tag(args: argparse.Namespace) -> str:
    """Name of the result: --tag, or the dataset's name made legal."""
    if args.tag is not None:
        return args.tag
    if dataset_kind(args) in ('folder', 'digits'):
        name = args.dataset if args.dataset == 'digits' else Path(args.data_dir).resolve().name.removesuffix('.tar')
    else:
        name = args.dataset.partition('/')[2] or Path(args.data_dir or 'data').resolve().name
    return re.sub(r'[-.]*([-.])', r'\1', re.sub(r'[^A-Za-z0-9._-]', '-', name)).strip('-.') or 'data'


# --------------------------------------------------------------------------------------------------------------------
# Random numbers
# --------------------------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> tuple:
    """Random states of Python, NumPy, torch and the device."""
    accelerator = None
    if device.type != 'cpu':
        accelerator = torch.get_device_module(device).get_rng_state(*_rng_arguments(device))
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), accelerator


def set_random_state(state: tuple, device: torch.device) -> None:
    """Put random states back."""
    python, numpy, cpu, accelerator = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if accelerator is not None:
        torch.get_device_module(device).set_rng_state(accelerator, *_rng_arguments(device))


def _rng_arguments(device: torch.device) -> tuple:
    return () if device.type == 'mps' else (device,)  # of which there is only one


def pack_random_state(state: tuple) -> dict[str, Any]:
    """Turn random states into what torch.load(weights_only=True) reads."""
    python, (name, keys, *rest), cpu, accelerator = state
    numpy = (str(name), torch.from_numpy(keys.astype(np.int64)), *(type(value)(value) for value in rest))
    return dict(python=python, numpy=numpy, torch=cpu, accelerator=accelerator)


def unpack_random_state(packed: dict[str, Any]) -> tuple:
    """Turn what was saved into random states again."""
    name, keys, *rest = packed['numpy']
    version, keys_python, gauss = packed['python']
    python = (version, tuple(keys_python), gauss)
    return python, (name, keys.numpy().astype(np.uint32), *rest), packed['torch'], packed['accelerator']


class RandomStream:
    """Random numbers of their own for one purpose.

    Inside ``with stream:`` whatever draws random numbers draws from the stream; outside nothing of that is seen. So the
    batches of an epoch depend on their seeds alone, not on how many numbers dropout took in between, and can be drawn
    again after a restart in the middle of the epoch.

    Args:
        device: Device whose random state belongs to it too.
        *seeds: Numbers, at least 0, that make the stream.
    """

    def __init__(self, device: torch.device, *seeds: int):
        self.device = device
        outer = random_state(device)
        utils.random_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        self.state = random_state(device)
        set_random_state(outer, device)

    def __enter__(self) -> None:
        self.outer = random_state(self.device)
        set_random_state(self.state, self.device)

    def __exit__(self, *error) -> None:
        self.state = random_state(self.device)
        set_random_state(self.outer, self.device)


# Images that go through the verification of a fusion at a time.
VERIFY_BATCH = 32
# Images of noise that stand in for a validation split, or help out where one is small.
NOISE_IMAGES = 64
# What a stream is for; together with seed, epoch and rank it makes the stream.
TRAINING_DATA, VALIDATION = 0, 1


def draw(
    loader, stream: RandomStream, prepare: Callable, skip: int = 0
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (index, input, target) for the batches of an epoch, all their randomness from the stream.

    Args:
        loader: A loader of timm.
        stream: Stream of the epoch.
        prepare: What is done to a batch before it is used.
        skip: Number of batches to draw without yielding them.
    """
    with stream:
        iterator = iter(loader)
    index = 0
    while True:
        with stream:
            batch = next(iterator, None)
            if batch is not None:
                batch = prepare(*batch)
        if batch is None:
            return
        if index >= skip:
            yield index, *batch
        index += 1


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


class Digits(torch.utils.data.Dataset):
    """The handwritten digits inside scikit-learn: 1,797 grey images of 8x8 pixels, in the interface of timm's datasets.

    Args:
        split: 'train' or 'training', anything else is the held-out fifth (the same one always, stratified).
        input_img_mode: PIL mode of the images.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, split: str, input_img_mode: str = 'RGB'):
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ReparamError(
                f"--dataset digits: the images are part of scikit-learn ({error}); pip install 'timm-reparam[demo]'"
            ) from error
        digits = load_digits()
        rows = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        rows = rows[0] if split in ('train', 'training') else rows[1]
        self.images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[rows]
        self.input_img_mode = input_img_mode
        self.transform = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image = Image.fromarray(self.images[index]).convert(self.input_img_mode)
        return image if self.transform is None else self.transform(image), int(self.targets[index])


def dataset_kind(args: argparse.Namespace) -> str:
    """Kind of the dataset: digits, folder (or tar), or the prefix of its name."""
    prefix, slash, _ = args.dataset.partition('/')
    if args.dataset == 'digits' or (slash and prefix.lower() in ('torch', 'hfds', *STREAMS)):
        return prefix.lower()
    return 'folder'


def create_split(args: argparse.Namespace, split: str, is_training: bool, img_mode: str) -> torch.utils.data.Dataset:
    """Open one split of the dataset."""
    if args.dataset == 'digits':
        return Digits(split, img_mode)
    if dataset_kind(args) == 'folder' and not os.path.exists(args.data_dir):
        raise ReparamError(f'--data-dir {args.data_dir}: no such file or folder')
    options = dict(seed=args.seed, repeats=args.epoch_repeats) if is_training else {}
    try:
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            input_img_mode=img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **options,
        )
    except TIMM_ERRORS as error:
        where = args.data_dir or args.dataset
        raise ReparamError(f'{where}: no usable split {split!r} ({error or type(error).__name__})') from error


def create_datasets(args: argparse.Namespace, data_config: dict[str, Any]) -> tuple[Any, Any]:
    """Open both splits (the validation split is None without --val-split), and check that they belong together."""
    img_mode = args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L')
    train = create_split(args, args.train_split, True, img_mode)
    validation = create_split(args, args.val_split, False, img_mode) if args.val_split else None
    check_classes(args, train, validation)
    return train, validation


def class_names(dataset: Any) -> list[str] | None:
    """Names of a dataset's classes in order, if it tells them."""
    reader = getattr(dataset, 'reader', None)
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)  # a folder, a tar
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    names = getattr(dataset, 'classes', None)
    return [str(name) for name in names] if names else None


def check_classes(args: argparse.Namespace, train: Any, validation: Any) -> None:
    """Refuse a folder without classes, splits with different classes, and a classifier that is too small."""
    names = class_names(train)
    if dataset_kind(args) == 'folder':
        if names in (None, ['']):
            raise ReparamError(
                f'{args.data_dir}: no classes; expected one folder of images for each class, in {args.train_split}/ '
                f'and {args.val_split or "validation"}/'
            )
        _check_split_folders(args, train, validation)
        if validation is not None and class_names(validation) != names:
            differing = sorted(set(names) ^ set(class_names(validation) or ()))
            raise ReparamError(
                f'{args.data_dir}: the splits have different classes ({", ".join(differing[:5])}), labels would '
                'not mean the same; make the folders equal, or give --class-map'
            )
    if names is None:
        return
    if len(names) > args.num_classes:
        raise ReparamError(f'--num-classes {args.num_classes}: the dataset has {len(names)} classes; give that number')
    if len(names) < args.num_classes:
        _logger.warning('the classifier has %d outputs for %d classes; see --num-classes', args.num_classes, len(names))


def _check_split_folders(args: argparse.Namespace, train: Any, validation: Any) -> None:
    """timm falls back to the whole folder where it finds no split: never train or validate on that unnoticed."""
    roots = [getattr(getattr(dataset, 'reader', None), 'root', None) for dataset in (train, validation)]
    whole, named = roots[0] == args.data_dir, args.train_split != 'train'
    if roots[0] == roots[1]:
        _logger.warning('%s: no folders of splits; validating on the training images', args.data_dir)
    elif whole and (named or validation is not None):  # which holds the validation images, too
        raise ReparamError(f'{args.data_dir}: no split {args.train_split!r}; name its folder with --train-split')
    elif whole and os.path.isdir(args.data_dir):
        _logger.warning('%s: no folder %r; training on the images of all folders', args.data_dir, args.train_split)
    elif roots[1] == args.data_dir:
        raise ReparamError(
            f'{args.data_dir}: no split {args.val_split!r}; name it with --val-split, or train without (--val-split "")'
        )


def mixup_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """Arguments of timm's mixup, or None if it is off."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return None
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )


def common_loader_options(run: 'Run') -> dict[str, Any]:
    """Arguments that both loaders share."""
    return dict(
        input_size=run.data_config['input_size'],
        mean=run.data_config['mean'],
        std=run.data_config['std'],
        pin_memory=run.args.pin_mem,
        img_dtype=run.model_dtype or torch.float32,
        device=run.device,
        distributed=run.args.distributed,
        use_prefetcher=not run.args.no_prefetcher,
    )


def create_train_loader(run: 'Run', dataset: Any) -> Any:
    """Loader of augmented training batches."""
    args = run.args
    options = mixup_options(args)
    collate_fn = None
    with named_errors('--mixup, --cutmix'):
        if options and not args.no_prefetcher:
            collate_fn = FastCollateMixup(**options)
        elif options:
            run.mixup = Mixup(**options)
    if args.aug_splits:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = run.data_config['interpolation']
    with named_errors('the training loader cannot be made'):
        return create_loader(
            dataset,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            re_split=args.resplit,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            num_aug_splits=args.aug_splits,
            interpolation=interpolation,
            num_workers=args.workers,
            worker_seeding=args.worker_seeding,
            collate_fn=collate_fn,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            # Workers that lived on would keep random states that no checkpoint holds, and would not see mixup go off.
            persistent_workers=False,
            input_size_choices=args.train_img_sizes,
            batch_size_choices=args.train_batch_sizes,
            batch_choice_weights=args.train_size_probs,
            batch_choice_seed=args.seed,
            batch_choice_schedule=args.train_size_schedule,
            batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
            batch_schedule_spread=args.train_size_schedule_spread,
            batch_schedule_random_mix=args.train_size_random_mix,
            num_batches=args.train_batches_per_epoch,
            **common_loader_options(run),
        )


def create_validation_loader(run: 'Run', dataset: Any) -> Any:
    """Loader of validation batches."""
    args = run.args
    workers = args.workers
    if args.distributed and dataset_kind(args) in STREAMS:
        workers = min(2, workers)  # every worker of a stream pads its share: few workers, little padding
    with named_errors('the validation loader cannot be made'):
        return create_loader(
            dataset,
            batch_size=args.validation_batch_size or args.batch_size,
            is_training=False,
            interpolation=run.data_config['interpolation'],
            crop_pct=run.data_config['crop_pct'],
            num_workers=workers,
            **common_loader_options(run),
        )


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell everything that shuffles which epoch it is."""
    for part in (loader.dataset, loader.batch_sampler, loader.sampler):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)


# --------------------------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------------------------


def model_name(args: argparse.Namespace) -> str:
    """Name of the architecture to train, registered with timm if it was not."""
    if ':' in args.model:
        if args.variant:
            raise ReparamError(
                f'--variant {args.variant}: converts architectures by name, as resnet18.a1_in1k, not {args.model}'
            )
        return args.model
    architecture, dot, tag = args.model.partition('.')
    stock, _, suffix = architecture.rpartition('_')
    if suffix in VARIANTS and args.variant in (None, suffix):
        wanted = (stock, suffix)
    elif suffix in VARIANTS:
        raise ReparamError(
            f'--variant {args.variant}: {architecture} is a variant already; give the stock architecture, {stock}'
        )
    elif args.variant:
        wanted = (architecture, args.variant)
    else:
        return args.model
    name = '_'.join(wanted)
    return (name if timm.is_model(name) else register_variant(*wanted)) + dot + tag


def create_model(args: argparse.Namespace) -> nn.Module:
    """Create the model, and adjust its classifier's start as asked."""
    name = model_name(args)
    conv_options = {**args.model_kwargs.get('conv_options', {}), **args.conv_options}
    if conv_options and ':' not in name and name.partition('.')[0].rpartition('_')[2] not in VARIANTS:
        raise ReparamError(f'--conv-options: {name} has no convolutions of this package; add --variant')
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        raise ReparamError(f'--model {name}: no architecture of timm, nor a variant of one; see timm.list_models()')
    overlay = None
    if args.pretrained_path:
        path = Path(args.pretrained_path)
        file = path / 'model.safetensors' if path.is_dir() else path
        if not file.is_file():
            raise ReparamError(f'--pretrained-path {file}: no such file')
        overlay = dict(file=str(file), num_classes=-1)  # -1: whatever the checkpoint's classifier is, it gets adapted
    with passed_on_warnings(args), named_errors(f'--model {args.model}'):
        model: Any = timm.create_model(  # with methods that nn.Module does not know of
            name,
            pretrained=args.pretrained or bool(args.pretrained_path),
            pretrained_cfg_overlay=overlay,
            in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            scriptable=args.torchscript,
            **{**args.model_kwargs, **({'conv_options': conv_options} if conv_options else {})},
        )
    if args.initial_checkpoint:
        load_initial_checkpoint(model, args.initial_checkpoint)
    if args.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(args.head_init_scale)
            model.get_classifier().bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    if args.grad_checkpointing:
        with named_errors(f'--grad-checkpointing, {name}'):
            model.set_grad_checkpointing(enable=True)
    return model


@contextmanager
def named_errors(place: str) -> Iterator[None]:
    """Say which flags an error of timm is about."""
    try:
        yield
    except ReparamError:
        raise
    except TIMM_ERRORS as error:
        raise ReparamError(f'{place}: {one_line(error)} ({type(error).__name__})') from error


@contextmanager
def passed_on_warnings(args: argparse.Namespace) -> Iterator[None]:
    """Log what is warned of while the model is made: once, and not about a start that a checkpoint replaces."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        yield
    if not args.resume and not args.initial_checkpoint:
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            _logger.warning(message)


def load_initial_checkpoint(model: nn.Module, path: str) -> None:
    """Load a checkpoint of exactly this architecture, or of the stock one, which its layers take as a lift."""
    try:
        load_checkpoint(model, path)
    except FileNotFoundError as error:
        raise ReparamError(f'--initial-checkpoint {path}: no such file') from error
    except RuntimeError as error:
        raise ReparamError(
            f'--initial-checkpoint {path}: not of {architecture_of(model)}, nor of its stock architecture; weights for '
            f'another number of classes are for --pretrained-path. {error}'
        ) from error


def architecture_of(model: nn.Module) -> str:
    """Name under which timm creates the model."""
    cfg: Any = model.pretrained_cfg
    return cfg['architecture']


def dynamic_layers(model: nn.Module) -> list[DynamicConv2d]:
    """Layers with a temperature schedule."""
    return [m for m in model.modules() if isinstance(m, DynamicConv2d) and m.temperature_position is not None]


def set_temperature_schedule(run: 'Run') -> None:
    """Let the attention of dynamic convolutions anneal over 10 epochs, or the first third of a shorter run.

    The layers count their forward passes, so with gradient accumulation several make an update. A length that the user
    gave stays, and so does a schedule that a loaded checkpoint has begun.
    """
    given = {**run.args.model_kwargs.get('conv_options', {}), **run.args.conv_options}
    if 'temperature_steps' in given:
        return
    steps = max(1, round(len(run.train_loader) * min(10, run.num_epochs / 3)))
    fresh = [layer for layer in dynamic_layers(run.model) if layer.temperature_position == 0]
    for layer in fresh:
        layer.reset_temperature(steps)
    if fresh:
        _logger.info('temperature of %d dynamic convolutions: down to 1 over %d forward passes', len(fresh), steps)


# --------------------------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything a run consists of, filled in from top to bottom by `prepare`."""

    args: argparse.Namespace
    settings: dict[str, Any]  # the arguments as they were given, before anything was worked out from them
    device: torch.device
    data_config: dict[str, Any] = field(default_factory=dict)
    model: nn.Module = field(init=False)  # plain module whose state is saved; what trains may be a wrapper around it
    form: nn.Module = field(init=False)  # a copy of it as it was created, for fusing, verifying and saving
    model_dtype: torch.dtype | None = None
    autocast: Callable = nullcontext
    scaler: utils.NativeScaler | None = None
    mixup: Mixup | None = None
    datasets: tuple = ()
    train_loader: Any = field(init=False)
    validation_loader: Any = None
    batch_size_reference: float = 0.0
    task: TrainingTask = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    scheduler: Any = None
    num_epochs: int = 0  # of the schedule; --stop-epoch ends the run before
    updates_per_epoch: int = 0
    ema: utils.ModelEmaV3 | None = None
    output_dir: Path = field(init=False)  # this and the next in the first process only
    saver: utils.CheckpointSaver = field(init=False)
    # the position
    epoch: int = 0
    next_batch: int = 0
    losses: utils.AverageMeter = field(default_factory=utils.AverageMeter)
    random_states: list[dict] = field(default_factory=list)

    @property
    def is_primary(self) -> bool:
        return utils.is_primary(self.args)

    @property
    def trained_module(self) -> nn.Module:
        """What the optimizer trains: the model, or a wrapper around it."""
        module = self.task.get_trainable_module()
        assert module is not None  # only an average may be missing
        return module

    @property
    def has_variant(self) -> bool:
        return any(is_variant(module) for module in self.form.modules())

    @property
    def validates_ema(self) -> bool:
        return self.args.model_ema and not self.args.model_ema_force_cpu

    @property
    def end(self) -> int:
        return self.args.stop_epoch or self.num_epochs

    @property
    def metric(self) -> str:
        return self.args.eval_metric if self.validation_loader is not None else 'loss'


def choose_device(args: argparse.Namespace) -> torch.device:
    """Join the other processes, if any, and take the device that was asked for, or the best there is."""
    if 'LOCAL_RANK' not in os.environ and args.local_rank:
        os.environ['LOCAL_RANK'] = str(args.local_rank)
    asked = args.device
    with named_errors(f'--device {asked}'):
        torch.device(asked or 'cpu')
    if asked is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        args.device = 'cpu' if accelerator is None else accelerator.type
    elif torch.device(asked).type == 'cuda' and not torch.cuda.is_available():
        raise ReparamError(f'--device {asked}: there is no CUDA device here; give --device cpu, or leave the flag out')
    device = utils.init_distributed_device(args)
    if not utils.is_primary(args):
        logging.getLogger().setLevel(logging.ERROR)
    note = ', no accelerator was found' if asked is None and device.type == 'cpu' else ''
    _logger.info('device: %s, process %d of %d%s', device, args.rank, args.world_size, note)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device


def prepare(args: argparse.Namespace) -> Run:
    """Build everything a run needs. Nothing is written before all of it stands."""
    settings = {key: value for key, value in vars(args).items() if key not in ('config', 'verbose')}
    run = Run(args=args, settings=settings, device=choose_device(args))
    utils.random_seed(args.seed, args.rank)
    if args.fast_norm:
        set_fast_norm()

    run.model = create_model(args)
    try:
        run.data_config = resolve_input_data_config(run.model, vars(args))
    except ValueError as error:
        raise ReparamError(
            f'--model {args.model}: {error} See --img-size, --input-size and --in-chans, and whether the model takes '
            '--model-kwargs img_size=N'
        ) from error
    if run.is_primary:
        check_zoo(args, architecture_of(run.model))
        if args.publish and variant_of(run.model) is None:
            raise ReparamError(f'--publish: publishes both forms, {args.model} has one; add --variant')
        if args.publish:
            check_publish(run)
        parameters = sum(p.numel() for p in run.model.parameters())
        _logger.info('model: %s, %s parameters to train', architecture_of(run.model), f'{parameters:,}')
    set_precision(run)
    place_model(run)

    run.datasets = create_datasets(args, run.data_config)
    run.train_loader = create_train_loader(run, run.datasets[0])
    if len(run.train_loader) == 0:
        raise ReparamError(
            f'--batch-size {args.batch_size}: larger than the training split ({len(run.datasets[0])} images)'
        )
    if run.datasets[1] is not None:
        run.validation_loader = create_validation_loader(run, run.datasets[1])
    sampler = run.train_loader.batch_sampler
    run.batch_size_reference = getattr(sampler, 'average_batch_size', float(args.batch_size))
    set_learning_rate(run)

    run.task = create_task(run, create_loss(args).to(run.device))
    try:
        run.optimizer = create_optimizer_v2(run.trained_module, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
        run.updates_per_epoch = -(-len(run.train_loader) // args.grad_accum_steps)
        run.scheduler, run.num_epochs = create_scheduler_v2(
            run.optimizer,
            **scheduler_kwargs(args, decreasing_metric=run.metric == 'loss'),
            updates_per_epoch=run.updates_per_epoch,
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ReparamError(f'--opt {args.opt}, --sched {args.sched}: {error}') from error
    if run.end > run.num_epochs:
        raise ReparamError(f'--stop-epoch {args.stop_epoch}: the schedule has {run.num_epochs} epochs; give fewer')
    if args.start_epoch is not None and args.start_epoch >= run.end:
        raise ReparamError(f'--start-epoch {args.start_epoch}: nothing left to train, there are {run.end} epochs')
    set_temperature_schedule(run)
    if args.model_ema and (run.is_primary or not args.model_ema_force_cpu):
        run.ema = utils.ModelEmaV3(
            run.model,
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )

    path, checkpoint = find_checkpoint(args)
    if path is not None and checkpoint is not None:
        resume(run, path, checkpoint)
    elif args.start_epoch is not None:
        run.epoch = args.start_epoch
    set_schedule_position(run)
    wrap_model(run)
    if run.is_primary:
        open_output(run, path, checkpoint)
    return run


def check_zoo(args: argparse.Namespace, architecture: str) -> None:
    """Check, before hours of training, that both forms can be saved at the end."""
    try:
        check_pair(architecture, args.zoo, tag=result_tag(args))
    except ReparamError as error:
        raise ReparamError(
            f'--zoo {args.zoo}: {error}; the folder that holds it has to exist, see also --tag'
        ) from error


def check_publish(run: Run) -> None:
    """Check, before hours of training, the names and the licence by the rules of publishing."""
    args, model = run.args, run.model
    cfg: Any = model.pretrained_cfg
    flag = '--publish'
    try:
        check_repo_id(f'{args.publish}/{folder_name(architecture_of(model), result_tag(args), True)}')
        flag = '--license'
        missing_license([dict(base_model=base_model_facts(vars(args), cfg))], args.license)
    except ReparamError as error:
        raise ReparamError(f'{flag} {getattr(args, flag[2:])}: {error}') from error


def set_precision(run: Run) -> None:
    """Set up mixed or low precision."""
    args = run.args
    if args.model_dtype:
        run.model_dtype = getattr(torch, args.model_dtype)
    if args.amp:
        run.autocast = partial(torch.autocast, device_type=run.device.type, dtype=getattr(torch, args.amp_dtype))
        if args.amp_dtype == 'float16' and run.device.type == 'cuda':
            run.scaler = utils.NativeScaler(device=run.device.type)


def place_model(run: Run) -> None:
    """Put the model on its device, keep a copy of it in this form, and replace its batch norms as asked."""
    args = run.args
    run.model.to(device=run.device, dtype=run.model_dtype)
    if args.channels_last:
        run.model.to(memory_format=torch.channels_last)
    run.form = copy.deepcopy(run.model).eval()
    if args.split_bn:
        run.model = convert_splitbn_model(run.model, max(args.aug_splits, 2))
    if args.sync_bn and args.distributed:
        if run.device.type == 'cpu':
            raise ReparamError('--sync-bn: PyTorch synchronises batch norms on accelerators only; leave it out')
        args.dist_bn = ''  # the statistics are the same in all processes already
        run.model = convert_sync_batchnorm(run.model)


def set_learning_rate(run: Run) -> None:
    """Work out the learning rate from --lr-base, unless --lr gives it."""
    args = run.args
    if args.lr:
        return
    images = run.batch_size_reference * args.world_size * args.grad_accum_steps
    adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    ratio = images / args.lr_base_size
    args.lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
    _logger.info('learning rate: %g, for %g images an update (%s scaling)', args.lr, images, scale)


def loss_type(args: argparse.Namespace) -> str | None:
    """The loss that --loss, or a flag older than it, asks for."""
    return args.loss or ('jsd' if args.jsd_loss else 'bce' if args.bce_loss else None)


def create_loss(args: argparse.Namespace) -> nn.Module:
    """Loss of the training."""
    given: dict[str, Any] = dict(
        bce_target_thresh=args.bce_target_thresh,
        asl_gamma_pos=args.asl_gamma_pos,
        asl_gamma_neg=args.asl_gamma_neg,
        poly_epsilon=args.poly_epsilon,
    )
    try:
        stats = load_class_stats(args.class_stats)
        weigh = partial(
            resolve_class_weights,
            class_stats=stats,
            power=args.loss_weight_power,
            beta=args.loss_weight_beta,
            max_weight=args.loss_weight_max,
        )
        weights: dict[str, Any] = dict(
            class_weight=weigh(args.loss_class_weight, 'class_weight'),
            pos_weight=weigh(args.loss_pos_weight or args.bce_pos_weight, 'pos_weight'),
        )
        for name, weight in weights.items():
            if isinstance(weight, torch.Tensor) and len(weight) != args.num_classes:
                raise ValueError(f'{name}: expected {args.num_classes} weights, one a class, got {len(weight)}')
        return create_classification_loss(
            loss_type(args),
            smoothing=args.smoothing,
            soft_targets=mixup_options(args) is not None,  # mixing smooths the labels itself
            jsd_splits=args.aug_splits,
            bce_sum=args.bce_sum,
            **weights,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (OSError, ValueError) as error:
        raise ReparamError(f'--loss {loss_type(args) or "ce"}: {error}') from error


def create_task(run: Run, loss: nn.Module) -> TrainingTask:
    """The training step's forward pass: classification, or distillation from a teacher."""
    args = run.args
    common: dict[str, Any] = dict(criterion=loss, device=run.device, dtype=run.model_dtype, verbose=run.is_primary)
    if args.kd_model_name is None:
        return ClassificationTask(run.model, **common)
    common.update(
        student_model=run.model,
        teacher_model=args.kd_model_name,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    with named_errors(f'--kd-model-name {args.kd_model_name}, --kd-distill-type {args.kd_distill_type}'):
        if args.kd_distill_type == 'logit':
            return LogitDistillationTask(**common, loss_type=args.kd_loss_type, temperature=args.kd_temperature)
        if args.kd_distill_type == 'feature':
            return FeatureDistillationTask(
                **common,
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
            )
        return TokenDistillationTask(**common, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature)


def wrap_model(run: Run) -> None:
    """Script, compile and distribute what trains. The plain model shares its parameters and buffers."""
    args = run.args
    if args.torchscript:
        run.task.trainable_module = torch.jit.script(run.trained_module)
    if args.torchcompile:
        run.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    if args.distributed:
        share_frozen_kernels(run)
        device_ids = None if run.device.type == 'cpu' else [run.device]
        run.task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not args.no_ddp_bb)


def share_frozen_kernels(run: Run) -> None:
    """Copy RefConv's frozen kernels from the first process to the others, once.

    They are buffers, which DistributedDataParallel would send at every step.
    """
    frozen = [m.weight for m in run.model.modules() if is_variant(m) and not isinstance(m.weight, nn.Parameter)]
    for kernel in frozen:
        dense = kernel.contiguous()
        dist.broadcast(dense, 0)
        kernel.copy_(dense)
    addresses = {kernel.data_ptr() for kernel in frozen}
    module = run.trained_module
    names = [name for name, buffer in module.named_buffers() if buffer.data_ptr() in addresses]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


class Saver(utils.CheckpointSaver):
    """timm's checkpoint saver, of which a kill leaves the previous file or the new one, at every moment."""

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                os.unlink(save_path)
            raise ReparamError(
                f'{self.checkpoint_dir}: the checkpoint of epoch {epoch} cannot be written ({error}); the last one is '
                'still good; make room, then --resume from it'
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        partial_file = f'{dst}.partial'
        if os.path.exists(partial_file):
            os.unlink(partial_file)
        try:
            os.link(src, partial_file)
        except OSError:  # a file system without hard links
            shutil.copy2(src, partial_file)
        os.replace(partial_file, dst)
        if os.path.exists(partial_file):  # both were the same file already
            os.unlink(partial_file)


class CheckpointState:
    """What a checkpoint holds: the entries of timm's checkpoints, and the position of the run in `train_state`.

    Plain values and tensors only, so torch.load(weights_only=True) reads it, and so do timm's loaders.
    """

    def __init__(self, run: Run):
        self.run = run

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = None) -> dict[str, Any]:
        run = self.run
        if ema:
            return {} if run.ema is None else dict(state_dict_ema=run.ema.module.state_dict())
        record_options(run.model)
        state = dict(
            arch=architecture_of(run.model),
            model_args=get_model_args(run.model),
            args=run.settings,
            state_dict=run.model.state_dict(),
        )
        if task_state := run.task.get_task_state():
            state['task_state'] = task_state
        plateau = getattr(run.scheduler, 'lr_scheduler', None)
        state['train_state'] = dict(
            epoch=run.epoch,
            next_batch=run.next_batch,
            losses=(float(run.losses.sum), int(run.losses.count)),
            random_states=run.random_states,
            plateau=None if plateau is None else plateau.state_dict(),
            restore_lr=getattr(run.scheduler, 'restore_lr', None),
        )
        return state


def open_output(run: Run, path: Path | None, checkpoint: dict[str, Any] | None) -> None:
    """Make the folder of the run, with its args.yaml and summary.csv, and take over the history of what is resumed."""
    args = run.args
    run.output_dir = make_output_folder(run, path)
    run.saver = Saver(
        model=run.model,
        optimizer=run.optimizer,
        amp_scaler=run.scaler,
        checkpoint_dir=str(run.output_dir),
        recovery_dir=str(run.output_dir),
        decreasing=run.metric == 'loss',
        max_history=args.checkpoint_hist,
        task=CheckpointState(run),
    )
    if path is not None and checkpoint is not None:
        restore_history(run, path, checkpoint)
        # the next recovery checkpoints replace those that are left
        left = sorted(run.output_dir.glob('recovery-*.pth.tar'), key=lambda file: file.stat().st_mtime)
        run.saver.prev_recovery_file, run.saver.curr_recovery_file = ['', '', *map(str, left)][-2:]
    utils.trim_summary(str(run.output_dir / 'summary.csv'), run.epoch)
    if args.log_wandb:
        start_wandb(run)


def output_root(args: argparse.Namespace) -> Path:
    return Path(args.output or 'output/train')


def make_output_folder(run: Run, resumed: Path | None) -> Path:
    """Make the folder of the run. One in which another run has begun is left alone."""
    args = run.args
    try:
        if args.experiment:
            folder = output_root(args) / args.experiment
        elif resumed and not args.output:
            folder = resumed.parent
        else:
            side = run.data_config['input_size'][-1]
            moment = datetime.now().strftime('%Y%m%d-%H%M%S')
            folder = output_root(args) / f'{moment}-{safe_model_name(architecture_of(run.model))}-{side}'
            folder = make_new_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        is_resumed = resumed is not None and resumed.parent.samefile(folder)
        # --resume auto also takes up a run that was killed before its first checkpoint
        may_exist = is_resumed or args.resume == 'auto'
        if (checkpoints_in(folder) and not is_resumed) or not write_settings(run, folder, may_exist):
            raise ReparamError(
                f'--experiment {args.experiment}: another run has begun in {folder}; --resume auto goes on with it, or '
                'name another'
            )
    except OSError as error:
        raise ReparamError(f'--output {folder}: cannot be written ({error.strerror})') from error
    _logger.info('checkpoints: %s', folder)
    return folder


def make_new_folder(folder: Path) -> Path:
    """Make a folder of this name or, where there is one, with the first free number after it; return it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    name, number = folder.name, 0
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = folder.with_name(f'{name}-{number}')


def write_settings(run: Run, folder: Path, may_exist: bool) -> bool:
    """Write args.yaml; unless there may be one, it claims the folder: False if another run was first."""
    path = folder / 'args.yaml'
    try:
        path.touch(exist_ok=may_exist)
    except FileExistsError:
        return False
    draft = folder / 'args.yaml.partial'
    draft.write_text(yaml.safe_dump(run.settings))
    os.replace(draft, path)
    return True


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoint files in the folder of a run."""
    return [path for path in folder.glob('*.pth.tar') if not path.name.endswith('tmp.pth.tar')]


def find_checkpoint(args: argparse.Namespace) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to go on from, and what it holds; nothing if the run is a new one."""
    path = Path(args.resume) if args.resume else None
    if args.resume == 'auto':
        found = checkpoints_in(output_root(args) / args.experiment) if utils.is_primary(args) else []
        path = max(found, default=None, key=lambda file: position(read_training(file, mmap=True), file))
        if args.distributed:  # the others take what the first process saw
            shared = [path]
            dist.broadcast_object_list(shared, 0)
            path = shared[0]
    return path, None if path is None else read_training(path)


def position(checkpoint: dict[str, Any], path: Path) -> tuple[int, int]:
    """Epoch and batch with which a run goes on from a checkpoint."""
    state = checkpoint.get('train_state')
    if state is not None:
        found = state.get('epoch'), state.get('next_batch')
        if not all(type(number) is int and number >= 0 for number in found):
            raise ReparamError(
                f'--resume {path}: train_state: expected an epoch and a batch to go on from, got {found!r:.80}; resume '
                'another file'
            )
        return found
    epoch = checkpoint.get('epoch', -1)
    return epoch + (1 if checkpoint.get('version', 1) > 1 or epoch < 0 else 0), 0


def resume(run: Run, path: Path, checkpoint: dict[str, Any]) -> None:
    """Put the run where the checkpoint left it."""
    args = run.args
    check_history(checkpoint.get('saver') or {}, path)
    found = checkpoint.get('arch')
    if found not in (None, architecture_of(run.model), args.model):
        raise ReparamError(f'--resume {path}: holds {found}, not {architecture_of(run.model)}; change --model')
    try:
        load_whole(run.model, checkpoint['state_dict'], path)
        run.task.load_task_state(checkpoint.get('task_state'))
        if run.ema is not None:
            load_whole(run.ema.module, checkpoint.get('state_dict_ema') or checkpoint['state_dict'], path)
        if not args.no_resume_opt and 'optimizer' in checkpoint:
            run.optimizer.load_state_dict(checkpoint['optimizer'])
        if not args.no_resume_opt and run.scaler is not None and run.scaler.state_dict_key in checkpoint:
            run.scaler.load_state_dict(checkpoint[run.scaler.state_dict_key])
        run.epoch, run.next_batch = position(checkpoint, path)
        state = checkpoint.get('train_state')
        if args.start_epoch is not None:
            run.epoch, run.next_batch = args.start_epoch, 0
        elif state is not None:
            restore_position(run, state)
    except ReparamError:
        raise
    except Exception as error:  # a file from elsewhere may hold anything
        raise ReparamError(
            f'--resume {path}: does not fit this model or optimizer ({type(error).__name__}: {error})'
        ) from error
    _logger.info('resumed from %s: epoch %d, batch %d', path, run.epoch, run.next_batch)


def load_whole(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load weights that have every key of the model: a variant would take stock ones, too, as a lift."""
    weights, expected = clean_state_dict(weights), model.state_dict().keys()
    if weights.keys() != expected:
        lacking, strange = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
        raise ReparamError(
            f'--resume {path}: state_dict: does not fit this model, missing: {lacking[:3]}, unexpected: '
            f'{strange[:3]}; weights alone, stock ones too, are for --initial-checkpoint'
        )
    model.load_state_dict(weights)


def restore_position(run: Run, state: dict[str, Any]) -> None:
    """Restore what only this script's checkpoints hold: the running loss, the plateau schedule, all random states."""
    run.random_states = state['random_states']
    if run.next_batch:
        run.losses.sum, run.losses.count = state['losses']
        run.losses.avg = run.losses.sum / max(run.losses.count, 1)  # type: ignore[assignment]  # timm starts at int 0
    plateau = getattr(run.scheduler, 'lr_scheduler', None)
    if plateau is not None and state['plateau'] is not None and not run.args.no_resume_opt:
        plateau.load_state_dict(state['plateau'])
        run.scheduler.restore_lr = state['restore_lr']
    if len(state['random_states']) == run.args.world_size:
        set_random_state(unpack_random_state(state['random_states'][run.args.rank]), run.device)
    else:
        _logger.warning('the checkpoint is of %d processes: random numbers start anew', len(state['random_states']))


def restore_history(run: Run, path: Path, checkpoint: dict[str, Any]) -> None:
    """Restore which checkpoints are kept and which is best, also where the run was killed while it sorted them."""
    saver, saved = run.saver, checkpoint.get('saver')
    if saved is None:
        return
    epoch, metric = saved.get('pending', (None, None))
    if metric is not None:
        kept = saver._checkpoint_path(epoch)
        if not os.path.exists(kept):
            saver._duplicate(str(path), kept)
    # a recovery checkpoint has no metric, and no place in the history
    saver.load_state_dict({**saved, 'pending': (None if metric is None else epoch, metric)})
    saver._cleanup_checkpoints()
    if metric is not None and epoch + 1 in (run.args.save_epochs or ()):
        saver._duplicate(str(path), str(run.output_dir / f'milestone-{epoch + 1}{saver.extension}'))
    candidates = [path.parent / f'{name}{saver.extension}' for name in (f'checkpoint-{saver.best_epoch}', 'model_best')]
    best = next((candidate for candidate in candidates if candidate.exists()), None)
    if best is not None:
        saver._duplicate(str(best), str(run.output_dir / f'model_best{saver.extension}'))


def check_history(saved: dict[str, Any], path: Path) -> None:
    """Check that a history names checkpoints of this folder only: timm's saver deletes the worst of them."""
    try:
        files = [name for name, _ in saved.get('checkpoint_files', ())]
        epoch, metric = saved.get('pending', (None, None))
        numbers = [saved.get('best_metric'), metric, *(metric for _, metric in saved.get('checkpoint_files', ()))]
        right = all(isinstance(name, str) and re.fullmatch(r'checkpoint-\d+\.pth\.tar', name) for name in files)
        right = right and all(each is None or type(each) is int for each in (epoch, saved.get('best_epoch')))
        right = right and all(each is None or type(each) in (int, float) for each in numbers)
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ReparamError(
            f"--resume {path}: saver: expected names such as 'checkpoint-1.pth.tar' with numbers; the file is damaged, "
            'resume another one'
        )


def set_schedule_position(run: Run) -> None:
    """Set the learning rate for the next epoch and update, which all schedules but plateau are functions of."""
    if run.scheduler is None or (run.epoch == 0 and run.next_batch == 0):
        return
    is_plateau = hasattr(run.scheduler, 'lr_scheduler')
    if not is_plateau or run.epoch <= run.args.warmup_epochs:
        run.scheduler.step(run.epoch)
        run.scheduler.step_update(updates_done(run))


def updates_done(run: Run) -> int:
    """Updates of the whole run so far."""
    return run.epoch * run.updates_per_epoch + -(-run.next_batch // run.args.grad_accum_steps)


def gather_random_states(run: Run) -> None:
    """Collect the random states of all processes, for the checkpoint."""
    state = pack_random_state(random_state(run.device))
    run.random_states = [state]
    if run.args.distributed:
        states: list[Any] = [None] * run.args.world_size
        dist.all_gather_object(states, state)
        run.random_states = states


def check_finite(run: Run) -> None:
    """Stop before a checkpoint with NaN or infinity replaces a good one."""
    damaged = [name for name, value in run.model.state_dict().items() if not torch.isfinite(value).all()]
    if damaged:
        raise ReparamError(
            f'NaN or infinity in {len(damaged)} tensors ({", ".join(damaged[:3])}), epoch {run.epoch}; nothing was '
            'saved; lower --lr, or add --clip-grad, and --resume from the last checkpoint'
        )


def start_wandb(run: Run) -> None:
    import wandb

    args = run.args
    wandb.init(
        project=args.wandb_project,
        name=run.output_dir.name,
        config=run.settings,
        tags=args.wandb_tags,
        resume='must' if args.wandb_resume_id else None,
        id=args.wandb_resume_id or None,
    )


# --------------------------------------------------------------------------------------------------------------------
# Training and validation
# --------------------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal; in a log, a line now and then.

    Args:
        label: What is going on.
        total: Number of steps.
        every: Steps between two lines of a log.
        quiet: Show nothing.
    """

    def __init__(self, label: str, total: int, every: int, quiet: bool = False):
        self.label, self.total, self.every, self.quiet = label, max(total, 1), every, quiet
        self.live = sys.stderr.isatty()
        self.start = time.monotonic()
        self.shown = 0.0

    def update(self, done: int, text: str) -> None:
        if self.quiet:
            return
        if self.live:
            now = time.monotonic()
            if now - self.shown < 0.1:  # a terminal is slow
                return
            self.shown = now
            share = min(done / self.total, 1.0)
            left = (now - self.start) * (1 - share) / max(share, 1e-9)
            bar = ('#' * round(20 * share)).ljust(20, '.')
            line = f'{self.label} [{bar}] {done}/{self.total}  {text}  {left:.0f} s left'
            sys.stderr.write(f'\r\033[K{line[: shutil.get_terminal_size().columns - 1]}')
            sys.stderr.flush()
        elif (done - 1) % self.every == 0 or done == self.total:
            _logger.info('%s %*d/%d  %s', self.label, len(str(self.total)), done, self.total, text)

    def close(self) -> None:
        if self.live and not self.quiet:
            sys.stderr.write('\r\033[K')
            sys.stderr.flush()


def prepare_batch(
    run: Run, input: torch.Tensor, target: torch.Tensor, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring a batch to the device, as the prefetcher does, and mix it."""
    if run.args.no_prefetcher:
        input, target = input.to(run.device, run.model_dtype), target.to(run.device)
        if training and run.mixup is not None:
            input, target = run.mixup(input, target)
    if run.args.channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    return input, target


def switch_mixup(run: Run) -> None:
    """Stop mixing from --mixup-off-epoch on."""
    if run.args.mixup_off_epoch and run.epoch >= run.args.mixup_off_epoch:
        if run.mixup is not None:
            run.mixup.mixup_enabled = False
        elif hasattr(run.train_loader, 'mixup_enabled'):
            run.train_loader.mixup_enabled = False


def train_epoch(run: Run) -> dict[str, float]:
    """Train from the run's position to the end of the epoch."""
    args, task, optimizer, loader = run.args, run.task, run.optimizer, run.train_loader
    set_epoch(loader, run.epoch)
    switch_mixup(run)
    run.trained_module.train()
    optimizer.zero_grad()
    num_batches = len(loader)
    # the last update of an epoch may have fewer batches than the others
    last_group = num_batches % args.grad_accum_steps or args.grad_accum_steps
    stream = RandomStream(run.device, TRAINING_DATA, args.seed, run.epoch, args.rank)
    progress = Progress(f'epoch {run.epoch}', run.updates_per_epoch, args.log_interval, quiet=not run.is_primary)
    images, start = 0, time.monotonic()

    for index, input, target in draw(loader, stream, partial(prepare_batch, run, training=True), skip=run.next_batch):
        group = last_group if index >= num_batches - last_group else args.grad_accum_steps
        need_update = index + 1 == num_batches or (index + 1) % args.grad_accum_steps == 0
        with nullcontext() if need_update else task.no_sync():
            with run.autocast():
                loss = task(input, target)['loss']
            value = loss.item()
            if not math.isfinite(value):
                raise ReparamError(
                    f'epoch {run.epoch}, batch {index}: the loss is {value}; the last checkpoint is still good; lower '
                    '--lr, add --clip-grad or a longer --warmup-epochs, or leave out --amp'
                )
            backward(run, loss * (loss_scale(run, len(input)) / group), need_update)
        run.losses.update(value, len(input))
        images += len(input) * args.world_size
        if not need_update:
            continue

        run.next_batch = index + 1
        optimizer.zero_grad()
        update = index // args.grad_accum_steps
        if run.ema is not None:
            run.ema.update(run.model, step=updates_done(run))
        if args.synchronize_step and run.device.type != 'cpu':
            torch.get_device_module(run.device).synchronize()
        if args.save_images and run.is_primary and update % args.log_interval == 0:
            torchvision.utils.save_image(input, run.output_dir / f'train-batch-{index}.jpg', padding=0, normalize=True)
        rate = f'{images / (time.monotonic() - start):.0f} images/s'
        progress.update(update + 1, f'loss {run.losses.avg:.4f}  lr {learning_rate(optimizer):.2e}  {rate}')
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=updates_done(run), metric=run.losses.avg)
        if args.recovery_interval and (update + 1) % args.recovery_interval == 0 and index + 1 < num_batches:
            save_recovery(run, update)

    progress.close()
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    loss = run.losses.avg
    if args.distributed:
        loss = utils.reduce_tensor(torch.tensor([loss], device=run.device), args.world_size).item()
    return dict(loss=loss)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def loss_scale(run: Run, batch_size: int) -> float:
    """Weight of a batch whose size is not the usual one."""
    mode = run.args.variable_batch_loss_scale
    if mode == 'none' or run.args.train_img_sizes is None:
        return 1.0
    ratio = batch_size / run.batch_size_reference
    return ratio if mode == 'linear' else ratio**0.5


def backward(run: Run, loss: torch.Tensor, need_update: bool) -> None:
    """Backward pass and, when the gradients of an update are complete, the update."""
    args = run.args
    create_graph = getattr(run.optimizer, 'is_second_order', False)
    parameters = clipped_parameters(run) if args.clip_grad is not None and need_update else None
    if run.scaler is not None:
        run.scaler(
            loss,
            run.optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=parameters,
            create_graph=create_graph,
            need_update=need_update,
        )
        return
    loss.backward(create_graph=create_graph)
    if need_update:
        if parameters is not None:
            utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        run.optimizer.step()


def clipped_parameters(run: Run) -> list[nn.Parameter]:
    """Parameters whose gradients are clipped.

    Adaptive clipping allows a gradient in proportion to the parameter. The parameters that a variant adds start at or
    near zero, where that would all but freeze them: they are exempt, like the classifier.
    """
    adaptive = run.args.clip_mode == 'agc'
    parameters = list(run.task.get_clip_parameters(exclude_head=adaptive))
    if not adaptive:
        return parameters
    added = {
        parameter.data_ptr()
        for module in run.model.modules()
        if is_variant(module)
        for name, parameter in module.named_parameters()
        if name not in ('weight', 'bias')
    }
    return [parameter for parameter in parameters if parameter.data_ptr() not in added]


def save_recovery(run: Run, update: int) -> None:
    """Write a recovery checkpoint in the middle of an epoch."""
    gather_random_states(run)
    if run.is_primary:
        check_finite(run)
        run.saver.save_recovery(run.epoch, batch_idx=update)


def take_form(run: Run, state_dict: dict[str, torch.Tensor]) -> tuple[nn.Module, nn.Module]:
    """Put weights of the trained model, or of its average, into its plain form; return that and its fusion."""
    # auxiliary batch norms of --split-bn serve training only
    run.form.load_state_dict({name: value for name, value in state_dict.items() if '.aux_bn.' not in name})
    fused = fuse_model(run.form) if run.has_variant else run.form
    if run.args.channels_last:
        fused.to(memory_format=torch.channels_last)
    return run.form, fused.eval()


def verify_on(
    run: Run, model: nn.Module, fused: nn.Module, inputs: Callable[[], Iterable[torch.Tensor]], where: str
) -> FusionReport:
    """Compare both forms with each other; a fusion that is not verified is the end of the run."""

    def pieces() -> Iterator[torch.Tensor]:  # small ones, because the exact copies compute in float64
        return (piece for batch in inputs() for piece in batch.split(VERIFY_BATCH))

    report = verify_fusion(model, fused, inputs=pieces())
    if not report.passed and report.num_inputs < NOISE_IMAGES:
        # the largest of a few rounding errors is a matter of luck, so look at more of them
        report = verify_fusion(model, fused, inputs=(*pieces(), *noise_images(run).split(VERIFY_BATCH)))
    if not report.passed:
        raise ReparamError(f'{where}: the fused copy is not the model that trains; {report}')
    return report


def noise_images(run: Run) -> torch.Tensor:
    """Seeded noise in the shape of a batch."""
    noise = torch.randn(NOISE_IMAGES, *run.data_config['input_size'], generator=torch.Generator().manual_seed(0))
    return noise.to(run.device, run.model_dtype)


@torch.no_grad()
def validate(run: Run, source: nn.Module, label: str = '') -> dict[str, float]:
    """Accuracy on the validation split, measured on a fused copy; its first batch goes through both forms."""
    args, loader = run.args, run.validation_loader
    # fusing draws the random start of new layers: not from the numbers that training draws from
    stream = RandomStream(run.device, VALIDATION, args.seed, args.rank)
    with stream:
        model, fused = take_form(run, source.state_dict())
    evaluator = run.task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    progress = Progress(
        f'validation{label}', len(loader), args.log_interval, quiet=not run.is_primary or not sys.stderr.isatty()
    )
    for index, input, target in draw(loader, stream, partial(prepare_batch, run, training=False)):
        if index == 0 and run.is_primary and run.has_variant:
            with stream:
                report = verify_on(run, model, fused, lambda: [input], f'epoch {run.epoch}')  # noqa: B023
            _logger.debug('epoch %d: %s', run.epoch, report)
        with run.autocast():
            output = fused(input)
        evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, target)
        progress.update(index + 1, f'top-1 {evaluator.summary()["top1"]:.2f}' if progress.live else '')
    progress.close()
    return dict(evaluator.compute(distributed=args.distributed))


def distribute_statistics(run: Run, model: nn.Module) -> None:
    """Make the running statistics of all processes equal."""
    if run.args.distributed and run.args.dist_bn:
        utils.distribute_bn(model, run.args.world_size, run.args.dist_bn == 'reduce')


def train(run: Run) -> None:
    """Train epoch after epoch, with validation, summary and checkpoint after each."""
    args = run.args
    if args.use_multi_epochs_loader:
        _logger.warning('--use-multi-epochs-loader: a resumed run will not repeat this one exactly')
    while run.epoch < run.end:
        epoch, start = run.epoch, time.monotonic()
        train_metrics = train_epoch(run)
        distribute_statistics(run, run.model)
        validation_metrics = None
        is_milestone = epoch + 1 in (args.save_epochs or ())
        due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == run.end or is_milestone
        if due and run.validation_loader is not None:
            validation_metrics = validate(run, run.model)
            if run.ema is not None and run.validates_ema:
                distribute_statistics(run, run.ema.module)
                validation_metrics = validate(run, run.ema.module, label=' of the average')
        metric = (validation_metrics or train_metrics)[run.metric] if due else None
        if run.is_primary:
            report_epoch(run, train_metrics, validation_metrics, time.monotonic() - start, write=due)

        run.epoch, run.next_batch = epoch + 1, 0
        run.losses.reset()
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, metric)
        if due:
            gather_random_states(run)
            if run.is_primary:
                check_finite(run)
                run.saver.save_checkpoint(epoch, metric=metric)
                if is_milestone:
                    run.saver.save_milestone(epoch + 1)


def report_epoch(
    run: Run, train: dict[str, float], validation: dict[str, float] | None, seconds: float, write: bool
) -> None:
    """Log an epoch and add it to summary.csv."""
    lr = learning_rate(run.optimizer)
    text = f'epoch {run.epoch}: loss {train["loss"]:.4f}, lr {lr:.2e}'
    if validation is not None:
        text += ', validation loss {loss:.4f}, top-1 {top1:.2f}, top-5 {top5:.2f}'.format(**validation)
    _logger.info('%s, %.1f s', text, seconds)
    if write:
        file = str(run.output_dir / 'summary.csv')
        utils.update_summary(run.epoch, train, validation, filename=file, lr=lr, log_wandb=run.args.log_wandb)


# --------------------------------------------------------------------------------------------------------------------
# The result
# --------------------------------------------------------------------------------------------------------------------


def finish(run: Run) -> str:
    """Fuse the best checkpoint, verify it on the whole validation set, save both forms; return a table of them."""
    args = run.args
    model, fused = take_form(run, best_weights(run))
    if args.channels_last:  # both are saved, and measured, in the ordinary order
        args.channels_last = False
        model.to(memory_format=torch.contiguous_format)
        fused.to(memory_format=torch.contiguous_format)
    metrics, difference = compare_forms(run, model, fused)
    zoo, tag, input_size = Path(args.zoo), result_tag(args), run.data_config['input_size']

    if not run.has_variant:
        zoo.mkdir(exist_ok=True)
        profiles = compare_profiles(model, input_size=input_size)
        folder = zoo / folder_name(architecture_of(model), tag, False)
        facts = {**training_facts(run, metrics, difference, profiles), 'tag': tag}
        save_checkpoint(model, folder, facts=facts, data_config=run.data_config)
        accuracy = f'top-1: {metrics[0]["top1"]:.2f} %\n' if metrics else ''
        return f'{format_profiles(profiles)}\n{accuracy}\nsaved, a stock model with nothing to fuse: {folder}'

    report = verify_on(run, model, fused, lambda: (x for x, _ in validation_batches(run)), 'the best checkpoint')
    _logger.info('%s', report)
    profiles = compare_profiles(model, fused, input_size=input_size)
    facts = training_facts(run, metrics, difference, profiles)
    folders = save_pair(model, zoo, tag=tag, fused=fused, report=report, facts=facts, data_config=run.data_config)
    top1 = (metrics[0]['top1'], metrics[1]['top1']) if metrics else None
    worst = report.worst_layer
    table = format_comparison(
        *profiles,
        top1=top1,
        logit_difference=difference,
        layer_difference=None if worst is None else worst.stored,
    )
    note = ' (dynamic convolutions stay, in their form for inference)' if dynamic_layers(model) else ''
    return f'{table}\n\nsaved, train-time form: {folders[0]}\nsaved, fused form:      {folders[1]}{note}'


def publish_result(run: Run) -> str:
    """Publish both saved forms; return what became of them."""
    folder = Path(run.args.zoo) / folder_name(architecture_of(run.form), result_tag(run.args), False)
    limit_requests(60.0)  # of this process, which is ours
    return str(publish(folder, run.args.publish, license=run.args.license))


def leave_other_processes(run: Run) -> None:
    """End the collective work: the first process does the rest alone."""
    if not run.args.distributed:
        return
    dist.barrier()
    end_process_group(run)
    run.args.distributed = False
    if run.is_primary and run.datasets[1] is not None:
        run.validation_loader = create_validation_loader(run, run.datasets[1])


def end_process_group(run: Run | None) -> None:
    """End the process group and its threads: one that lets go of a tensor while Python shuts down is an abort."""
    if run is not None and isinstance(run.task.trainable_module, nn.parallel.DistributedDataParallel):
        run.task.trainable_module = run.task.trainable_module.module
        gc.collect()  # the wrapper holds the group, and is part of reference cycles
    dist.destroy_process_group()


def best_weights(run: Run) -> dict[str, torch.Tensor]:
    """Weights of the best checkpoint: the average, if that is what was validated."""
    for name in ('model_best', 'last'):
        path = run.output_dir / f'{name}.pth.tar'
        if path.exists():
            checkpoint = read_training(path)
            metric = checkpoint.get('metric')
            measured = '' if metric is None else f', {run.metric} {metric:.4g}'
            _logger.info('best checkpoint: epoch %d%s', checkpoint['epoch'], measured)
            return checkpoint['state_dict_ema' if run.validates_ema else 'state_dict']
    _logger.warning('no epoch was trained: the result is what the model started as')
    return run.model.state_dict()


def validation_batches(run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The batches of the validation split; without one, seeded noise, and no targets."""
    if run.validation_loader is None:
        yield noise_images(run), None
        return
    stream = RandomStream(run.device, VALIDATION, run.args.seed)
    for _, input, target in draw(run.validation_loader, stream, partial(prepare_batch, run, training=False)):
        yield input, target


@torch.no_grad()
def compare_forms(run: Run, model: nn.Module, fused: nn.Module) -> tuple[list[dict[str, float]], float]:
    """Metrics of both forms on the whole validation split, and the largest difference between their logits."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    evaluators = [run.task.create_evaluator() for _ in range(2)]
    difference = 0.0
    for input, target in validation_batches(run):
        outputs = [form(input) for form in (model, fused)]
        for evaluator, output in zip(evaluators, outputs):
            if target is not None:
                evaluator.update(output, target)
        difference = max(difference, float((outputs[0] - outputs[1]).abs().max()))
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    measured = run.validation_loader is not None
    return [dict(evaluator.compute()) for evaluator in evaluators if measured], difference


def recipe(run: Run) -> dict[str, Any]:
    """The settings that differ from the flags' defaults."""
    defaults = vars(build_parser().parse_args([]))
    return {key: value for key, value in told_settings(run.settings).items() if value != defaults[key]}


def training_facts(
    run: Run, metrics: list[dict[str, float]], difference: float | None, profiles: list
) -> dict[str, Any]:
    """What the saved folders tell of this training."""
    args = run.args
    forms = ('train_time', 'fused')
    cfg: Any = run.form.pretrained_cfg
    names = class_names(run.datasets[0])
    return dict(
        base_model=base_model_facts(vars(args), cfg),
        dataset=dict(
            name=args.dataset or Path(args.data_dir).resolve().name,
            split=args.val_split or None,
            train_images=len(run.datasets[0]),
            validation_images=len(run.datasets[1]) if run.datasets[1] is not None else None,
            label_names=names if names and len(names) == args.num_classes else None,
        ),
        metrics={form: values for form, values in zip(forms, metrics)},
        profile={form: profile.to_dict() for form, profile in zip(forms, profiles)},
        recipe=recipe(run),
        logit_difference=difference,
        environment=dict(
            python='.'.join(map(str, sys.version_info[:3])),
            torch=torch.__version__,
            timm=timm.__version__,
            timm_reparam=timm_reparam.__version__,
        ),
    )


# --------------------------------------------------------------------------------------------------------------------


def start_logging(verbose: bool) -> None:
    """Log to standard error, unless whoever imported this script has set up logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(utils.FormatterNoInfo())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    _logger.setLevel(logging.DEBUG if verbose else logging.NOTSET)
    for name in ('timm', 'timm_reparam', 'httpx', 'httpx2'):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: Command line without the name of the script; sys.argv by default.

    Returns:
        Exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    verbose = bool({'-v', '--verbose'} & set(sys.argv[1:] if argv is None else argv))
    start_logging(verbose)
    run = None
    try:
        args = parse_args(argv)
        with named_errors('--device-modules'):
            for module in args.device_modules or ():
                importlib.import_module(module)
        run = prepare(args)
        train(run)
        leave_other_processes(run)
        if run.is_primary:
            print(finish(run), flush=True)
            if args.publish:  # after the result is out: the Hub may not be in reach
                print(f'\n{publish_result(run)}')
        return 0
    except ReparamError as error:
        if verbose:
            print(without_secrets(traceback.format_exc()), end='', file=sys.stderr)
        print(f'train.py: error: {without_secrets(" ".join(str(error).split()))}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        found = checkpoints_in(run.output_dir) if run is not None and run.is_primary else ()
        newest = max(found, default=None, key=lambda path: path.stat().st_mtime)
        print(f'train.py: stopped{newest and f"; go on with --resume {newest}" or ""}', file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            end_process_group(run)


if __name__ == '__main__':
    try:
        sys.exit(main())
    except Exception:  # a defect: shown as Python shows it, but for secrets
        print(without_secrets(traceback.format_exc()), end='', file=sys.stderr)
        sys.exit(1)
