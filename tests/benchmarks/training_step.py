"""Time and memory of a training step: the variants beside the stock backbones, and beside reference implementations.

    python tests/benchmarks/training_step.py --reference FOLDER [FOLDER ...] -o tests/benchmarks/results/NAME

For each backbone and each setting there is one interleaved run of the stock model, the variants and the references. The
references' code is not part of this project: FOLDER holds checkouts of it, searched for these files, and what is not
there is left out.

    DOConv2d         do_conv_pytorch_1_10.py or do_conv_pytorch.py     github.com/yangyanli/DO-Conv
    ACBlock          acb.py                                            github.com/DingXiaoH/ACNet
    DiverseBranchBlock  diversebranchblock.py                          github.com/DingXiaoH/DiverseBranchBlock
    OREPA            blocks.py                                         github.com/JUGGHM/OREPA_CVPR2022
    RepConv          ImageNet-MobileNetv3-RefConv.py                   github.com/Aiolus-X/RefConv
    Dynamic_conv2d   dynamic_conv.py                                   github.com/kaijieshi7/Dynamic-convolution-Pytorch

timm's own CondConv2d is always there, with four experts and a routing of its own for each layer, as the attention of
dynamic convolution is. A reference takes the place of exactly those layers that the variant converts; all start at
random. One that cannot run in a setting (channels last, say) is left out, and the results say why. The plot shows the
last setting.
"""

import argparse
import ast
import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import CondConv2d
from torch import nn

import timm_reparam
from timm_reparam import plan_conversion
from timm_reparam._measure import device_name
from timm_reparam.plot import check_plot, plot_profiles
from timm_reparam.profile import Profile, compare_profiles, format_profiles

# backbone: names of our variants with their options, names of the references
ROWS: dict[str, tuple[list[tuple[str, dict[str, Any]]], list[str]]] = {
    'resnet18': (
        [
            ('doconv', {}),
            ('refconv', {}),
            *(('acconv', {'branch_norm': norm}) for norm in ('batch', 'scale', 'none')),
            *(('dbbconv', {'branch_norm': norm}) for norm in ('batch', 'scale')),
            ('orepaconv', {}),
        ],
        ['DOConv2d', 'RepConv', 'ACBlock', 'DiverseBranchBlock', 'OREPA'],
    ),
    'mobilenetv2_100': ([('dyconv', {})], ['Dynamic_conv2d', 'CondConv2d']),
}
# class: the variant whose layers it replaces, the files that may hold it, the first one preferred
REFERENCES = {
    'DOConv2d': ('doconv', ['do_conv_pytorch_1_10.py', 'do_conv_pytorch.py']),
    'ACBlock': ('acconv', ['acb.py']),
    'DiverseBranchBlock': ('dbbconv', ['diversebranchblock.py']),
    'OREPA': ('orepaconv', ['blocks.py']),
    'RepConv': ('refconv', ['ImageNet-MobileNetv3-RefConv.py']),
    'Dynamic_conv2d': ('dyconv', ['dynamic_conv.py']),
    'CondConv2d': ('dyconv', []),
}


class Routed(nn.Module):
    """A conditional convolution with a routing of its own, as timm's blocks compute theirs."""

    def __init__(self, conv: nn.Conv2d, experts: int = 4):
        super().__init__()
        self.routing = nn.Linear(conv.in_channels, experts)
        self.conv = CondConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            num_experts=experts,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x, torch.sigmoid(self.routing(x.mean((2, 3)))))


def definitions(path: Path) -> dict[str, Any]:
    """The classes and functions of a file and of the files beside it that it imports, without running anything else."""
    libraries = {'collections', 'itertools', 'math', 'numpy', 'torch'}
    namespace: dict[str, Any] = {'__name__': path.stem}
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Import):
            node.names = [alias for alias in node.names if alias.name.partition('.')[0] in libraries]
            wanted = bool(node.names)
        elif isinstance(node, ast.ImportFrom):
            beside = path.parent / f'{node.module}.py'
            if beside.is_file():
                namespace |= definitions(beside)
            wanted = (node.module or '').partition('.')[0] in libraries
        elif isinstance(node, ast.Assign):  # helpers such as _pair
            wanted = all(isinstance(target, ast.Name) and target.id.startswith('_') for target in node.targets)
        else:
            wanted = isinstance(node, (ast.ClassDef, ast.FunctionDef))
        if wanted:
            exec(compile(ast.Module([node], []), str(path), 'exec'), namespace)
    return namespace


def reference_layer(name: str, cls: type[nn.Module], conv: nn.Conv2d) -> nn.Module:
    """Build the reference's layer in the place of a convolution."""
    if name == 'CondConv2d':
        return Routed(conv)
    if name == 'OREPA' and conv.kernel_size == (1, 1):
        cls = cls.__init__.__globals__['OREPA_1x1']
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size[0])
    options = dict(stride=conv.stride[0], padding=conv.padding[0], groups=conv.groups)
    if name in ('DOConv2d', 'Dynamic_conv2d'):
        options['bias'] = conv.bias is not None
    layer = cls(*sizes, **options)
    if name == 'RepConv':
        layer.weight.copy_(conv.weight.detach())  # its base kernel; zero as it is built
    return layer


def build_reference(backbone: str, name: str, cls: type[nn.Module], **model_args: Any) -> nn.Module:
    """Build a backbone with the reference's layers where the variant has its own."""
    model = timm.create_model(backbone, **model_args)
    for place, reason in plan_conversion(model, REFERENCES[name][0]).items():
        if not reason:
            model.set_submodule(place, reference_layer(name, cls, model.get_submodule(place)))
            if name in ('ACBlock', 'DiverseBranchBlock', 'OREPA'):  # they bring their norms
                norm = f'{place[:-1]}1' if 'downsample' in place else place.replace('conv', 'bn')
                model.set_submodule(norm, nn.Identity())
    return model


