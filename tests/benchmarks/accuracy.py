r"""Accuracy on CIFAR-10: the stock backbone and every method, one recipe, paired seeds.

    python tests/benchmarks/accuracy.py run --data cifar10 --runs runs --seeds 0 1 2 --jobs 2 \
        --model-kwargs 'channels=(32,48,48,96)' stem_width=16 zero_init_last=False --amp --channels-last
    python tests/benchmarks/accuracy.py costs --runs runs                                # training step, to stock
    python tests/benchmarks/accuracy.py table --runs runs -o model_cards/results/cifar10.csv     # --keep: with its rows
    python tests/benchmarks/accuracy.py repeat model_cards/results/cifar10.csv --row 5 --data cifar10 --runs again
    python tests/benchmarks/accuracy.py run … --holdout 500 --methods stock --lr 0.1     # tuning: no test image is seen

`--data` holds train/CLASS/*.jpg and test/CLASS/*.jpg, 32 x 32 pixels. The published figures come from a copy of
CIFAR-10 that was encoded as JPEG, and compare with one another only.

A seed fixes the stock weights, the order of the images and how each is cropped and flipped, whatever the method: runs
of one seed are pairs. The last epoch's weights are evaluated, in float32 without TF32, as trained and fused. Where the
two predict another class for an image, its top-2 margin must be below the largest difference of their logits; each
such image is listed in the run's `result.json`.

RefConv starts from a trained model, so all its comparisons have the same number of epochs in total: `refocus` is an
epochs / 2 stock run and as many of refocusing; `finetune` goes on plainly from the same stock run; `scratch` is the
stock run of all epochs at once.

A run is a folder: settings, `summary.csv` as timm's train script writes it, a checkpoint after each epoch that it goes
on from exactly, and at the end `result.json` and both forms of the model. What is finished is not run again.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ParseKwargs
from torch import nn

from timm_reparam import ACBlock2d, fuse_model, plan_conversion, register_variant, verify_fusion
from timm_reparam._files import write_whole
from timm_reparam._measure import device_name
from timm_reparam.hub import add_facts, save_checkpoint, save_pair
from timm_reparam.hub.facts import read_facts
from timm_reparam.layers import RefConv2d
from timm_reparam.profile import compare_profiles
from timm_reparam.results import (
    COLUMNS,
    Summary,
    format_summary,
    of_variant,
    options_of,
    read_results,
    setup_of,
    summarize,
)
from timm_reparam.variants import run_methods, variant_of

NUM_CLASSES, SIDE, CROP_PADDING = 10, 32, 4
# Largest number of images that are evaluated at once.
EVALUATED = 500

# Options of a method's layers where they are not the defaults, as the authors set them for CIFAR. The length of the
# temperature's schedule is `Settings.anneal`.
OPTIONS: dict[str, dict[str, Any]] = {
    'acconv': {'gamma_init': 1 / 3},
    'acconv_none': {'branch_norm': 'none', 'scale': 1 / 3},
}


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run, the data aside.

    Args:
        method: One of `run_methods`; protocol: 'scratch', 'refocus' or 'finetune'; epochs: in total; seed.
        model: Architecture of timm; model_kwargs: its arguments.
        size: Side that the images are resized to, from 32 pixels.
        batch_size: Images in a batch; lr: peak learning rate; weight_decay; label_smoothing.
        warmup: Epochs of linear warmup before the cosine.
        second_lr: Peak learning rate of the second half of `refocus` and `finetune`.
        map_lr: How fast refocused kernels move, roughly relative to kernels that are trained themselves: the learning
            rate of RefConv's maps is this over the square of the size of the kernels that a map takes in. 0 treats maps
            as all other parameters.
        anneal: Share of the steps in which dynamic convolution's temperature falls.
        conv_options: Options of the layers beside `OPTIONS`.
        amp: Whether to train under autocast to bfloat16; channels_last.
        holdout: Images of each class that are evaluated instead of the test set, and not trained on.
    """

    method: str
    protocol: str
    epochs: int
    seed: int
    model: str = 'resnet10t'
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    batch_size: int = 128
    lr: float = 0.2
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup: float = 1.0
    second_lr: float = 0.1
    map_lr: float = 0.0
    anneal: float = 1 / 3
    conv_options: dict[str, Any] = field(default_factory=dict)
    amp: bool = False
    channels_last: bool = False
    holdout: int = 0

    @property
    def name(self) -> str:
        return f'{self.model}-{self.method}-{self.protocol}-e{self.epochs}-s{self.seed}'

    @property
    def variant(self) -> str | None:
        """The variant of its layers; the paper's own block takes the place of whole convolutions and norms instead."""
        return None if self.method == 'acblock' else run_methods()[self.method]

    @property
    def tag(self) -> str:
        """Of the saved models; it tells the methods of one variant apart."""
        extra = self.method.removeprefix(self.variant or self.method).lstrip('_')
        return f'cifar10_{extra}' if extra else 'cifar10'

    @property
    def first(self) -> 'Settings | None':
        """The stock run that this one goes on from."""
        if self.protocol == 'scratch':
            return None
        half = dataclasses.replace(self, method='stock', protocol='scratch', epochs=self.epochs // 2)
        return half.without_idle_settings()

    def without_idle_settings(self) -> 'Settings':
        """The same run: settings that its result does not depend on are as by default, so runs can share it."""
        idle: dict[str, Any] = {}
        if self.first is None:
            idle['second_lr'] = Settings.second_lr
        if self.variant != 'refconv':
            idle['map_lr'] = Settings.map_lr
        if self.variant != 'dyconv':
            idle['anneal'] = Settings.anneal
        if self.variant is None:
            idle['conv_options'] = {}
        return dataclasses.replace(self, **idle)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """timm's groups, biases and norms without decay; those of RefConv's maps apart if `map_lr` says so."""
        modules = model.modules() if self.map_lr else ()
        layers = {module.map_weight: module for module in modules if isinstance(module, RefConv2d)}
        groups = []
        for group in param_groups_weight_decay(model, self.weight_decay):
            others = [parameter for parameter in group['params'] if parameter not in layers]
            if others:
                groups.append({**group, 'params': others, 'lr_scale': 1.0})
        for parameter, layer in layers.items():
            # A step of the map by its gradient moves a kernel by W W^T times the kernel's own gradient, summed over all
            # kernels that the map links with it.
            scale = self.map_lr / (parameter[0].numel() * layer.weight.square().mean().item())
            groups.append(dict(params=[parameter], lr_scale=scale, weight_decay=self.weight_decay / scale))
        return groups

    @property
    def trained_epochs(self) -> int:
        return self.epochs if self.first is None else self.epochs - self.first.epochs


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Images (N, 3, 32, 32), uint8, and their labels."""

    images: torch.Tensor
    labels: torch.Tensor
    eval_images: torch.Tensor
    eval_labels: torch.Tensor
    sha256: str

    def __post_init__(self) -> None:
        levels = torch.arange(256, dtype=torch.float64) / 255
        means, deviations = [], []
        for channel in self.images.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
            means.append((share * levels).sum())
            deviations.append((share * (levels - means[-1]) ** 2).sum().sqrt())
        self.mean, self.std = (torch.stack(values).float().view(3, 1, 1) for values in (means, deviations))

    def normalised(self, images: torch.Tensor, settings: Settings) -> torch.Tensor:
        """The model's input for images in uint8."""
        images = (images.float() / 255 - self.mean) / self.std
        if settings.size != images.shape[-1]:
            images = F.interpolate(images, size=settings.size, mode='bilinear', antialias=True)
        return images.contiguous(memory_format=torch.channels_last) if settings.channels_last else images

    def batches(self, settings: Settings, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch, shuffled, cropped and flipped by the seed and the epoch alone."""
        random = torch.Generator().manual_seed(1_000_003 * settings.seed + epoch)
        order = torch.randperm(len(self.images), generator=random)
        offsets = torch.randint(-CROP_PADDING, CROP_PADDING + 1, (2, len(order), 1), generator=random)
        rows, columns = torch.arange(SIDE) + offsets
        flipped = torch.rand(len(order), generator=random) < 0.5
        columns[flipped] = columns[flipped].flip(1)
        # what lies outside is mirrored
        rows, columns = (SIDE - 1 - (SIDE - 1 - index.abs()).abs() for index in (rows, columns))
        for start in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            chosen = order[batch]
            images = self.images[
                chosen[:, None, None, None],
                torch.arange(3)[:, None, None],
                rows[batch, None, :, None],
                columns[batch, None, None, :],
            ]
            yield self.normalised(images, settings), self.labels[chosen]


def load_data(folder: Path, cache: Path | None, holdout: int = 0) -> Data:
    """Decode the images, or read them from a file that an earlier run has left.

    Args:
        folder: Folder with train/CLASS/*.jpg and test/CLASS/*.jpg.
        cache: File to keep the decoded images in; None keeps none.
        holdout: The last so many training images of each class take the place of the test images.
    """
    if cache is not None and cache.is_file():
        arrays = dict(np.load(cache))
    else:
        arrays = {}
        for split in ('train', 'test'):
            classes = sorted(path for path in (folder / split).iterdir() if path.is_dir())
            files = [(path, label) for label, name in enumerate(classes) for path in sorted(name.glob('*.jpg'))]
            pixels = [np.asarray(Image.open(path).convert('RGB')) for path, _ in files]
            arrays[split] = np.stack(pixels).transpose(0, 3, 1, 2).copy()
            arrays[f'{split}_labels'] = np.array([label for _, label in files])
        if cache is not None:
            draft = cache.with_name(f'{os.getpid()}.npz')
            np.savez(draft, **arrays)
            draft.replace(cache)
    sha256 = hashlib.sha256(b''.join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()
    images, labels, test, test_labels = (
        torch.from_numpy(arrays[name]) for name in ('train', 'train_labels', 'test', 'test_labels')
    )
    if holdout:
        held = torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique():
            held[(labels == label).nonzero().flatten()[-holdout:]] = True
        images, labels, test, test_labels = images[~held], labels[~held], images[held], labels[held]
    return Data(images, labels, test, test_labels, sha256)


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------


def build(settings: Settings, steps: int, weights: Path | None = None) -> nn.Module:
    """Build the model of a run, with the stock weights of the seed, or those of a file.

    Args:
        settings: The run.
        steps: Training steps, for the schedule of dynamic convolution.
        weights: Weights of the stock model, which the variant is to lift.
    """
    variant = settings.variant
    name, arguments = settings.model, dict(settings.model_kwargs, num_classes=NUM_CLASSES)
    if weights is not None:
        arguments.update(pretrained=True, pretrained_cfg_overlay=dict(file=str(weights), num_classes=NUM_CLASSES))
    if variant is not None:
        name = register_variant(settings.model, variant)
        init = 'scratch' if weights is None else 'lift'
        options = {**OPTIONS.get(settings.method, {}), 'init': init, **settings.conv_options}
        if variant == 'dyconv':
            options = {'temperature_steps': max(round(settings.anneal * steps), 1), **options}
        arguments['conv_options'] = options
    torch.manual_seed(settings.seed)
    model = timm.create_model(name, **arguments)
    return add_blocks(model) if settings.method == 'acblock' else model


def add_blocks(model: nn.Module) -> nn.Module:
    """Put the paper's block in the place of each convolution that the variant takes, and of the norm that follows."""
    modules = list(model.named_modules())
    plan = plan_conversion(model, 'acconv')
    for (place, conv), (norm_place, norm) in zip(modules, modules[1:]):
        if place not in plan or plan[place]:
            continue
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or conv.bias is not None:
            raise SystemExit(f'{place}: expected a convolution without bias and a BatchNorm, got {conv}, {norm}')
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        block = ACBlock2d(conv.in_channels, conv.out_channels, conv.kernel_size, *geometry, reduce_gamma=True)
        block.square_conv.weight = conv.weight
        model.set_submodule(place, block)
        # timm's norms may hold the activation
        rest = [part for part in (getattr(norm, 'drop', None), getattr(norm, 'act', None)) if part is not None]
        model.set_submodule(norm_place, nn.Sequential(*rest) if rest else nn.Identity())
    return model


def fused_form(model: nn.Module) -> nn.Module:
    """The fused form; a stock model is its own, and the paper's blocks are fused in place."""
    if variant_of(model) is not None:
        return fuse_model(model)
    blocks = [name for name, module in model.named_modules() if isinstance(module, ACBlock2d)]
    for name in blocks:
        model.set_submodule(name, model.get_submodule(name).fuse())
    return model


# --------------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(model: nn.Module, data: Data, settings: Settings, device: torch.device) -> torch.Tensor:
    """Logits (N, 10) of the evaluated images, in float32."""
    model.eval()
    batches = data.eval_images.split(EVALUATED)
    return torch.cat([model(data.normalised(images, settings).to(device)).float().cpu() for images in batches])


def metrics_of(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent, and the mean cross entropy."""
    hits = logits.topk(5).indices == labels[:, None]
    top1, top5 = (round(100 * hits[:, :k].any(1).double().mean().item(), 4) for k in (1, 5))
    return {'top1': top1, 'top5': top5, 'loss': F.cross_entropy(logits.double(), labels).item()}


def differing_images(logits: torch.Tensor, fused: torch.Tensor) -> tuple[list[dict[str, float]], float]:
    """Images whose prediction fusing changes, and the largest difference of any logit.

    Raises:
        SystemExit: The logits differ by more than rounding, or a prediction changes that is further from a tie.
    """
    difference = (logits - fused).abs().max(1).values
    largest = difference.max().item()
    if largest > 1e-4 * logits.abs().max().item():
        raise SystemExit(f'fusing changed a logit by {largest}, of logits up to {logits.abs().max().item()}')
    top2 = logits.topk(2).values
    margin = top2[:, 0] - top2[:, 1]
    changed = (logits.argmax(1) != fused.argmax(1)).nonzero().flatten().tolist()
    images = [dict(image=i, margin=margin[i].item(), difference=difference[i].item()) for i in changed]
    for image in images:
        if image['margin'] >= largest:
            raise SystemExit(f'fusing changed the prediction of an image that is no tie: {image}')
    return images, largest


def learning_rate(settings: Settings, step: int, steps: int, steps_per_epoch: int) -> float:
    """A linear warmup, then half a cosine down to zero."""
    peak = settings.lr if settings.first is None else settings.second_lr
    warmup = settings.warmup * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=2) + '\n').encode())


def as_json(settings: Settings) -> dict[str, Any]:
    """Settings as they are read again, without tuples."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def environment(device: torch.device) -> dict[str, str]:
    def git(*words: str) -> str:
        where = Path(__file__).parent
        done = subprocess.run(['git', *words], cwd=where, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ''

    dirty = '-dirty' if git('status', '--porcelain', '--untracked-files=no') else ''
    return {
        'device': device_name(device),
        'threads': str(torch.get_num_threads()),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'commit': git('rev-parse', 'HEAD')[:12] + dirty,
    }


def train(settings: Settings, data: Data, runs: Path, device: torch.device) -> dict[str, Any]:
    """Run to the end, from where an earlier attempt stopped, and return what is in `result.json`."""
    folder = runs / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / 'settings.json'
    given = as_json(settings)
    if record.is_file() and as_json(Settings(**read_json(record))) != given:
        raise SystemExit(f'{folder}: holds a run with other settings; give another --runs folder')
    write_json(record, given)
    result = folder / 'result.json'
    if result.is_file():
        return read_json(result)

    weights = None
    if settings.first is not None:
        train(settings.first, data, runs, device)
        weights = runs / settings.first.name / 'zoo' / f'{settings.model}.{settings.first.tag}' / 'model.safetensors'
    steps_per_epoch = len(data.images) // settings.batch_size
    steps = settings.trained_epochs * steps_per_epoch
    model = build(settings, steps, weights).to(device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    # timm's SGD has Nesterov's momentum
    optimizer = create_optimizer_v2(model, 'sgd', settings.lr, momentum=0.9, param_group_fn=settings.parameter_groups)
    history: list[dict[str, float]] = []
    checkpoint = folder / 'last.pth.tar'
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state['state_dict'])
        optimizer.load_state_dict(state['optimizer'])
        history = state['history']

    skipped = 0 if settings.first is None else settings.first.epochs  # a second half sees other batches
    for epoch in range(len(history), settings.trained_epochs):
        began, loss_sum, lr = time.perf_counter(), torch.zeros((), device=device), 0.0
        torch.manual_seed(1_000_003 * settings.seed + epoch)  # what is random in a model
        model.train()
        for index, (images, labels) in enumerate(data.batches(settings, skipped + epoch)):
            lr = learning_rate(settings, epoch * steps_per_epoch + index, steps, steps_per_epoch)
            for group in optimizer.param_groups:
                group['lr'] = lr * group['lr_scale']
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp):
                logits = model(images.to(device))
            loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
        seconds = time.perf_counter() - began
        metrics = metrics_of(logits_of(model, data, settings, device), data.eval_labels)
        history.append(
            dict(
                epoch=epoch,
                train_loss=loss_sum.item() / steps_per_epoch,
                **{f'eval_{name}': value for name, value in metrics.items()},
                lr=lr,
                train_seconds=seconds,
            )
        )
        state = dict(state_dict=model.state_dict(), optimizer=optimizer.state_dict(), history=history)
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(checkpoint, content.getvalue())
        lines = [','.join(history[0]), *(','.join(str(value) for value in row.values()) for row in history)]
        write_whole(folder / 'summary.csv', ('\n'.join(lines) + '\n').encode())
    return finish(settings, model, data, folder, history, environment(device))


def finish(
    settings: Settings,
    model: nn.Module,
    data: Data,
    folder: Path,
    history: Sequence[dict[str, float]],
    versions: dict[str, str],
) -> dict[str, Any]:
    """Evaluate both forms, save them, and write `result.json`."""
    device = next(model.parameters()).device
    model.eval()
    logits = logits_of(model, data, settings, device)
    parameters = compare_profiles(model, input_size=(3, settings.size, settings.size), runs=0)[0].parameters
    variant = variant_of(model)
    fused = fused_form(model)
    fused_logits = logits_of(fused, data, settings, device)
    images, difference = differing_images(logits, fused_logits)
    metrics, fused_metrics = (metrics_of(each, data.eval_labels) for each in (logits, fused_logits))
    profile = compare_profiles(fused, input_size=(3, settings.size, settings.size), runs=0)[0]

    options = {k: v for k, v in dataclasses.asdict(settings).items() if k not in COLUMNS and k != 'holdout'}
    row = dict(
        model=settings.model, method=settings.method, protocol=settings.protocol, epochs=settings.epochs,
        seed=settings.seed, **metrics, fused_top1=fused_metrics['top1'], differing=len(images),
        max_logit_difference=difference, train_parameters=parameters, fused_parameters=profile.parameters,
        step_ratio=None, seconds=sum(epoch['train_seconds'] for epoch in history), size=settings.size,
        batch_size=settings.batch_size, lr=settings.lr, weight_decay=settings.weight_decay,
        options=json.dumps(options, sort_keys=True), device=versions['device'], torch=versions['torch'],
        timm=versions['timm'], commit=versions['commit'], data_sha256=data.sha256,
    )  # fmt: skip
    facts = dict(
        base_model=None,
        license='apache-2.0',
        dataset=dict(
            name='CIFAR-10, a copy encoded as JPEG', train_images=len(data.images), validation_images=len(logits)
        ),
        metrics=dict(train_time=metrics, fused=fused_metrics) if variant else dict(train_time=metrics),
        logit_difference=difference,
        recipe=dataclasses.asdict(settings),
        environment={name: value for name, value in versions.items() if name in ('python', 'torch', 'timm')},
    )
    config = dict(
        input_size=(3, settings.size, settings.size), mean=tuple(data.mean.flatten().tolist()),
        std=tuple(data.std.flatten().tolist()), crop_pct=1.0, interpolation='bilinear',
    )  # fmt: skip
    for form in (model, fused):
        form.to(memory_format=torch.contiguous_format)
    if variant is not None:
        report = verify_fusion(model, fused, inputs=data.normalised(data.eval_images[:EVALUATED], settings).to(device))
        save_pair(model, folder / 'zoo', tag=settings.tag, fused=fused, report=report, facts=facts, data_config=config)
    elif settings.method != 'acblock':  # of no architecture that timm could build, so it has no folder
        (folder / 'zoo').mkdir(exist_ok=True)
        name = f'{settings.model}.{settings.tag}'
        save_checkpoint(model, folder / 'zoo' / name, facts={**facts, 'tag': settings.tag}, data_config=config)
    result = dict(row=row, differing=images, holdout=settings.holdout, environment=versions)
    write_json(folder / 'result.json', result)
    (folder / 'last.pth.tar').unlink(missing_ok=True)
    return result


# --------------------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------------------


def planned(args: argparse.Namespace) -> list[Settings]:
    """The runs of a grid, those that others go on from before them."""
    common = {name: getattr(args, name) for name in _SETTING_FLAGS}
    runs = []
    for seed in args.seeds:
        for method in args.methods:
            if method != 'refconv':
                runs.append(Settings(method, 'scratch', args.epochs, seed, **common))
        if 'refconv' in args.methods:
            for method, protocol in (('stock', 'scratch'), ('stock', 'finetune'), ('refconv', 'refocus')):
                runs.append(Settings(method, protocol, 2 * args.epochs, seed, **common))
    firsts = [run.first for run in runs if run.first is not None]
    return list({run.name: run.without_idle_settings() for run in [*firsts, *runs]}.values())


def _run(args: argparse.Namespace) -> None:
    args.runs.mkdir(parents=True, exist_ok=True)
    load_data(args.data, args.runs / 'data.npz')  # decoded once, not by each process
    done: dict[str, Future[None]] = {}

    def finish_one(settings: Settings) -> None:
        if settings.first is not None:
            done[settings.first.name].result()
        words = [sys.executable, __file__, 'one', '--data', args.data, '--runs', args.runs, '--device', args.device]
        words += ['--threads', args.threads, json.dumps(dataclasses.asdict(settings))]
        subprocess.run([str(word) for word in words], check=True)
        row = read_json(args.runs / settings.name / 'result.json')['row']
        print(f'{settings.name:<44} top-1 {row["top1"]:.2f}, {row["seconds"]:.0f} s', flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for settings in planned(args):
            done[settings.name] = pool.submit(finish_one, settings)
    for future in done.values():
        future.result()


def prepare_torch(threads: int) -> None:
    """What has to be the same for a run and its repetition."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def _one(args: argparse.Namespace) -> None:
    prepare_torch(args.threads)
    settings = Settings(**json.loads(args.settings))
    data = load_data(args.data, args.runs / 'data.npz', settings.holdout)
    train(settings, data, args.runs, torch.device(args.device))


def _costs(args: argparse.Namespace) -> None:
    """Training step of every method that was run, to the stock backbone's in the same run."""
    torch.set_num_threads(args.threads)
    records = [read_json(path) for path in sorted(args.runs.glob('*/settings.json'))]
    settings = {record['method']: Settings(**record) for record in records}
    stock = next(iter(settings.values()))
    settings = {'stock': dataclasses.replace(stock, method='stock', protocol='scratch'), **settings}
    models = [build(each, 1).to(args.device) for each in settings.values()]
    profiles = compare_profiles(
        *models, names=list(settings), train=True, runs=args.rounds, batch_size=stock.batch_size,
        input_size=(3, stock.size, stock.size), channels_last=stock.channels_last,
        precision='amp_bfloat16' if stock.amp else 'float32',
    )  # fmt: skip
    ratios = {profile.name: round(profile.step_ratio or 1, 3) for profile in profiles}
    write_json(args.runs / 'costs.json', ratios)
    print('\n'.join(f'{name:<12} {ratio:.2f}' for name, ratio in ratios.items()))


def _table(args: argparse.Namespace) -> None:
    rows, folders = [], [folder for zoo in args.zoo for folder in sorted(zoo.iterdir())]
    for runs in args.runs:
        costs = runs / 'costs.json'
        ratios = read_json(costs) if costs.is_file() else {}
        for path in sorted(runs.glob('*/result.json')):
            result = read_json(path)
            if not result['holdout']:
                row = {**result['row'], 'step_ratio': ratios.get(result['row']['method'], '')}
                rows.append({k: float(f'{v:.6g}') if isinstance(v, float) else v for k, v in row.items()})
                folders += sorted(path.parent.glob('zoo/*'))
    if args.keep:
        found = {run_of(row) for row in rows}
        rows += [row for row in read_results(args.output) if run_of(row) not in found]
    rows.sort(key=run_of)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, tuple(COLUMNS), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_whole(args.output, text.getvalue().encode())
    summaries = summarize(read_results(args.output))
    for folder in folders:
        add_comparison(folder, summaries)
    print(f'{len(rows)} runs in {args.output}\n\n{format_summary(summaries)}')


def run_of(row: dict[str, Any]) -> tuple:
    """What tells the runs of a results file apart, and puts them in its order."""
    (model, arguments, size), method = setup_of(row), list(run_methods()).index(row['method'])
    return model, size, row['epochs'], row['protocol'], method, row['seed'], arguments, options_of(row)


def add_comparison(folder: Path, summaries: Sequence[Summary]) -> None:
    """Put the rows of a model's method, and of the stock runs that it is compared with, into its card."""
    facts = read_facts(folder) or {}
    recipe = facts.get('recipe') or {}
    if 'method' not in recipe:
        raise SystemExit(f'{folder}: expected a model of a run, with its settings in training.json')
    if run_methods()[recipe['method']] is not None and facts.get('results') != (
        entries := compared_with(recipe, summaries)
    ):
        add_facts(folder, dict(results=entries))


def compared_with(recipe: dict[str, Any], summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """The entries of the method that a recipe trains a variant by, and of the stock runs that it is compared with."""
    row = {**recipe, 'options': json.dumps(recipe)}
    return [
        summary.to_dict()
        for summary in of_variant(summaries, run_methods()[recipe['method']])
        if (summary.setup, summary.epochs) == (setup_of(row), row['epochs'])
        and (summary.method == 'stock' or (summary.method, summary.options) == (row['method'], options_of(row)))
    ]


def _repeat(args: argparse.Namespace) -> int:
    """Run a row again. It is within its seed spread within three standard deviations of the mean over its seeds."""
    with open(args.results, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))  # of several recipes, perhaps
    if not 1 <= args.row <= len(rows):
        raise SystemExit(f'--row: expected 1 to {len(rows)}, got {args.row}')
    row = rows[args.row - 1]
    fields = {f.name for f in dataclasses.fields(Settings)}
    given = {name: kind(row[name]) for name, kind in COLUMNS.items() if name in fields}
    settings = Settings(**given, **json.loads(row['options']))
    if (args.runs / settings.name / 'result.json').is_file():
        raise SystemExit(f'{args.runs}: {settings.name} has been run there and would not be again; give a new folder')
    args.runs.mkdir(parents=True, exist_ok=True)
    prepare_torch(args.threads)
    data = load_data(args.data, args.runs / 'data.npz')
    if data.sha256 != row['data_sha256']:
        raise SystemExit(f'{args.data}: expected the images of the results, {row["data_sha256"]}, got {data.sha256}')
    found = train(settings, data, args.runs, torch.device(args.device))['row']['top1']
    same = 'model method protocol epochs size batch_size lr weight_decay options'.split()
    seeds = [float(other['top1']) for other in rows if all(other[name] == row[name] for name in same)]
    mean, spread = statistics.mean(seeds), statistics.stdev(seeds) if len(seeds) > 1 else 0.0
    within = abs(found - mean) <= 3 * spread
    print(f'{settings.name}: top-1 {found:.2f}, in the results {float(row["top1"]):.2f}')
    print(f'over {len(seeds)} seeds: {mean:.2f} ± {spread:.2f}')
    return 0 if within else 1


# Fields of Settings that are flags of `run` and the same for all its runs.
_SETTING_FLAGS = [
    f.name for f in dataclasses.fields(Settings) if f.name not in ('method', 'protocol', 'epochs', 'seed')
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Accuracy on CIFAR-10: stock and every method, paired seeds.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--runs', type=Path, required=True, metavar='FOLDER', help='of the runs')
    common.add_argument('--device', default='cpu', help='(default: cpu)')
    common.add_argument('--threads', type=int, default=1, metavar='N', help='of each process (default: 1)')
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument('--data', type=Path, required=True, metavar='FOLDER', help='with train/CLASS and test/CLASS')

    command = commands.add_parser('run', parents=[common, data], help='a grid of runs, each once')
    command.add_argument(
        '--methods', nargs='+', choices=tuple(run_methods()), default=list(run_methods()), help='(default: all)'
    )
    command.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N', help='(default: 0 1 2)')
    command.add_argument('--epochs', type=int, default=15, metavar='N', help='of a run from scratch (default: 15)')
    command.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time (default: 1)')
    for setting in dataclasses.fields(Settings):
        if setting.name in _SETTING_FLAGS:
            flag, default = '--' + setting.name.replace('_', '-'), setting.default
            if default is dataclasses.MISSING:
                command.add_argument(flag, nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
            elif isinstance(default, bool):
                command.add_argument(flag, action='store_true')
            else:
                command.add_argument(flag, type=type(default), default=default, help='(default: %(default)s)')
    command.set_defaults(command=_run)

    command = commands.add_parser('one', parents=[common, data], help='one run, by its settings as json')
    command.add_argument('settings')
    command.set_defaults(command=_one)

    command = commands.add_parser('costs', parents=[common], help='time the training step of the methods that were run')
    command.add_argument('--rounds', type=int, default=20, metavar='N', help='(default: 20)')
    command.set_defaults(command=_costs)

    command = commands.add_parser('table', help='write the results, also into the cards of the models')
    command.add_argument('--runs', type=Path, nargs='+', required=True, metavar='FOLDER', help='of the runs')
    command.add_argument('-o', '--output', type=Path, required=True, metavar='FILE', help='the .csv')
    command.add_argument('--keep', action='store_true', help='also the rows of the .csv that no folder has a run of')
    command.add_argument('--zoo', type=Path, nargs='*', default=[], metavar='FOLDER', help='of more such models')
    command.set_defaults(command=_table)

    command = commands.add_parser('repeat', parents=[common, data], help='run a row of the results again')
    command.add_argument('results', type=Path, metavar='CSV')
    command.add_argument('--row', type=int, required=True, metavar='N', help='1 is the first')
    command.set_defaults(command=_repeat)

    args = parser.parse_args(argv)
    return args.command(args) or 0


if __name__ == '__main__':
    sys.exit(main())
