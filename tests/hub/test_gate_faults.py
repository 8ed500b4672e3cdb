"""Planted faults in saved pairs and in repos on the loopback Hub: the gate finds them all; see tests/faults.py.

Whatever is planted, the hashes that the two forms record of one another are put right, the cards are rendered again
and, in repos, the self-check tensors are made again: nothing but a look at the models and at what is said of them can
tell.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
import safetensors.torch
import timm
import torch
from faults import DYNAMIC, FAULTS, STATIC, Fault, planted
from stand_in import disturbed
from torch import nn

from hub.server import HubServer
from timm_reparam import ReparamError, register_variant
from timm_reparam.hub import (
    VerifyReport,
    load_checkpoint,
    publish,
    pull,
    render_card,
    save_pair,
    self_check,
    verify,
    verify_pair,
)
from timm_reparam.variants import VARIANTS

RESNET, CONVNEXT = 'resnet10t', 'convnext_atto'
OPTIONS: dict[str, dict[str, Any]] = {
    RESNET: dict(channels=(8, 8, 8, 8), stem_width=4),
    CONVNEXT: dict(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)),  # its convolutions have biases, and some are depthwise
}
# the branches of some sit on the middle of a kernel, which the even ones of a ConvNeXt's patches do not have
ODD_ONLY = ('acconv', 'dbbconv', 'orepaconv')
VARIANTS_OF = {RESNET: tuple(VARIANTS), CONVNEXT: tuple(name for name in VARIANTS if name not in ODD_ONLY)}
# every second block of each has a gamma of 0, which hides all that lies before it
HIDING = {
    RESNET: ('layer2.0.bn2.weight', 'layer4.0.bn2.weight'),
    CONVNEXT: ('stages.1.blocks.0.gamma', 'stages.3.blocks.0.gamma'),
}
SHOWN, HIDDEN = ('layer1.0', 'layer3.0'), ('layer2.0', 'layer4.0')
CHECK = 'test/rand_tensors.safetensors'
FACTS = {
    'base_model': {'id': 'timm/resnet10t.c3_in1k', 'license': 'apache-2.0'},
    'dataset': {'name': 'Digits', 'label_names': ['a', 'b', 'c', 'd']},
    'metrics': {'train_time': {'top1': 90.0}, 'fused': {'top1': 90.0}},
}

Folders = tuple[Path, Path]
How = Callable[[Path, Path], None]


@dataclasses.dataclass(frozen=True)
class Saved:
    """The files of a pair that is right, by folder, and its two models."""

    files: dict[str, dict[str, bytes]]
    model: nn.Module
    fused: nn.Module

    def write(self, zoo: Path) -> Folders:
        """Write the two folders."""
        for folder, files in self.files.items():
            (zoo / folder).mkdir(parents=True)
            for name, content in files.items():
                (zoo / folder / name).write_bytes(content)
        first, second = self.files
        return zoo / first, zoo / second


@functools.cache
def saved(stock: str, variant: str, seed: int = 1) -> Saved:
    """A right pair, with hidden blocks; it is shared."""
    name = register_variant(stock, variant)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as zoo:
        torch.manual_seed(seed)
        model = disturbed(timm.create_model(name, num_classes=4, **OPTIONS[stock]), seed).eval()
        for hiding in HIDING[stock]:
            model.get_parameter(hiding).data.zero_()
        folders = save_pair(
            model, Path(zoo) / 'zoo', tag='t', facts=FACTS, data_config=dict(input_size=(3, 32, 32), crop_pct=1.0)
        )
        files = {folder.name: {path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders}
        return Saved(files, *map(load_checkpoint, folders))


def repair(folders: Folders) -> None:
    """Make each form record the hash of the other one, and render both cards again."""
    for one, other in (folders, reversed(folders)):
        sha256 = hashlib.sha256((other / 'model.safetensors').read_bytes()).hexdigest()
        edit_json(one / 'training.json', lambda facts, sha256=sha256: facts['sibling'].update(sha256=sha256))
    for one in folders:
        (one / 'README.md').write_text(render_card(one), encoding='utf-8')


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / 'model.safetensors')
    edit(tensors)
    write_weights(folder, tensors)


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def said(report: VerifyReport) -> str:
    """What is wrong by a report, empty if nothing is; what the planter puts right is not."""
    assert report.passed == (not report.problems)
    assert all(right for name, right in report.checks.items() if name.endswith((': card', ': one save', ' tensors')))
    return '\n'.join(report.problems)


def is_named(report: VerifyReport, place: str) -> bool:
    """Whether a comparison of the models has found something wrong in a place."""
    found = [*(f'{layer.name}:' for layer in report.fusion.layers_off), *report.fusion.problems]
    return any(re.match(rf'{re.escape(place)}[.:]', text) for text in found)


# the faults of tests/faults.py

# Settings, types, forwards and the order of modules are in no file: a folder says them by the name of its architecture
# and the arguments that it is built with, which FILE_FAULTS below falsify.
SETTINGS = {
    *('another stride', 'no padding', 'another dilation', 'another padding mode', 'a padding mode lost'),
    *('padding on one side', 'SAME padding lost', 'an output padding', 'a class of another function'),
    *('a forward of its own', 'another eps', 'another momentum', 'a norm with a forward of its own'),
    *('another number of groups', 'another slope', 'another activation', 'an activation that is skipped'),
    *('another activation of a norm', 'an activation that is new', 'an idle module that is none'),
    *('an idle module with a forward of its own', 'a class of the same name', 'modules in another order'),
    *('another pooling', 'pooling of another kind', 'another number of the model', 'fuse forgets the stride'),
    *('a layer that is not what its method says', 'an attention without effect'),
    # timm loads every tensor into the dtype of the model: these have the same values there
    *('a bias in another dtype', 'a block in another dtype'),
}
# Layers that no timm model here has: one that runs twice, one that is not reached, a transposed one, ACNet's block.
NO_SUCH_LAYER = {'again', 'spare', 'up', 'block'}
# Where the others are: for a place in the network of faults.py, those of a timm model that are most like it.
PLACES = {
    '': ('',),
    'stem': ('conv1.6',),
    'blocks.0.conv1': tuple(f'{block}.{conv}' for block in SHOWN for conv in ('conv1', 'conv2')),
    'blocks.1.conv1': tuple(f'{block}.{conv}' for block in HIDDEN for conv in ('conv1', 'conv2')),
    'blocks.0.bn1': tuple(f'{block}.bn1' for block in SHOWN),
    'blocks.1.bn1': tuple(f'{block}.bn1' for block in HIDDEN),
    'blocks.0.bn2': tuple(f'{block}.bn2' for block in SHOWN),
    'blocks.1.bn2': tuple(f'{block}.bn2' for block in HIDDEN),
    'blocks.0.conv2': ('stages.0.blocks.0.conv_dw', 'stages.2.blocks.0.conv_dw'),
    'blocks.1.conv2': ('stages.1.blocks.0.conv_dw', 'stages.3.blocks.0.conv_dw'),
    'blocks.1': HIDDEN,
    'reflect': ('stages.2.blocks.0.conv_dw',),
    'point': ('layer3.0.downsample.1',),
    'head': ('fc',),
}
# Layer classes that are wrong where there are biases; the others are everywhere.
OF_BIASES = {'fuse forgets the bias'}
IN_FILES = [fault for fault in FAULTS if fault.name not in SETTINGS and fault.where not in NO_SUCH_LAYER]
Case = tuple[Fault, str, str]


def network(place: str) -> str:
    """The architecture that has a place."""
    return CONVNEXT if place.startswith('stages') else RESNET


def kinds_of_places(fault: Fault) -> list[list[str]]:
    """Where a fault can be planted: the places that are shown, and those that are hidden."""
    wheres = fault.places
    if fault.broken is not None:
        wheres = [f'blocks.{number}.conv{2 if fault.name in OF_BIASES else 1}' for number in (0, 1)]
    parts = [where.partition('.attention') for where in wheres]
    return [[f'{place}{dot}{rest}' for place in PLACES[layer]] for layer, dot, rest in parts]


def layer_of(place: str) -> str:
    return place.partition('.attention')[0]


def packed() -> dict[str, list[Case]]:
    """Every fault once: those of one variant lie in different layers of few models, shown and hidden in turns."""
    models: dict[str, list[Case]] = {}
    for number, fault in enumerate(IN_FILES):
        kinds = kinds_of_places(fault)
        choices = [place for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)] for place in kind]
        stock = network(choices[0])
        variants = [variant for variant in fault.variants if variant in VARIANTS_OF[stock]]
        variant = variants[number // 2 % len(variants)]
        for index in itertools.count(1):
            others = models.setdefault(f'{stock}_{variant} {index}', [])
            taken = {layer_of(place) for _, _, place in others}
            free = [place for place in choices if layer_of(place) not in taken]
            if free:
                others.append((fault, variant, free[0]))
                break
    return models


PACKED = packed()
# every fault alone, in every variant, in a place of each kind; what is wrong with a class is so in the whole model
ALONE = [
    (fault, variant, kind[0])
    for fault in IN_FILES
    for kind in kinds_of_places(fault)[: 1 if fault.broken else None]
    for variant in fault.variants
    if variant in VARIANTS_OF[network(kind[0])]
]


@torch.no_grad()
def plant(fused: nn.Module, fault: Fault, variant: str, place: str, whole: bool) -> nn.Module:
    """A fused model with one more fault in it; what is wrong with a class is so in the whole model, or in one layer."""
    right = saved(network(place), variant)
    with planted(fault, place if fault.broken is None else '', variant, right.model, fused) as faulty:
        if fault.broken is not None and not whole:
            wrong, faulty = faulty.get_submodule(place), copy.deepcopy(fused)
            faulty.get_submodule(place).load_state_dict(wrong.state_dict())
    assert not are_equal(faulty.state_dict(), fused.state_dict()), f'no weights show it, add it to SETTINGS: {fault}'
    return faulty


def verify_with(fused: nn.Module, zoo: Path, stock: str, variant: str) -> VerifyReport:
    """What the gate says of a pair with another fused form."""
    folders = saved(stock, variant).write(zoo)
    write_weights(folders[1], fused.state_dict())
    repair(folders)
    return verify_pair(folders[0])


def are_alike(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in others.items()}


def are_equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return are_alike(tensors, others) and all(
        torch.equal(t.double(), others[name].double()) for name, t in tensors.items()
    )


@pytest.mark.parametrize('stock, variant', [(RESNET, 'acconv'), (CONVNEXT, 'doconv')])
def test_the_right_pair_is_verified(tmp_path: Path, stock: str, variant: str) -> None:
    folders = saved(stock, variant).write(tmp_path)
    repair(folders)
    report = verify_pair(folders[1])
    assert not said(report) and not report.warnings and report.fusion.passed


@pytest.mark.parametrize('model', PACKED)
def test_planted_faults_are_found(tmp_path: Path, model: str) -> None:
    """Each one by the name of its layer; what is refused before models are compared is planted alone."""
    stock, variant = network(PACKED[model][0][2]), PACKED[model][0][1]
    right = together = saved(stock, variant).fused
    places = {}
    for fault, _, place in PACKED[model]:
        faulty = plant(together, fault, variant, place, whole=False)
        tensors = faulty.state_dict()
        if are_alike(tensors, right.state_dict()) and all(tensor.isfinite().all() for tensor in tensors.values()):
            together, places[fault.name] = faulty, layer_of(place)
        else:
            alone = plant(right, fault, variant, place, whole=False)
            words = said(verify_with(alone, tmp_path / str(fault), stock, variant))
            assert words and place in words, fault
    if places:
        report = verify_with(together, tmp_path / 'together', stock, variant)
        missed = [name for name, place in places.items() if not is_named(report, place)]
        assert said(report) and not missed, report


@pytest.mark.slow
@pytest.mark.parametrize('fault, variant, place', ALONE, ids=str)
def test_a_planted_fault_is_found(tmp_path: Path, fault: Fault, variant: str, place: str) -> None:
    stock = network(place)
    faulty = plant(saved(stock, variant).fused, fault, variant, place, whole=True)
    words = said(verify_with(faulty, tmp_path, stock, variant))
    assert words, 'a planted fault passes'
    assert layer_of(place) in words


@torch.no_grad()
def test_what_no_file_shows() -> None:
    """What is left out is left out for its reason: the weights stay as they are."""
    left_out = [fault for fault in FAULTS if fault.name in SETTINGS]
    assert {fault.name for fault in left_out} == SETTINGS
    for fault in left_out:
        model, fused, _ = faults.right(fault.variants[0], torch.float32)
        with planted(fault, fault.places[0], fault.variants[0], model, fused) as other:
            assert are_equal(other.state_dict(), fused.state_dict()), fault.name


# the train-time form is another one than that which was fused

LAYERS = {
    'acconv': (
        *('weight', 'vertical_weight', 'horizontal_weight', 'vertical_gamma', 'horizontal_gamma'),
        *('vertical_running_var', 'horizontal_running_var'),
    ),
    'dbbconv': (
        *('weight', 'point_weight', 'inner_weight', 'outer_weight', 'mean_weight'),
        *(f'{branch}_{kind}' for branch in ('point', 'sequential', 'mean') for kind in ('gamma', 'running_var')),
    ),
    'doconv': ('weight', 'depthwise_weight'),
    'orepaconv': (
        *('weight', 'mean_weight', 'prior_weight', 'point_weight', 'inner_weight', 'outer_weight'),
        *('depthwise_weight', 'pointwise_weight', 'prior', 'weight_gamma'),
        *(f'{branch}_gamma' for branch in ('mean', 'prior', 'point', 'sequential', 'separable')),
    ),
    'refconv': ('weight', 'map_weight'),
    'dyconv': (
        *('weight', 'residual_weight', 'temperature_position', 'temperature_steps'),
        *('attention.fc1.weight', 'attention.fc1.bias', 'attention.fc2.weight', 'attention.fc2.bias'),
    ),
}
NORM = ('weight', 'bias', 'running_mean', 'running_var')
CONVS = [place for pair in zip(PLACES['blocks.0.conv1'], PLACES['blocks.1.conv1']) for place in pair]
NORMS = [place for pair in zip(PLACES['blocks.0.bn1'], PLACES['blocks.1.bn1']) for place in pair]
# by variant: every tensor once, each in another layer, shown and hidden in turns; as many at a time as there are layers
TOGETHER = [
    (
        variant,
        [
            f'{place}.{name}'
            for group, names in ((CONVS, layer[first:]), (NORMS, NORM))
            for place, name in zip(group, names)
        ],
    )
    for variant, layer in LAYERS.items()
    for first in range(0, len(layer), len(CONVS))
]
CHANGED_ALONE = [
    (variant, f'{block}.{tensor}')
    for variant, names in LAYERS.items()
    for tensor in (*(f'conv1.{name}' for name in names), *(f'bn1.{name}' for name in NORM))
    for block in (SHOWN[0], HIDDEN[0])
]


def test_every_tensor_of_a_layer_is_changed() -> None:
    for variant, names in LAYERS.items():
        assert saved(RESNET, variant).model.layer1[0].conv1.state_dict().keys() == set(names)


def verify_changed(zoo: Path, variant: str, changed: list[str]) -> VerifyReport:
    """What the gate says of a pair whose train-time form has one entry of some tensors changed."""
    folders = saved(RESNET, variant).write(zoo)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in changed:
            entry = tensors[name].view(-1)[-1:]
            entry += 0.01 * entry if entry.is_floating_point() else entry // 4

    edit_weights(folders[0], change)
    repair(folders)
    return verify_pair(folders[0])


def module_of(tensor: str) -> str:
    return '.'.join(tensor.split('.')[:3])


@pytest.mark.parametrize('variant, changed', TOGETHER)
def test_a_changed_train_time_form_is_found(tmp_path: Path, variant: str, changed: list[str]) -> None:
    report = verify_changed(tmp_path, variant, changed)
    missed = [name for name in changed if not is_named(report, module_of(name))]
    assert said(report) and not missed, report


@pytest.mark.slow
@pytest.mark.parametrize('variant, name', CHANGED_ALONE)
def test_a_change_of_the_train_time_form_is_found(tmp_path: Path, variant: str, name: str) -> None:
    report = verify_changed(tmp_path, variant, [name])
    assert said(report) and is_named(report, module_of(name))


# whole files, configurations and claims


@dataclasses.dataclass(frozen=True)
class FileFault:
    """What can be wrong with the files of a pair.

    Args:
        name: What is wrong.
        how: Makes it so, given the folders of the train-time form and of the fused form.
        stock: The architecture.
        variants: The variants in which it can be so; all by default.
        slow: Whether it is planted in the slow run only, for another one is much like it.
    """

    name: str
    how: How
    stock: str = RESNET
    variants: tuple[str, ...] = ()
    slow: bool = False

    def __str__(self) -> str:
        return self.name.replace(' ', '_')

    @property
    def cases(self) -> list[tuple['FileFault', str]]:
        return [(self, variant) for variant in self.variants or VARIANTS_OF[self.stock]]


def fused_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> How:
    return lambda folder, fused: edit_weights(fused, edit)


def fused_args(**values: Any) -> How:
    """Other arguments of the fused form, which its weights fit, too, or do not."""
    return lambda folder, fused: edit_json(fused / 'config.json', lambda config: config['model_args'].update(values))


def train_time_args(**values: Any) -> How:
    return lambda folder, fused: edit_json(folder / 'config.json', lambda config: config['model_args'].update(values))


def layer_options(**values: Any) -> How:
    def edit(config: dict[str, Any]) -> None:
        config['model_args']['conv_options'].update(values)

    return lambda folder, fused: edit_json(folder / 'config.json', edit)


def fused_cfg(**values: Any) -> How:
    return lambda folder, fused: edit_json(
        fused / 'config.json', lambda config: config['pretrained_cfg'].update(values)
    )


def fused_config(**values: Any) -> How:
    return lambda folder, fused: edit_json(fused / 'config.json', lambda config: config.update(values))


def facts_of(form: int, key: str, value: Any) -> How:
    """Other facts of one form: a value, or some entries of a dict."""

    def edit(facts: dict[str, Any]) -> None:
        facts[key] = {**facts.get(key, {}), **value} if isinstance(value, dict) else value

    return lambda *folders: edit_json(folders[form] / 'training.json', edit)


def facts_of_both(key: str, value: Any) -> How:
    def how(*folders: Path) -> None:
        for form in (0, 1):
            facts_of(form, key, value)(*folders)

    return how


def of_another_seed(form: int) -> How:
    def how(*folders: Path) -> None:
        stock, _, variant = folders[0].name.removesuffix('.t').rpartition('_')
        name = folders[form].name
        (folders[form] / 'model.safetensors').write_bytes(saved(stock, variant, 2).files[name]['model.safetensors'])

    return how


def one_form_twice(source: int) -> How:
    """The model of one form in both places; facts that would tell are left out."""

    def how(*folders: Path) -> None:
        for name in ('config.json', 'model.safetensors'):
            (folders[1 - source] / name).write_bytes((folders[source] / name).read_bytes())
        for folder in folders:
            edit_json(folder / 'training.json', lambda facts: (facts.pop('variant'), facts.pop('stock_architecture')))

    return how


def in_dtype(dtype: torch.dtype, prefix: str = '') -> How:
    """Tensors rounded to a narrower dtype and stored in it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith(prefix) and tensor.is_floating_point():
                tensors[name] = tensor.to(dtype)

    return fused_weights(edit)


