"""The command line: what it prints, its exit status, and one line for every error."""

import argparse
import csv
import json
import os
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from fresh import finished, run_module, run_module_unread
from hub.server import HubServer
from stand_in import add_stock

import timm_reparam
from timm_reparam._cli_parser import build_parser
from timm_reparam.cli import main
from timm_reparam.hub import save_pair
from timm_reparam.plot import kernel_skeletons
from timm_reparam.results import COLUMNS
from timm_reparam.variants import VARIANTS

TINY = dict(num_classes=2, channels=(8, 8, 8, 8), stem_width=4)
DATA_CONFIG = dict(input_size=(3, 32, 32), crop_pct=1.0)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    model = timm.create_model('resnet10t_doconv', **TINY).eval()
    return save_pair(model, tmp_path, tag='t', facts={}, data_config=DATA_CONFIG)


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """The file of a training run, beside its summary."""
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_top1\n0,2.0,50.0\n1,1.0,60.0\n')
    settings = argparse.Namespace(model='resnet10t_doconv', num_classes=2, model_kwargs=dict(TINY))
    del settings.model_kwargs['num_classes']
    model = timm.create_model('resnet10t_doconv', **TINY)
    torch.save({'args': settings, 'state_dict': model.state_dict()}, folder / 'last.pth.tar')
    return folder / 'last.pth.tar'


def run(*words: str, folder: Path) -> subprocess.CompletedProcess:
    """What a command does in a process of its own."""
    return finished(run_module, 'timm_reparam', *words, folder=folder)


def test_list(capsys: pytest.CaptureFixture):
    assert main(['list']) == 0
    names = capsys.readouterr().out.split()
    assert {'resnet18_acconv', 'resnet50_doconv', 'resnet101_refconv', 'mobilenetv2_100_dyconv'} <= set(names)
    assert names == sorted(set(names), key=names.index) and 'resnet18' not in names
    assert all(timm.is_model(name) for name in names)


def test_list_with_a_filter(capsys: pytest.CaptureFixture):
    assert main(['list', 'resnet18_*']) == 0
    names = capsys.readouterr().out.split()
    assert names == [f'resnet18_{variant}' for variant in sorted(VARIANTS)] and len(names) >= 6


def test_list_pretrained(capsys: pytest.CaptureFixture):
    assert main(['list', 'resnet18_doconv*', '--pretrained']) == 0
    names = capsys.readouterr().out.split()
    assert 'resnet18_doconv.a1_in1k' in names
    assert all(name.startswith('resnet18_doconv.') for name in names)


def test_profile(capsys: pytest.CaptureFixture, pair: tuple[Path, Path]):
    """Each variant with its stock model and its fused form, once each; a folder's has the folder's sizes."""
    models = ['resnet18', 'resnet18_doconv', str(pair[0])]
    assert main(['profile', *models, '--input-size', '3', '32', '32', '--runs', '1']) == 0
    header, _, *rows = capsys.readouterr().out.split('\n\n')[0].splitlines()
    assert header.split() == ['model', 'input', 'parameters', 'trainable', 'MACs', 'latency', 'ratio']
    assert [row.split('  ')[0] for row in rows] == [
        'resnet18',
        'resnet18_doconv',
        'resnet18_doconv, fused',
        f'{pair[0]}, stock',
        str(pair[0]),
        f'{pair[0]}, fused',
    ]
    assert '11.69 M' in rows[0] and '11.69 M' in rows[2] and '11.69 M' not in rows[1]
    stock, train_time, fused = (row.rpartition(',')[2].split()[2:7] for row in rows[3:])
    assert stock[-3:] == fused[-3:]


@pytest.mark.filterwarnings('error', 'ignore::ResourceWarning')  # of files that earlier tests left to the collector
def test_profile_measures_a_checkpoint_and_its_stock_at_its_own_size(
    capsys: pytest.CaptureFixture, pair: tuple[Path, Path], training: Path
):
    settings = torch.load(training, weights_only=False)
    settings['args'].input_size = [3, 48, 48]
    torch.save(settings, training)
    for source, side in ((pair[0], 32), (training, 48)):
        assert main(['profile', str(source), '--runs', '0', '--format', 'json']) == 0
        profiles = json.loads(capsys.readouterr().out)
        assert [profile['input_size'] for profile in profiles] == 3 * [[3, side, side]]