def find_references(folders: Sequence[Path]) -> dict[str, type[nn.Module]]:
    """Find the references' classes."""
    found: dict[str, type[nn.Module]] = {'CondConv2d': CondConv2d}
    for name, (_, files) in REFERENCES.items():
        paths = [path for file in files for folder in folders for path in sorted(folder.rglob(file))]
        holders = [path for path in paths if f'class {name}(' in path.read_text(encoding='utf-8')]
        if holders:
            found[name] = definitions(holders[0])[name]
    return found


def build_models(
    backbone: str, found: dict[str, type[nn.Module]], model_args: dict[str, Any]
) -> dict[str, Callable[[], nn.Module]]:
    """Give every model of a run by the name of its row, the stock model first."""
    variants, references = ROWS[backbone]
    models = {backbone: partial(timm.create_model, backbone, **model_args)}
    for variant, options in variants:
        words = ''.join(f', {key}={value!r}' for key, value in options.items())
        models[f'{backbone}_{variant}{words}'] = partial(
            timm.create_model, f'{backbone}_{variant}', conv_options=options, **model_args
        )
    for name in references:
        if name in found:
            label = 'timm' if name == 'CondConv2d' else 'reference'
            models[f'{label} {name}'] = partial(build_reference, backbone, name, found[name], **model_args)
    return models


def measure(
    backbone: str, found: dict[str, type[nn.Module]], device: str, num_classes: int, **options: Any
) -> tuple[list[Profile], dict[str, str]]:
    """Measure one backbone in one setting; also returns which references could not run, and why."""
    models, left_out = {}, {}
    for name, build in build_models(backbone, found, {'num_classes': num_classes}).items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # RefConv's base is random here: it is timed, not trained
            model = build().to(device)
        if not name.startswith(backbone):
            try:
                compare_profiles(model, **{**options, 'runs': 1, 'warmup': 0})
            except RuntimeError as error:
                left_out[name] = str(error).splitlines()[0]
                continue
        models[name] = model
    return compare_profiles(*models.values(), names=list(models), **options), left_out


def environment(device: str) -> dict[str, Any]:
    """Describe machine, versions and command; of the references' folders only their names."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    command = ['python', 'tests/benchmarks/training_step.py']
    command += [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return {
        'command': shlex.join(command),
        'date': date.today().isoformat(),
        'cpu': device_name(torch.device('cpu')),
        'cores': cores,
        'threads': torch.get_num_threads(),
        'gpu': device_name(torch.device(device)) if torch.device(device).type == 'cuda' else None,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_reparam': timm_reparam.__version__,
    }


def setting(text: str) -> tuple[int, int]:
    """Parse 32x64: a batch of 32 images of 64x64 pixels."""
    batch_size, _, pixels = text.partition('x')
    return int(batch_size), int(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description='Time and memory of a training step beside reference implementations.')
    parser.add_argument('--reference', nargs='+', type=Path, default=[], metavar='FOLDER', help='their code')
    parser.add_argument('--backbone', nargs='+', choices=tuple(ROWS), default=list(ROWS), help='(default: all)')
    parser.add_argument(
        '--setting', nargs='+', type=setting, default=[(32, 64), (16, 128)], metavar='BATCHxPIXELS',
        help='(default: 32x64 16x128)',
    )  # fmt: skip
    parser.add_argument('--runs', type=int, default=30, metavar='N', help='timed rounds (default: 30)')
    parser.add_argument('--num-classes', type=int, default=10, metavar='N', help='(default: 10)')
    parser.add_argument('--device', default='cpu', help='(default: cpu)')
    parser.add_argument('--precision', default='float32', help='as of timm-reparam profile (default: float32)')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')
    parser.add_argument('-o', '--output', type=Path, metavar='NAME', help='write NAME.json, .txt, .svg')
    args = parser.parse_args()
    for folder in args.reference:
        if not folder.is_dir():
            parser.error(f'{folder}: expected a folder')

    if args.output is not None:
        check_plot(f'{args.output}.svg')

    found = find_references(args.reference)
    facts = environment(args.device)
    drawn: list[Profile] = []
    texts, rows, left_out = ['\n'.join(f'{key}: {value}' for key, value in facts.items() if value is not None)], [], []
    for backbone in args.backbone:
        for batch_size, pixels in args.setting:
            profiles, failures = measure(
                backbone, found, args.device, args.num_classes, train=True, runs=args.runs, batch_size=batch_size,
                input_size=(3, pixels, pixels), precision=args.precision, channels_last=args.channels_last,
                torchcompile=args.torchcompile,
            )  # fmt: skip
            rows += [profile.to_dict() for profile in profiles]
            if (batch_size, pixels) == args.setting[-1]:
                drawn += profiles[1:]  # the stock model is the one of the ratios
            left_out += [{'name': name, 'batch_size': batch_size, 'error': why} for name, why in failures.items()]
            texts += [format_profiles(profiles), *(f'left out: {name}: {why}' for name, why in failures.items())]
            print('\n\n'.join(texts[-1 - len(failures) :]), end='\n\n', flush=True)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        results = {**facts, 'left_out': left_out, 'profiles': rows}
        Path(f'{args.output}.json').write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
        plot_profiles(drawn, f'{args.output}.svg')
        Path(f'{args.output}.txt').write_text('\n\n'.join(texts) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