CONV = 'layer2.0.conv1.weight'  # in the hidden block
FILE_FAULTS = (
    # weights
    FileFault('a fused form of another seed', of_another_seed(1)),
    FileFault('a train-time form of another seed', of_another_seed(0), slow=True),
    FileFault('a fused form of another seed of a ConvNeXt', of_another_seed(1), CONVNEXT, slow=True),
    FileFault('the train-time form twice', one_form_twice(0)),
    FileFault('the fused form twice', one_form_twice(1), variants=STATIC),
    FileFault('a tensor that is not there', fused_weights(lambda tensors: tensors.pop(CONV))),
    FileFault('a tensor that is new', fused_weights(lambda t: t.update({'layer2.0.conv1.bias': torch.zeros(8)}))),
    FileFault('a tensor of another name', fused_weights(lambda t: t.update({f'{CONV}s': t.pop(CONV)})), slow=True),
    FileFault('a tensor of another shape', fused_weights(lambda t: t.update({CONV: t[CONV].reshape(8, 8, 9, 1)}))),
    FileFault('a kernel in bfloat16', in_dtype(torch.bfloat16, CONV), slow=True),
    FileFault('a kernel in float16', in_dtype(torch.float16, CONV)),
    FileFault('a kernel in whole numbers', in_dtype(torch.int8, CONV), slow=True),
    FileFault('the layer scale of a hidden block', fused_weights(lambda t: t[HIDING[CONVNEXT][0]].fill_(1)), CONVNEXT),
    # configuration: what it is built with
    FileFault('another activation', fused_args(act_layer='leaky_relu')),
    FileFault('another output stride', fused_args(output_stride=8)),
    FileFault('another pooling', fused_args(global_pool='max')),
    FileFault('an anti-aliasing that is new', fused_args(aa_layer='avgpool'), slow=True),
    FileFault('another stem', fused_args(stem_type='deep'), slow=True),
    FileFault('no pooling in the shortcut', fused_args(avg_down=False), slow=True),
    FileFault('another norm', fused_args(norm_layer='instancenorm2d')),
    FileFault('another eps', fused_args(norm_eps=1e-3), CONVNEXT),
    FileFault('another activation of a ConvNeXt', fused_args(act_layer='relu'), CONVNEXT, slow=True),
    FileFault('another output stride of a ConvNeXt', fused_args(output_stride=8), CONVNEXT, slow=True),
    FileFault('another pooling of a ConvNeXt', fused_args(global_pool='max'), CONVNEXT, slow=True),
    FileFault('another activation of the train-time form', train_time_args(act_layer='leaky_relu')),
    FileFault('another output stride of the train-time form', train_time_args(output_stride=16), slow=True),
    FileFault('another scale of the branches', layer_options(scale=0.5), variants=('acconv',)),
    FileFault('another eps of the branches', layer_options(eps=1e-3), variants=('acconv',)),
    FileFault('another kernel of the maps', layer_options(map_kernel_size=1), variants=('refconv',)),
    FileFault('another temperature', layer_options(temperature=10.0), variants=('dyconv',)),
    FileFault('another architecture', fused_config(architecture='resnet14t')),
    FileFault('another number of classes', fused_config(num_classes=3)),
    # configuration: what it is used with
    FileFault('other means', fused_cfg(mean=[0.5, 0.5, 0.5]), slow=True),
    FileFault('another size', fused_cfg(input_size=[3, 64, 64]), slow=True),
    FileFault('another crop', fused_cfg(crop_pct=0.5), slow=True),
    FileFault('another licence in the configuration', fused_cfg(license='gpl-3.0'), slow=True),
    FileFault('other labels', fused_config(label_names=['d', 'c', 'b', 'a'])),
    # claims
    FileFault('another variant', facts_of(1, 'variant', 'another'), slow=True),
    FileFault('another stock architecture', facts_of(1, 'stock_architecture', 'resnet26t')),
    FileFault('another size of tests', fused_cfg(test_input_size=[3, 64, 64])),
    FileFault('another crop of tests', fused_cfg(test_crop_pct=0.5), slow=True),
    FileFault('other descriptions of the labels', fused_config(label_descriptions={'a': 'b', 'b': 'a'}), slow=True),
    FileFault('another classifier', fused_cfg(classifier='layer4.0.conv2'), slow=True),
    FileFault(
        'another name of the same architecture',
        fused_config(architecture='convnext_femto'),
        CONVNEXT,
        ('doconv', 'refconv'),
    ),
    FileFault('the fused form twice, dynamic', one_form_twice(1), variants=DYNAMIC),
    FileFault('another accuracy of the first form', facts_of(0, 'metrics', {'train_time': {'top1': 99.0}}), slow=True),
    FileFault('another accuracy of the fused form', facts_of(1, 'metrics', {'fused': {'top1': 99.0}})),
    FileFault('another base model', facts_of(1, 'base_model', {'id': 'timm/resnet18.a1_in1k'}), slow=True),
    FileFault('another dataset', facts_of(1, 'dataset', {'name': 'ImageNet'}), slow=True),
    FileFault('another licence', facts_of(1, 'license', 'gpl-3.0'), slow=True),
    FileFault('another name of the other form', facts_of(1, 'sibling', {'name': 'another'}), slow=True),
    FileFault('another licence in both', facts_of_both('license', 'gpl-3.0')),
    FileFault('another number of layers in both', facts_of_both('fusion', {'num_layers': 1}), slow=True),
    FileFault(
        'a fusion that was not verified', facts_of_both('fusion', {'passed': False, 'problems': ['all']}), slow=True
    ),
    FileFault('another form', facts_of(1, 'form', 'train_time'), slow=True),
)
ALL_FILE_FAULTS = [case for fault in FILE_FAULTS for case in fault.cases]
# the variant changes from one to the next; a dynamic one, which takes twice the time, where there is no other
SOME_FILE_FAULTS = [
    fault.cases[number % min(len(fault.cases), len(STATIC))]
    for number, fault in enumerate(fault for fault in FILE_FAULTS if not fault.slow)
]


