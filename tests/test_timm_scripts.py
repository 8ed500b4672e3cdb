"""timm's own scripts, unchanged, from the folder that the environment variable TIMM_SCRIPTS names.

No release of timm on the package index carries them: they are in its repository, beside the package.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from hub.server import HubServer

import timm_reparam
from timm_reparam.cli import main
from timm_reparam.hub import load_checkpoint
from timm_reparam.hub.training import load_training
from timm_reparam.layers import DynamicConv2d

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPTS = ('train.py', 'validate.py', 'benchmark.py', 'inference.py', 'onnx_export.py')
CLASSES, TRAIN_IMAGES, VALIDATION_IMAGES, BATCH = 4, 24, 10, 16  # images: of each class
STEPS = 2 * (CLASSES * TRAIN_IMAGES // BATCH)  # of two epochs
SIZE = ('--num-classes', str(CLASSES), '--img-size', '32', '--device', 'cpu')
OPTIONS = {
    'resnet18_doconv': (),
    'mobilenetv2_035_dyconv': ('--model-kwargs', f"conv_options={{'temperature_steps': {STEPS}}}"),
}


@pytest.fixture(scope='module')
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = os.environ.get('TIMM_SCRIPTS')
    if not source:
        pytest.skip("TIMM_SCRIPTS names no folder with timm's scripts; the README says where to get them")
    folder = tmp_path_factory.mktemp('scripts')
    for name in SCRIPTS:  # alone: the package beside them in a checkout would come before the installed one
        shutil.copy(Path(source) / name, folder)
    return folder


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images, scans of handwritten digits, in the folders that timm's scripts expect."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp('photos'), load_digits(n_class=CLASSES)
    for label in range(CLASSES):
        images = digits.images[digits.target == label]
        for index, image in enumerate(images[: TRAIN_IMAGES + VALIDATION_IMAGES]):
            path = folder / ('train' if index < TRAIN_IMAGES else 'validation') / str(label) / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype('uint8')).convert('RGB').save(path)
    return folder


def start(*command: object, folder: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(timm_reparam.__file__).parents[1]), os.environ.get('PYTHONPATH', '')])
    environment = {**os.environ, 'PYTHONPATH': path.rstrip(os.pathsep)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, env=environment, **pipes)


def run(*command: object, folder: Path) -> str:
    process = start(*command, folder=folder)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-3000:]
    return printed


@pytest.fixture(scope='module', params=OPTIONS)
def trained(
    request: pytest.FixtureRequest, scripts: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A model's name and its last.pth.tar after two epochs, of which the second is that of a resumed run."""
    name, folder = request.param, tmp_path_factory.mktemp('run')
    last = folder / 'output' / 'train' / 'photos' / 'last.pth.tar'
    data = ('--data-dir', photos, '--workers', 0, '--batch-size', BATCH, '--experiment', 'photos')
    recipe = ('--epochs', 2, '--warmup-epochs', 0, '--lr', 0.01)
    command = [scripts / 'train.py', '--device-modules', 'timm_reparam', '--model', name, *SIZE, *data, *recipe]
    command += OPTIONS[name]
    first = start(*command, folder=folder)
    while not last.exists() and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    printed, _ = first.communicate()
    assert last.exists(), printed[-3000:]
    if name.endswith('dyconv'):
        assert temperatures(last) == {1 + 29 / 2}
    printed = run(*command, '--resume', last, folder=folder)
    assert 'Train: 1 ' in printed and 'Train: 0 ' not in printed
    return name, last


def temperatures(last: Path) -> set[float]:
    layers = [module for module in load_training(last)[0].modules() if isinstance(module, DynamicConv2d)]
    assert layers
    return {float(layer.current_temperature()) for layer in layers}


def script(scripts: Path, name: str, *args: object) -> str:
    return run('-m', 'timm_reparam', 'run', scripts / name, *args, folder=scripts)


def result(printed: str) -> dict:
    return json.loads(printed.partition('--result')[2])


@pytest.mark.parametrize('trained', ['mobilenetv2_035_dyconv'], indirect=True)
def test_temperature_has_annealed(trained: tuple[str, Path]):
    assert temperatures(trained[1]) == {1.0}


def test_fuse_and_publish(
    trained: tuple[str, Path], tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
):
    name, last = trained
    hub.orgs['scripts'] = {'owner'}
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    assert main(['fuse', str(last), str(tmp_path / f'{name}.photos_fused')]) == 0
    assert main(['publish', str(tmp_path / f'{name}.photos_fused'), 'scripts', '--license', 'apache-2.0']) == 0
    model = timm.create_model(f'hf-hub:scripts/{name}.photos_fused', pretrained=True, cache_dir=cache_dir).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), load_training(last)[0](images), rtol=1e-4, atol=1e-4)


def test_validate(trained: tuple[str, Path], scripts: Path, photos: Path):
    """The same figures with --reparam, from fewer parameters where the method has a fused form."""
    name, last = trained
    args = ('--model', name, '--checkpoint', last, *SIZE, *OPTIONS[name], '--workers', 0, '--data-dir', photos)
    plain, fused = (
        result(script(scripts, 'validate.py', *args, '--split', 'validation', *more)) for more in ((), ('--reparam',))
    )
    assert plain['top1'] == fused['top1']
    assert (fused['param_count'] < plain['param_count']) == name.endswith('doconv')


def test_benchmark(trained: tuple[str, Path], scripts: Path):
    name, _ = trained
    args = ('--bench', 'inference', '--batch-size', 2, '--num-warm-iter', 1, '--num-bench-iter', 5, '--reparam')
    found = result(script(scripts, 'benchmark.py', '--model', name, *SIZE, *OPTIONS[name], *args))
    assert found['model'] == name and found['infer_samples_per_sec'] > 0


def test_inference(trained: tuple[str, Path], scripts: Path, photos: Path, tmp_path: Path):
    pytest.importorskip('pandas', reason="timm's inference.py needs pandas")
    name, last = trained
    args = ('--data-dir', photos / 'validation', '--workers', 0, '--results-dir', tmp_path, '--fullname')
    script(scripts, 'inference.py', '--model', name, '--checkpoint', last, *SIZE, *OPTIONS[name], *args)
    (file,) = tmp_path.iterdir()
    assert len(re.findall(r'\.png', file.read_text())) == CLASSES * VALIDATION_IMAGES


def test_onnx_export(trained: tuple[str, Path], scripts: Path, tmp_path: Path):
    """What onnxruntime makes of the exported graph is what the model makes, to 1e-4 of the largest logit."""
    onnxruntime = pytest.importorskip('onnxruntime', reason="timm's onnx_export.py needs onnx and onnxruntime")
    name, last = trained
    args = ('--num-classes', CLASSES, '--img-size', 32, '--reparam', '--check-forward')
    script(scripts, 'onnx_export.py', tmp_path / 'model.onnx', '--model', name, '--checkpoint', last, *args)
    assert main(['fuse', str(last), str(tmp_path / f'{name}.photos_fused')]) == 0
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for folder in (f'{name}.photos', f'{name}.photos_fused'):
        expected = load_checkpoint(tmp_path / folder)(images).detach()
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * expected.abs().max()
