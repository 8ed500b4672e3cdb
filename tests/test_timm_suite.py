"""timm's own tests of its models, as the installed release brings them, on the smallest models of every family.

They run unchanged, in a process of their own that has this package registered (`TORCH_BACKEND`), under the versions of
pytest that timm pins; what they download comes from the loopback Hub. The source release comes from the package index.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from hub.server import HubServer, client_environment
from stand_in import add_stock
from timm.models import _registry

import timm_reparam
from timm_reparam.variants import VARIANTS

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings it
    import tomli as tomllib  # type: ignore[no-redef]

# What timm's file runs for a model that is neither its own nor a transformer: one case for each model.
FOR_EVERY_MODEL = {
    'test_model_forward',
    'test_model_backward',
    'test_model_default_cfgs',
    'test_model_forward_torchscript',
    'test_model_forward_features',
    'test_model_forward_fx',
    'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}
FOR_EVERY_PUBLISHED_MODEL = {'test_model_load_pretrained', 'test_model_features_pretrained'}


def families() -> list[str]:
    return sorted(name for name in _registry._module_to_models if name.rpartition('_')[2] in VARIANTS)


@functools.cache
def size(stock_name: str) -> int:
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in timm.create_model(stock_name).parameters())


def smallest(names: list[str]) -> str:
    return min(names, key=lambda name: size(name.partition('.')[0].rpartition('_')[0]))


def pip(*args: str) -> subprocess.CompletedProcess:
    """Runs the pip of this environment, or the one on the path, for this environment's Python."""
    own = subprocess.run([sys.executable, '-m', 'pip', '--version'], capture_output=True).returncode == 0
    command = [sys.executable, '-m', 'pip'] if own else [shutil.which('pip') or 'pip', '--python', sys.executable]
    return subprocess.run(
        [*command, '--disable-pip-version-check', *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope='module')
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tests of the installed timm, and the packages that they pin, each in a folder."""
    folder = tmp_path_factory.mktemp('timm')
    requirement = f'timm=={timm.__version__}'
    done = pip('download', '--no-deps', '--no-binary', 'timm', requirement, '--dest', str(folder))
    if done.returncode:
        pytest.skip(f'the source release of {requirement} cannot be had: {done.stdout.strip()[-300:]}')
    (archive,) = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        # without its `timm` folder, which would come before the installed one
        members = [m for m in tar.getmembers() if re.match(r'[^/]+/(tests/|pyproject\.toml$)', m.name)]
        tar.extractall(folder, members=members, filter='data')
    tests = folder / archive.name.removesuffix('.tar.gz')
    project = tomllib.loads((tests / 'pyproject.toml').read_text())
    pins = project['tool']['pdm']['dev-dependencies']['test']
    done = pip('install', '--target', str(folder / 'pins'), *pins)
    if done.returncode:
        pytest.skip(f"timm's test requirements {pins} cannot be had: {done.stdout.strip()[-300:]}")
    return tests, folder / 'pins'


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_models(hub: HubServer, release: tuple[Path, Path], cache_dir: Path, tmp_path: Path):
    """Every test that the file has for a model passes for the smallest of every family, with nothing skipped."""
    tests, pins = release
    names, published = set(), set()
    for family in families():
        names.add(smallest(timm.list_models(module=family)))
        published.add(smallest(timm.list_models(module=family, pretrained=True)))
    assert len(families()) == 2 * len(VARIANTS), families()
    for stock_tag in {name.replace(f'_{name.partition(".")[0].rpartition("_")[2]}.', '.') for name in published}:
        add_stock(hub, stock_tag)
    architectures = sorted(names | {name.partition('.')[0] for name in published})

    path = os.pathsep.join([str(pins), str(Path(timm_reparam.__file__).parents[1])])
    environment = client_environment(hub.endpoint, cache_dir) | {'PYTHONPATH': path, 'TORCH_BACKEND': 'timm_reparam'}
    environment.pop('GITHUB_ACTIONS', None)  # it makes timm leave out the tests that download
    report = tmp_path / 'report.xml'
    command = [sys.executable, '-m', 'pytest', '-q', 'tests/test_models.py', '-k', ' or '.join(architectures)]
    done = subprocess.run(
        [*command, '-p', 'no:cacheprovider', f'--junitxml={report}'],
        cwd=tests,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    if done.returncode:
        pytest.fail(done.stdout[-5000:], pytrace=False)

    (suite,) = ElementTree.parse(report).getroot().iter('testsuite')
    assert suite.get('skipped') == suite.get('failures') == suite.get('errors') == '0', suite.attrib
    ran = Counter()
    for case in suite.iter('testcase'):
        test, _, parameters = case.get('name').partition('[')
        ran[test, parameters.rstrip(']').split('-')[-1].partition('.')[0]] += 1
    expected = {(test, name) for test in FOR_EVERY_MODEL for name in architectures}
    expected |= {(test, name.partition('.')[0]) for test in FOR_EVERY_PUBLISHED_MODEL for name in published}
    assert expected <= ran.keys(), sorted(expected - ran.keys())
    assert {name for _, name in ran} == set(architectures)