def found_in_files(zoo: Path, fault: FileFault, variant: str) -> str:
    folders = saved(fault.stock, variant).write(zoo)
    fault.how(*folders)
    repair(folders)
    return said(verify_pair(folders[0]))


@pytest.mark.parametrize('fault, variant', SOME_FILE_FAULTS, ids=str)
def test_a_fault_of_the_files_is_found(tmp_path: Path, fault: FileFault, variant: str) -> None:
    assert found_in_files(tmp_path, fault, variant), 'a planted fault passes'


@pytest.mark.slow
@pytest.mark.parametrize('fault, variant', [case for case in ALL_FILE_FAULTS if case not in SOME_FILE_FAULTS], ids=str)
def test_a_fault_of_the_files_is_found_everywhere(tmp_path: Path, fault: FileFault, variant: str) -> None:
    assert found_in_files(tmp_path, fault, variant), 'a planted fault passes'


# What is falsified in both forms alike, and cannot be measured again (accuracies, the data, the recipe), is left out:
# nothing in the files could tell. So are the figures of a fusion, which another machine measures otherwise, and the
# text of a card, which is a warning: see test_pull.py.


# repos


def planted_in(name: str, place: str) -> How:
    """A fault of tests/faults.py in a pair of the DO-Conv ResNet."""

    def how(folder: Path, fused: Path) -> None:
        (fault,) = (fault for fault in FAULTS if fault.name == name)
        faulty = plant(saved(RESNET, 'doconv').fused, fault, 'doconv', place, whole=True)
        write_weights(fused, faulty.state_dict())

    return how