def test_profile_says_nothing_of_weights(capsys: pytest.CaptureFixture):
    """A RefConv that is only measured needs no trained ones."""
    assert main(['profile', 'resnet10t_refconv', '--input-size', '3', '32', '32', '--runs', '0']) == 0
    assert 'resnet10t_refconv, fused' in capsys.readouterr().out


def test_profile_with_other_channels(capsys: pytest.CaptureFixture):
    assert (
        main(['profile', 'resnet10t_acconv', '--input-size', '1', '32', '32', '--runs', '0', '--batch-size', '2']) == 0
    )
    assert '2x1x32x32' in capsys.readouterr().out


def test_profile_with_options(capsys: pytest.CaptureFixture):
    command = ['profile', 'resnet10t_doconv', '--input-size', '3', '32', '32', '--runs', '0', '--format', 'json']

    def parameters(*options: str) -> list[int]:
        assert main([*command, *options]) == 0
        return [row['parameters'] for row in json.loads(capsys.readouterr().out)]

    plain, narrow = parameters(), parameters('--model-kwargs', 'channels=(8,8,8,8)')
    more = parameters('--conv-options', 'depth_multiplier=18')
    assert (more[0], more[2]) == (plain[0], plain[2]) and more[1] > plain[1]
    assert all(few < many for few, many in zip(narrow, plain))


def test_profile_of_training(capsys: pytest.CaptureFixture, tmp_path: Path):
    """Every figure is there, and the ratios are to the stock model of each variant."""
    command = ['profile', 'resnet10t_doconv', 'mobilenetv2_035_dyconv', '--train', '-b', '2', '--num-classes', '5']
    command += ['--input-size', '3', '32', '32', '--runs', '1', '--precision', 'float32', '--channels-last']
    file = tmp_path / 'costs.json'
    assert main([*command, '--format', 'json', '-o', str(file)]) == 0
    assert capsys.readouterr().out == ''
    rows = json.loads(file.read_text())
    assert [row['reference'] for row in rows] == ['resnet10t'] * 3 + ['mobilenetv2_035'] * 3
    for row in rows:
        assert (row['precision'], row['dtype'], row['channels_last']) == ('float32', 'float32', True)
        figures = ('step_ms', 'step_ratio', 'latency_ms', 'latency_ratio', 'activation_bytes', 'peak_bytes')
        assert all(row[name] > 0 for name in figures)
        if row['name'] == row['reference']:
            assert row['step_ratio'] == row['latency_ratio'] == 1
    assert rows[0]['parameters'] == rows[2]['parameters'] < rows[1]['parameters']
    assert rows[0]['activation_bytes'] == rows[2]['activation_bytes']
    assert rows[3]['activation_bytes'] < rows[4]['activation_bytes']
    head = timm.create_model('resnet10t', num_classes=5)
    assert rows[0]['parameters'] == sum(parameter.numel() for parameter in head.parameters())


def test_profile_as_csv(capsys: pytest.CaptureFixture):
    command = ['profile', 'resnet10t_doconv', '--input-size', '3', '32', '32', '--runs', '0', '--format', 'csv']
    assert main(command) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row['name'] for row in rows] == ['resnet10t', 'resnet10t_doconv', 'resnet10t_doconv, fused']
    assert rows[0]['macs'] == rows[2]['macs'] and rows[0]['latency_ms'] == ''


def test_output_goes_through_a_link_and_into_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture):
    command = ['profile', 'resnet10t', '--input-size', '3', '32', '32', '--runs', '0', '--format', 'csv', '-o']
    (tmp_path / 'costs.csv').write_text('old')
    (tmp_path / 'link.csv').symlink_to('costs.csv')
    assert main([*command, str(tmp_path / 'link.csv')]) == 0
    assert (tmp_path / 'link.csv').is_symlink() and (tmp_path / 'costs.csv').read_text().startswith('name,')
    os.mkfifo(tmp_path / 'pipe')
    reader = subprocess.Popen(['cat', str(tmp_path / 'pipe')], stdout=subprocess.PIPE, text=True)
    assert main([*command, str(tmp_path / 'pipe')]) == 0
    assert reader.communicate(timeout=60)[0] == (tmp_path / 'costs.csv').read_text()
    assert (tmp_path / 'pipe').is_fifo() and sorted(os.listdir(tmp_path)) == ['costs.csv', 'link.csv', 'pipe']


