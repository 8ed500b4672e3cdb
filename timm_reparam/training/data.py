"""Datasets, checks of their classes and splits, and the loaders of both splits."""

import logging
import os
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from timm.data import AugMixDataset, FastCollateMixup, create_dataset, create_loader

from ..errors import ReparamError
from .flags import dataset_kind
from .setup import TIMM_ERRORS, Setup, named_errors

__all__ = ['Digits', 'class_names', 'create_datasets', 'create_train_loader', 'create_validation_loader', 'set_epoch']

_logger = logging.getLogger(__name__)


class Digits(torch.utils.data.Dataset):
    """The handwritten digits inside scikit-learn: 1,797 grey images of 8x8 pixels, in the interface of timm's datasets.

    Args:
        split: 'train' or 'training'; any other name is the held-out fifth (always the same images, stratified).
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


def create_datasets(setup: Setup) -> tuple[Any, Any]:
    """Open both splits, and check that they match; the validation split is None without --val-split."""
    args = setup.args
    img_mode = 'RGB' if setup.data_config['input_size'][0] == 3 else 'L'
    train = _create_split(args, args.train_split, True, img_mode)
    validation = _create_split(args, args.val_split, False, img_mode) if args.val_split else None
    _check_classes(args, train, validation)
    return train, validation


def _create_split(args: Namespace, split: str, is_training: bool, img_mode: str) -> Any:
    if args.dataset == 'digits':
        return Digits(split, img_mode)
    if dataset_kind(args) == 'folder' and not os.path.exists(args.data_dir):
        raise ReparamError(f'--data-dir {args.data_dir}: no such file or folder')
    try:
        return create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            download=args.dataset_download,
            batch_size=args.batch_size,
            input_img_mode=img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
        )
    except TIMM_ERRORS as error:
        where = args.data_dir or args.dataset
        raise ReparamError(
            f'{where}: no usable split {split!r} ({error or type(error).__name__}); see --train-split and --val-split'
        ) from error


def class_names(dataset: Any) -> list[str] | None:
    """Names of a dataset's classes in order, or None if the dataset has no names."""
    reader = getattr(dataset, 'reader', None)
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)  # a folder, a tar
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    names = getattr(dataset, 'classes', None)
    return [str(name) for name in names] if names else None


def _check_classes(args: Namespace, train: Any, validation: Any) -> None:
    """Raise ReparamError if a folder has no classes, the splits differ in theirs, or the classifier is too small."""
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
                f'{args.data_dir}: expected the same classes in both splits, but they have different classes '
                f'({", ".join(differing[:5])}); make the folders equal'
            )
    if names is None:
        return
    if len(names) > args.num_classes:
        raise ReparamError(f'--num-classes {args.num_classes}: the dataset has {len(names)} classes; give that number')
    if len(names) < args.num_classes:
        _logger.warning('the classifier has %d outputs for %d classes; see --num-classes', args.num_classes, len(names))


def _check_split_folders(args: Namespace, train: Any, validation: Any) -> None:
    """Warn or raise if timm found no folder of a split, where it silently uses the whole dataset instead."""
    roots = [getattr(getattr(dataset, 'reader', None), 'root', None) for dataset in (train, validation)]
    whole, named = roots[0] == args.data_dir, args.train_split != 'train'
    if roots[0] == roots[1]:
        _logger.warning('%s: no folders of splits; validating on the training images', args.data_dir)
    elif whole and (named or validation is not None):  # the whole folder includes the validation images
        raise ReparamError(f'{args.data_dir}: no split {args.train_split!r}; name its folder with --train-split')
    elif whole and os.path.isdir(args.data_dir):
        _logger.warning('%s: no folder %r; training on the images of all folders', args.data_dir, args.train_split)
    elif roots[1] == args.data_dir:
        raise ReparamError(
            f'{args.data_dir}: no split {args.val_split!r}; name it with --val-split, or train without (--val-split "")'
        )


def _create_loader(setup: Setup, dataset: Any, name: str, **options: Any) -> Any:
    """Create timm's loader with the options common to both splits."""
    args = setup.args
    with named_errors(f'the {name} loader cannot be made'):
        return create_loader(
            dataset,
            input_size=setup.data_config['input_size'],
            mean=setup.data_config['mean'],
            std=setup.data_config['std'],
            num_workers=args.workers,
            pin_memory=args.pin_mem,
            device=setup.device,
            distributed=args.distributed,
            **options,
        )


def create_train_loader(setup: Setup, dataset: Any) -> Any:
    """Create the loader of training batches, with augmentation and mixing."""
    args, collate_fn = setup.args, None
    if args.mixup > 0 or args.cutmix > 0:
        with named_errors('--mixup, --cutmix'):
            collate_fn = FastCollateMixup(
                mixup_alpha=args.mixup,
                cutmix_alpha=args.cutmix,
                prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob,
                label_smoothing=args.smoothing,
                num_classes=args.num_classes,
            )
    if args.aug_splits:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    interpolation = setup.data_config['interpolation'] if args.no_aug else args.train_interpolation
    loader = _create_loader(
        setup,
        dataset,
        'training',
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_split=args.resplit,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=interpolation or setup.data_config['interpolation'],
        collate_fn=collate_fn,
        # Persistent workers have random states that no checkpoint saves, and would not notice when mixing ends.
        persistent_workers=False,
    )
    if len(loader) == 0:
        raise ReparamError(
            f'--batch-size {args.batch_size}: larger than the training split ({len(dataset)} images); reduce it'
        )
    return loader


def create_validation_loader(setup: Setup, dataset: Any) -> Any:
    """Create the loader of validation batches; None without a validation split."""
    if dataset is None:
        return None
    return _create_loader(
        setup,
        dataset,
        'validation',
        batch_size=setup.args.validation_batch_size or setup.args.batch_size,
        is_training=False,
        interpolation=setup.data_config['interpolation'],
        crop_pct=setup.data_config['crop_pct'],
    )


def set_epoch(args: Namespace, loader: Any, epoch: int) -> None:
    """Set the epoch of everything that shuffles, and stop mixing from --mixup-off-epoch on."""
    for part in (loader.dataset, loader.batch_sampler, loader.sampler):
        if hasattr(part, 'set_epoch'):
            part.set_epoch(epoch)
    if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and hasattr(loader, 'mixup_enabled'):
        loader.mixup_enabled = False