def changed_d(folder: Path, fused: Path) -> None:
    edit_weights(folder, lambda tensors: tensors['layer2.0.conv1.depthwise_weight'][3].mul_(1.01))


REPO_FAULTS = (
    FileFault('a kernel', planted_in('rows and columns transposed', 'layer1.0.conv1')),
    FileFault('a hidden kernel', planted_in('two input channels swapped', 'layer2.0.conv1')),
    FileFault('a hidden norm', planted_in('means lost', 'layer4.0.bn1')),
    FileFault('tensors that are not there', planted_in('a norm that is skipped', 'layer1.0.bn1')),
    FileFault('the train-time form', changed_d),
    FileFault('another seed', of_another_seed(1)),
    FileFault('one form twice', one_form_twice(0)),
    FileFault('another activation', fused_args(act_layer='leaky_relu')),
    FileFault('a claim', facts_of(1, 'stock_architecture', 'resnet26t')),
)


# every fault by every way into a repo or out of it
WAYS = ('verify', 'pull', 'publish')
REPO_CASES = list(itertools.product(REPO_FAULTS, WAYS))
# every fault once; the way changes from one to the next
SOME_REPO_CASES = [(fault, WAYS[number % len(WAYS)]) for number, fault in enumerate(REPO_FAULTS)]