def test_profile_plot(capsys: pytest.CaptureFixture, tmp_path: Path):
    pytest.importorskip('matplotlib')
    file = tmp_path / 'ratios.svg'
    command = ['profile', 'resnet10t_doconv', '--input-size', '3', '32', '32', '--plot', str(file), '--runs']
    assert main([*command, '0']) == 1 and '--runs' in capsys.readouterr().err
    assert not file.exists()
    assert main([*command, '1']) == 0 and 'resnet10t_doconv, fused' in capsys.readouterr().out
    assert '<svg' in file.read_text()


def test_profile_of_a_training_run(capsys: pytest.CaptureFixture, training: Path):
    command = ['profile', str(training), '--input-size', '3', '32', '32', '--runs', '0', '--format', 'json']
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row['name'] for row in rows] == [f'{training}, stock', str(training), f'{training}, fused']
    assert rows[0]['parameters'] == rows[2]['parameters'] < rows[1]['parameters'] < 50_000


def test_plot_kernels(capsys: pytest.CaptureFixture, tmp_path: Path, pair: tuple[Path, Path], training: Path):
    """Every kind of source; an architecture without weights is the same one every time."""
    pytest.importorskip('matplotlib')
    first, second = tmp_path / '1.svg', tmp_path / '2.svg'
    sources = [str(pair[0]), str(pair[1]), str(training), 'resnet10t']
    assert main(['plot', 'kernels', *sources, '-o', str(first)]) == 0
    assert main(['plot', 'kernels', *sources, '-o', str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    for words in (
        '3x3',
        pair[0].name,
        pair[1].name,
        'run/last.pth.tar',
        'resnet10t',
        '(not trained)',
        'layer4',
        '2 layers',
    ):
        assert words in text
    assert str(tmp_path) not in text
    assert main(['plot', 'kernels', str(pair[0]), '-o', str(second), '--kernel-size', '1']) == 0
    assert '1x1' in second.read_text()
    assert main(['plot', 'kernels', str(pair[0]), '-o', str(tmp_path / '3.svg'), '--kernel-size', '7']) == 1
    assert f'{pair[0].name}: ResNet: expected 7x7' in capsys.readouterr().err and not (tmp_path / '3.svg').exists()


def test_plot_kernels_of_published_weights(hub: HubServer, tmp_path: Path):
    """A tag names weights, which a variant is lifted from."""
    pytest.importorskip('matplotlib')
    stock = add_stock(hub, 'resnet10t.c3_in1k')
    file = tmp_path / 'k.svg'
    assert main(['plot', 'kernels', 'resnet10t_doconv.c3_in1k', '-o', str(file)]) == 0
    text = file.read_text()
    values = [f'>{value:.2f}<' for s in kernel_skeletons(stock) for value in s.magnitude.flatten().tolist()]
    assert all(value in text for value in values) and 'not trained' not in text


def test_plot_curves(capsys: pytest.CaptureFixture, tmp_path: Path, training: Path):
    pytest.importorskip('matplotlib')
    file = tmp_path / 'c.png'
    assert main(['plot', 'curves', str(training.parent), '-o', str(file)]) == 0
    assert file.read_bytes().startswith(b'\x89PNG')
    assert main(['plot', 'curves', str(tmp_path / 'none'), '-o', str(tmp_path / 'd.png')]) == 1
    errors = capsys.readouterr().err
    assert 'none/summary.csv: cannot be read' in errors and errors.count('\n') == 1
    assert not (tmp_path / 'd.png').exists()


def test_plot_gains(capsys: pytest.CaptureFixture, tmp_path: Path):
    pytest.importorskip('matplotlib')
    results, file = tmp_path / 'r.csv', tmp_path / 'g.svg'
    with open(results, 'w', newline='') as table:
        writer = csv.DictWriter(table, list(COLUMNS))
        writer.writeheader()
        for method, top1 in (('stock', 90.0), ('doconv', 91.5)):
            row = dict(model='resnet18', method=method, protocol='scratch', epochs=40, seed=0, top1=top1, size=32)
            writer.writerow({**row, 'step_ratio': 1.25, 'data_sha256': 'aa'})
    assert main(['plot', 'gains', str(results), '-o', str(file)]) == 0
    assert '| `doconv` | 40 | 1 | 91.50 | +1.50 (one pair, no interval) | 1.25 |' in capsys.readouterr().out
    assert 'doconv (1 pair, no interval)' in file.read_text()
    results.write_text('model,method\n')
    assert main(['plot', 'gains', str(results), '-o', str(tmp_path / 'h.svg')]) == 1
    errors = capsys.readouterr().err
    assert 'r.csv' in errors and 'lacks the columns protocol, epochs' in errors and errors.count('\n') == 1
    assert not (tmp_path / 'h.svg').exists()


def test_fuse_and_verify(capsys: pytest.CaptureFixture, tmp_path: Path, pair: tuple[Path, Path]):
    out = tmp_path / 'fused'
    assert main(['fuse', str(pair[0]), str(out)]) == 0
    printed = capsys.readouterr().out
    assert 'algebra' in printed and 'stored' in printed and str(out) in printed
    assert (out / 'model.safetensors').read_bytes() == (pair[1] / 'model.safetensors').read_bytes()
    for command in (['verify', str(pair[0])], ['verify', str(pair[1])], ['verify', str(pair[0]), '--fused', str(out)]):
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert 'algebra' in printed and 'stored' in printed


def test_convert(capsys: pytest.CaptureFixture, tmp_path: Path, pair: tuple[Path, Path]):
    """A fused folder becomes one to train on, with options of the layers, and fuses to the same weights again."""
    out, fused = tmp_path / 'again', tmp_path / 'again_fused'
    options = ['--conv-options', 'branch_norm=none', 'skip=layer1*']
    assert main(['convert', str(pair[1]), '--model', 'resnet10t_acconv', '-o', str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert 'verified' in printed and 'NOT' not in printed and str(out) in printed
    config = json.loads((out / 'config.json').read_text())
    assert config['architecture'] == 'resnet10t_acconv'
    defaults = {'gamma_init': None, 'scale': 1.0, 'eps': 1e-5, 'momentum': 0.1, 'recompute': False}
    assert config['model_args']['conv_options'] == {**defaults, 'branch_norm': 'none', 'skip': ['layer1*']}
    assert main(['fuse', str(out), str(fused)]) == 0
    assert (fused / 'model.safetensors').read_bytes() == (pair[1] / 'model.safetensors').read_bytes()


def test_convert_of_a_file(capsys: pytest.CaptureFixture, tmp_path: Path, pair: tuple[Path, Path]):
    out = tmp_path / 'out'
    sizes = ['--model-kwargs', 'channels=(8,8,8,8)', 'stem_width=4']
    weights = str(pair[1] / 'model.safetensors')
    assert main(['convert', weights, '--model', 'resnet10t_doconv', '-o', str(out), *sizes]) == 0
    assert json.loads((out / 'config.json').read_text())['num_classes'] == 2
    assert main(['convert', weights, '--model', 'resnet18_doconv', '-o', str(tmp_path / 'no')]) == 1
    assert 'missing' in capsys.readouterr().err and not (tmp_path / 'no').exists()


def test_verify_fails(capsys: pytest.CaptureFixture, tmp_path: Path, pair: tuple[Path, Path]):
    """Another model's fused form: an exit status, with both figures, not a traceback."""
    other = timm.create_model('resnet10t_doconv', **TINY).eval()
    folders = save_pair(other, tmp_path, tag='other', facts={}, data_config=DATA_CONFIG)
    for folder in (pair[0], folders[1]):
        (folder / 'training.json').unlink()
    assert main(['verify', str(pair[0]), '--fused', str(folders[1])]) == 1
    assert 'NOT' in capsys.readouterr().out


def test_tokens_stay_out_of_every_error(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Also where it is not an error of our own, and in its traceback."""
    monkeypatch.setenv('HF_TOKEN', 'a-token-of-another-form')
    assert main(['-v', 'profile', 'resnet18', '--device', 'hf_aBcDeFgHiJkLmNoPqRsTuV a-token-of-another-form']) == 1
    printed = capsys.readouterr().err
    assert 'hf_aBc' not in printed and 'a-token-of-another-form' not in printed and 'Traceback' in printed


@pytest.mark.parametrize(
    'args, words',
    [
        (['profile', 'resnet_of_nobody'], 'resnet_of_nobody'),
        (['profile', 'resnet18', '--runs', '-1'], 'runs'),
        (['profile', 'resnet18', '--device', 'nonsense'], 'nonsense'),
        (['profile', 'resnet18', '--precision', 'float8'], 'float8'),
        (['profile', 'resnet18', '-o', 'no/costs.csv'], 'no/costs.csv'),
        (['profile', 'resnet18', '--conv-options', 'scale=2'], '--conv-options'),
        (['profile', 'resnet10t_doconv', '--conv-options', 'scale=2'], 'scale'),
        (['profile', 'resnet18', '--input-size', '3', '32', '32', '--torchcompile', 'nothing'], 'nothing'),
        (['plot', 'kernels', 'resnet_of_nobody', '-o', 'k.svg'], 'resnet_of_nobody'),
        (['plot', 'kernels', 'resnet18', '-o', 'k.txt'], 'k.txt: expected a name that ends in .png, .svg'),
        (['plot', 'kernels', 'resnet18', '-o', 'no/k.svg'], 'no/k.svg'),
        (['plot', 'kernels', 'mixer_s32_224', '-o', 'k.svg', '--kernel-size', '3'], 'expected 3x3'),
        (['plot', 'curves', 'runs', '-o', 'c.txt'], 'c.txt'),
        (['plot', 'gains', 'r.csv', '-o', 'g.txt'], 'g.txt'),
        (['fuse', 'missing', 'out'], 'config.json'),
        (['convert', 'missing', '--model', 'resnet18_doconv', '-o', 'out'], 'not found'),
        (['verify', 'missing'], 'config.json'),
        (['publish', 'missing', 'owner'], 'training.json'),
        (['sync', 'missing', 'owner'], 'missing'),
        (['pull', 'a/b/c', 'zoo'], 'expected a repo'),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch, args: list[str], words: str):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert captured.err.startswith('timm-reparam: ') and captured.err.count('\n') == 1 and words in captured.err
    assert main(['-v', *args]) == main([*args, '-v']) == 1
    assert capsys.readouterr().err.count('Traceback') == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    'args',
    [
        [],
        ['nonsense'],
        ['fuse', 'one'],
        ['profile'],
        ['profile', 'm', '--input-size', '3'],
        ['profile', 'm', '--format', 'xml'],
        ['plot'],
        ['plot', 'kernels', 'm'],
        ['plot', 'gains', 'a.csv', 'b.csv', '-o', 'g.svg'],
    ],
)
def test_usage(capsys: pytest.CaptureFixture, args: list[str]):
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    assert 'usage: timm-reparam' in capsys.readouterr().err


COMMANDS = [
    '',
    *('list', 'profile', 'plot', 'plot kernels', 'plot curves', 'plot gains', 'fuse', 'convert', 'verify'),
    *('publish', 'sync', 'pull', 'run'),
]


def parsers(parser: argparse.ArgumentParser, name: str = '') -> dict[str, argparse.ArgumentParser]:
    """The parser of a command, and those of all below it, by the words that lead there."""
    found = {name: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert action.choices.keys() == {choice.dest for choice in action._choices_actions if choice.help}
            for word, child in action.choices.items():
                found |= parsers(child, f'{name} {word}'.strip())
    return found


def test_the_commands():
    assert list(parsers(build_parser())) == COMMANDS


@pytest.mark.parametrize('command', COMMANDS)
def test_help(capsys: pytest.CaptureFixture, command: str):
    """Of every command, with every argument and what it means."""
    with pytest.raises(SystemExit) as exit_:
        main([*command.split(), '--help'])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f'usage: timm-reparam {command}'.strip())
    for action in parsers(build_parser())[command]._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert action.help and action.help.strip(), action
            assert all(option in text for option in action.option_strings)
            assert ' '.join(action.help.replace('%%', '%').split()) in ' '.join(text.split())


def test_version(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exit_:
        main(['--version'])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f'timm-reparam {timm_reparam.__version__}\n'


def test_hub_commands(capsys: pytest.CaptureFixture, hub: HubServer, tmp_path: Path, pair, monkeypatch):
    """To the Hub and back: what is printed, and the exit status."""
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    hub.orgs['cli'] = {'owner'}
    repo_id = f'cli/{pair[0].name}'
    zoo, other = str(pair[0].parent), str(tmp_path / 'pulled')
    assert main(['publish', str(pair[0]), 'cli']) == 1
    assert '--license' in capsys.readouterr().err
    assert main(['publish', str(pair[0]), 'cli', '--license', 'mit', '--dry-run', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['counts'] == {'planned': 2} and not hub.commit_counts
    assert main(['publish', str(pair[0]), 'cli', '--license', 'mit']) == 0
    assert capsys.readouterr().out.count('sent') == 2
    assert main(['sync', zoo, 'cli', '--license', 'mit', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['counts'] == {'skipped': 2}
    assert main(['sync', zoo, 'cli', '--json']) == 1
    assert json.loads(capsys.readouterr().out)['ok'] is False
    assert main(['pull', repo_id, other]) == 0
    assert main(['verify', f'{other}/{pair[0].name}']) == 0
    capsys.readouterr()
    assert main(['verify', repo_id, '--json']) == 0
    assert json.loads(capsys.readouterr().out)['passed'] is True
    hub.commit(repo_id, {'README.md': '# Mine'})
    assert main(['verify', repo_id]) == 1
    assert 'NOT verified' in capsys.readouterr().out
    assert main(['verify', 'cli/nothing']) == 1
    assert 'no such model' in capsys.readouterr().err


@pytest.mark.parametrize('numbers', [(1, 5), pytest.param((0, 2, 3, 4, 5), marks=pytest.mark.slow)])
def test_variants_that_were_registered_at_run_time(tmp_path: Path, numbers: tuple[int, ...]):
    """Other processes than the one that registered an architecture read what that one saved."""
    name = timm_reparam.register_variant('regnetx_002', 'doconv')
    model = timm.create_model(name, num_classes=2).eval()
    pair = save_pair(model, tmp_path / 'zoo', tag='t', facts={}, data_config=DATA_CONFIG)
    settings = argparse.Namespace(model=name, num_classes=2, model_kwargs={}, input_size=DATA_CONFIG['input_size'])
    torch.save({'args': settings, 'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    (tmp_path / 'script.py').write_text('import sys, timm\ntimm.create_model(sys.argv[1].partition("=")[2])\n')
    commands = (
        ['fuse', str(pair[0]), 'from_folder'],
        ['fuse', 'last.pth.tar', f'{name}.again_fused'],
        ['convert', str(pair[1]), '--model', name, '-o', 'back'],
        ['verify', str(pair[0])],
        ['profile', name, '--conv-options', 'depth_multiplier=18', '--input-size', '3', '32', '32', '--runs', '0'],
        ['run', 'script.py', f'--model={name}.some_tag'],
    )
    *others, script = (run(*commands[number], folder=tmp_path) for number in numbers)
    assert [done.returncode for done in others] == [0] * len(others), [done.stderr for done in others]
    assert script.returncode == 1 and 'some_tag' in script.stderr.splitlines()[-1]  # the tag is refused, not the name


def test_run(tmp_path: Path):
    """A script sees its own arguments, its own folder and the variants; its exit status is that of the command."""
    (tmp_path / 'beside.py').write_text('WORD = "beside"')
    (tmp_path / 'script.py').write_text(
        'import sys, timm, beside\n'
        'assert __name__ == "__main__" and timm.is_model("resnet18_doconv")\n'
        'print(beside.WORD, sys.argv)\n'
        'if "--fail" in sys.argv: raise KeyError("own")\n'
        'sys.exit(7)\n'
    )
    done = run('run', 'script.py', '-v', '--help', 'x', folder=tmp_path)
    assert (done.returncode, done.stdout) == (7, "beside ['script.py', '-v', '--help', 'x']\n"), done.stderr
    missing = run('run', 'missing.py', folder=tmp_path)
    assert missing.returncode == 1 and missing.stderr.count('\n') == 1
    assert missing.stderr.startswith('timm-reparam: missing.py')
    failed = run('run', 'script.py', '--fail', folder=tmp_path)
    assert failed.returncode == 1 and "KeyError: 'own'" in failed.stderr


def test_as_a_module(tmp_path: Path):
    done = run('verify', 'missing', folder=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith('timm-reparam: /')


def test_reader_that_stops_early(tmp_path: Path):
    done = finished(run_module_unread, 'timm_reparam', 'list', folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
