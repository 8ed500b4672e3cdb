"""The command line: what it prints, its exit status, and one line for every error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import timm_reparam
from timm_reparam.cli import main
from timm_reparam.hub import save_pair

TINY = dict(num_classes=2, channels=(8, 8, 8, 8), stem_width=4)
DATA_CONFIG = dict(input_size=(3, 32, 32), crop_pct=1.0)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    model = timm.create_model('resnet10t_doconv', **TINY).eval()
    return save_pair(model, tmp_path, tag='t', facts={}, data_config=DATA_CONFIG)


def run(*args: str, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, 'PYTHONPATH': str(Path(timm_reparam.__file__).parents[1])}
    command = [sys.executable, '-m', 'timm_reparam', *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)


def test_list(capsys: pytest.CaptureFixture):
    assert main(['list']) == 0
    names = capsys.readouterr().out.split()
    assert {'resnet18_acconv', 'resnet50_doconv', 'resnet101_refconv', 'mobilenetv2_100_dyconv'} <= set(names)
    assert names == sorted(set(names), key=names.index) and 'resnet18' not in names
    assert all(timm.is_model(name) for name in names)


def test_list_with_a_filter(capsys: pytest.CaptureFixture):
    assert main(['list', 'resnet18_*']) == 0
    names = capsys.readouterr().out.split()
    assert names == ['resnet18_acconv', 'resnet18_doconv', 'resnet18_dyconv', 'resnet18_refconv']


def test_list_pretrained(capsys: pytest.CaptureFixture):
    assert main(['list', 'resnet18_doconv*', '--pretrained']) == 0
    names = capsys.readouterr().out.split()
    assert 'resnet18_doconv.a1_in1k' in names
    assert all(name.startswith('resnet18_doconv.') for name in names)


def test_profile(capsys: pytest.CaptureFixture, pair: tuple[Path, Path]):
    assert (
        main(['profile', 'resnet18', 'resnet18_doconv', str(pair[0]), '--input-size', '3', '32', '32', '--runs', '1'])
        == 0
    )
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ['model', 'input', 'parameters', 'trainable', 'MACs', 'latency']
    assert [row.split('  ')[0] for row in rows] == [
        'resnet18',
        'resnet18_doconv',
        'resnet18_doconv, fused',
        str(pair[0]),
        f'{pair[0]}, fused',
    ]
    assert '11.69 M' in rows[0] and '11.69 M' in rows[2] and '11.69 M' not in rows[1]


def test_profile_with_other_channels(capsys: pytest.CaptureFixture):
    assert (
        main(['profile', 'resnet10t_acconv', '--input-size', '1', '32', '32', '--runs', '0', '--batch-size', '2']) == 0
    )
    assert '2x1x32x32' in capsys.readouterr().out


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


def test_verify_fails(capsys: pytest.CaptureFixture, tmp_path: Path, pair: tuple[Path, Path]):
    """Another model's fused form: an exit status, with both figures, not a traceback."""
    other = timm.create_model('resnet10t_doconv', **TINY).eval()
    folders = save_pair(other, tmp_path, tag='other', facts={}, data_config=DATA_CONFIG)
    for folder in (pair[0], folders[1]):
        (folder / 'training.json').unlink()
    assert main(['verify', str(pair[0]), '--fused', str(folders[1])]) == 1
    assert 'NOT' in capsys.readouterr().out


@pytest.mark.parametrize(
    'args, words',
    [
        (['profile', 'resnet_of_nobody'], 'resnet_of_nobody'),
        (['profile', 'resnet18', '--runs', '-1'], 'runs'),
        (['profile', 'resnet18', '--device', 'nonsense'], 'nonsense'),
        (['fuse', 'missing', 'out'], 'config.json'),
        (['verify', 'missing'], 'config.json'),
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
    'args', [[], ['nonsense'], ['fuse', 'one'], ['profile'], ['profile', 'm', '--input-size', '3']]
)
def test_usage(capsys: pytest.CaptureFixture, args: list[str]):
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    assert 'usage: timm-reparam' in capsys.readouterr().err


@pytest.mark.parametrize('command', [[], ['list'], ['profile'], ['fuse'], ['verify']])
def test_help(capsys: pytest.CaptureFixture, command: list[str]):
    with pytest.raises(SystemExit) as exit_:
        main([*command, '--help'])
    assert exit_.value.code == 0
    assert 'usage: timm-reparam' in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as exit_:
        main(['--version'])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f'timm-reparam {timm_reparam.__version__}\n'


def test_as_a_module():
    done = run('verify', 'missing')
    assert done.returncode == 1 and done.stderr.startswith('timm-reparam: /')


def test_reader_that_stops_early():
    env = {**os.environ, 'PYTHONPATH': str(Path(timm_reparam.__file__).parents[1])}
    code = "import sys; from timm_reparam.cli import main; sys.stdin.read(); sys.exit(main(['list']))"
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, '-c', code], env=env, stdin=subprocess.PIPE, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    os.close(reader)  # nobody reads any more when the first name is written
    _, errors = process.communicate('', timeout=120)
    assert (process.returncode, errors) == (0, '')