def plant_in_repos(hub: HubServer, owner: str, zoo: Path, fault: FileFault) -> Path:
    """Put a faulty pair into a zoo and on the Hub; the folder of its train-time form."""
    right = saved(RESNET, 'doconv')
    folders = right.write(zoo)
    fault.how(*folders)
    repair(folders)
    for folder in folders:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        try:
            model = load_checkpoint(folder)
        except ReparamError:
            model = right.fused  # as it was published before
        files[CHECK] = self_check(model, hashlib.sha256(files['model.safetensors']).hexdigest())
        hub.commit(f'{owner}/{folder.name}', files)
    hub.clear()
    return folders[0]


def is_found_in_repos(hub: HubServer, owner: str, place: Path, fault: FileFault, way: str) -> bool:
    folder = plant_in_repos(hub, owner, place / 'published', fault)
    repo = f'{owner}/{folder.name}'
    if way == 'verify':
        return bool(said(verify(repo)))
    with pytest.raises(ReparamError, match='is not verified' if way == 'pull' else 'not published'):
        pull(repo, place / 'zoo') if way == 'pull' else publish(folder, owner)
    return os.listdir(place) == ['published'] and not hub.commit_counts


@pytest.mark.parametrize('fault, way', SOME_REPO_CASES, ids=str)
def test_a_fault_in_a_repo_is_found(hub: HubServer, owner: str, tmp_path: Path, fault: FileFault, way: str) -> None:
    assert is_found_in_repos(hub, owner, tmp_path, fault, way)


@pytest.mark.slow
@pytest.mark.parametrize('fault, way', [case for case in REPO_CASES if case not in SOME_REPO_CASES], ids=str)
def test_a_fault_in_a_repo_is_found_in_every_way(
    hub: HubServer, owner: str, tmp_path: Path, fault: FileFault, way: str
) -> None:
    assert is_found_in_repos(hub, owner, tmp_path, fault, way)


@pytest.mark.slow
def test_the_right_pair_in_a_repo_is_verified(hub: HubServer, owner: str, tmp_path: Path) -> None:
    folders = saved(RESNET, 'doconv').write(tmp_path / 'published')
    repair(folders)
    publish(folders[0], owner)
    repo = f'{owner}/{folders[0].name}'
    assert not said(verify(repo)) and pull(repo, tmp_path / 'zoo').ok
