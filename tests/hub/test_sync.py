"""A zoo made equal to the loopback Hub: what is sent, what is not, and what happens when something goes wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from stand_in import randomise

import timm_reparam
from hub.server import HubServer
from timm_reparam import FusionReport, ReparamError
from timm_reparam.hub import save_checkpoint, save_pair, sync

MODEL = 'resnet10t_doconv'
TINY = dict(num_classes=2, channels=(8, 8, 8, 8), stem_width=4)
DATA_CONFIG = dict(input_size=(3, 32, 32), crop_pct=1.0)
FACTS = {'license': 'mit'}
CHECK = 'test/rand_tensors.safetensors'
FILES = {'README.md', 'config.json', 'model.safetensors', 'training.json', CHECK}
# written down without a verification, for speed: sync verifies every pair itself
REPORT = FusionReport(algebra=1e-15, stored=1e-7, own=1e-7, bound=1e-6, top1_agreement=1.0, num_inputs=64)
pytestmark = pytest.mark.usefixtures('verified_once')
SCRIPT = """
import json, sys
import timm_reparam
from timm_reparam.hub import sync
report = sync(sys.argv[1], sys.argv[2], workers=3, progress=False)
print(json.dumps(report.to_dict()))
sys.exit(not report.ok)
"""


def add_pair(zoo: Path, tag: str, seed: int = 1) -> tuple[Path, Path]:
    torch.manual_seed(seed)
    model = randomise(timm.create_model(MODEL, **TINY), seed=seed).eval()
    return save_pair(model, zoo, tag=tag, report=REPORT, facts=FACTS, data_config=DATA_CONFIG)


def names(*tags: str) -> list[str]:
    return sorted(f'{MODEL}.{tag}{suffix}' for tag in tags for suffix in ('', '_fused'))


def files(hub: HubServer, repo_id: str) -> dict[str, str]:
    """The hashes of what a repository shows."""
    return {path: blob.sha256 for path, blob in hub.repos[repo_id].branches['main'].files.items()}


def history(hub: HubServer, repo_id: str) -> list[dict[str, str]]:
    """What it has shown since its first commit, the newest first."""
    commits = hub.repos[repo_id].branches['main'].history()
    return [{path: blob.sha256 for path, blob in commit.files.items()} for commit in commits]


def start(zoo: Path, namespace: str, **options) -> subprocess.Popen:
    path = str(Path(timm_reparam.__file__).parents[1])
    env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', SCRIPT, str(zoo), namespace]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope='module')
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of three models; tests leave it as it is."""
    zoo = tmp_path_factory.mktemp('three') / 'zoo'
    for seed, tag in enumerate('abc'):
        add_pair(zoo, tag, seed)
    return zoo


@pytest.fixture
def zoo(tmp_path: Path, three: Path) -> Path:
    """The three models, for tests that change them."""
    return Path(shutil.copytree(three, tmp_path / 'zoo'))


def test_second_sync_sends_nothing(hub: HubServer, owner: str, zoo: Path):
    report = sync(zoo, owner)
    assert report.ok and [result.repo_id for result in report.sent] == [f'{owner}/{name}' for name in names(*'abc')]
    assert set(hub.commit_counts.values()) == {1} and len(hub.commit_counts) == 6
    assert all(set(files(hub, f'{owner}/{name}')) == FILES | {'.gitattributes'} for name in names(*'abc'))
    hub.clear()
    report = sync(zoo, owner)
    assert len(report.skipped) == 6 and report.ok
    assert not hub.commit_counts and not hub.weight_bytes and {entry.method for entry in hub.log} == {'GET'}
    # another model under one name: that pair and no other is sent again
    add_pair(zoo, 'b', seed=7)
    report = sync(zoo, owner)
    assert [result.repo_id for result in report.sent] == [f'{owner}/{name}' for name in names('b')]
    assert hub.commit_counts == {f'{owner}/{name}': 1 for name in names('b')}
    assert set(hub.weight_bytes) == set(hub.commit_counts)


def test_dry_run(hub: HubServer, owner: str, zoo: Path):
    report = sync(zoo, owner, dry_run=True)
    assert len(report.of('planned')) == 6 and report.ok
    assert {entry.method for entry in hub.log} == {'GET'}


def test_bad_models_do_not_stop_the_rest(hub: HubServer, owner: str, zoo: Path):
    fused = zoo / f'{MODEL}.a_fused'
    tensors = safetensors.torch.load_file(fused / 'model.safetensors')
    safetensors.torch.save_file({**tensors, 'fc.bias': tensors['fc.bias'] + 1}, fused / 'model.safetensors')
    shutil.rmtree(zoo / f'{MODEL}.b')
    (zoo / '.unfinished.partial').mkdir()
    hub.faults.add('403', method='POST', path=f'{owner}/{MODEL}.c_fused/commit/')
    report = sync(zoo, owner)
    assert not report.ok
    assert [result.repo_id for result in report.refused] == [f'{owner}/{name}' for name in names('a', 'b')]
    assert [result.repo_id for result in report.sent] == [f'{owner}/{MODEL}.c']
    assert [result.repo_id for result in report.failed] == [f'{owner}/{MODEL}.c_fused']
    assert all(result.why and '\n' not in result.why for result in report.refused + report.failed)
    assert 'sha256' in report.refused[0].why and 'log in' in report.failed[0].why
    assert json.loads(json.dumps(report.to_dict()))['counts'] == {'refused': 4, 'sent': 1, 'failed': 1}
    assert str(report).count('\n') == 5


def test_stock_models_are_left_out(hub: HubServer, owner: str, tmp_path: Path):
    """train.py saves them into the zoo, too; half a pair is none of them."""
    zoo = tmp_path / 'zoo'
    add_pair(zoo, 'a')
    stock = timm.create_model('resnet10t', **TINY).eval()
    save_checkpoint(stock, zoo / 'resnet10t.a', facts={**FACTS, 'tag': 'a'}, data_config=DATA_CONFIG)
    report = sync(zoo, owner)
    (skipped,) = report.skipped
    assert report.ok and len(report.sent) == 2
    assert skipped.repo_id == f'{owner}/resnet10t.a' and skipped.why == 'a stock model without a fused form'
    assert f'{owner}/resnet10t.a' not in hub.repos
    shutil.rmtree(zoo / f'{MODEL}.a_fused')
    report = sync(zoo, owner)
    assert [result.repo_id for result in report.refused] == [f'{owner}/{name}' for name in names('a')]


def test_half_new_pair_is_repaired(hub: HubServer, owner: str, zoo: Path):
    sync(zoo, owner)
    old = {name: files(hub, f'{owner}/{name}') for name in names('a')}
    add_pair(zoo, 'a', seed=9)
    hub.faults.add('403', method='POST', path=f'{owner}/{MODEL}.a_fused/commit/')
    assert len(sync(zoo, owner).failed) == 1
    assert files(hub, f'{owner}/{MODEL}.a') != old[f'{MODEL}.a']
    assert files(hub, f'{owner}/{MODEL}.a_fused') == old[f'{MODEL}.a_fused']
    report = sync(zoo, owner)
    assert report.ok and [result.repo_id for result in report.sent] == [f'{owner}/{MODEL}.a_fused']


def test_two_syncs_at_once(hub: HubServer, owner: str, tmp_path: Path):
    """Both have read a repository before either commits: one wins it, the other one says so; nothing is lost."""
    zoos = [tmp_path / 'one', tmp_path / 'two']
    for seed, zoo in enumerate(zoos):
        add_pair(zoo, 'a', seed)
    barrier = threading.Barrier(2, timeout=60)
    hub.faults.add('call', path=f'{MODEL}.a/commit/', times=2, action=lambda request: barrier.wait())
    reports: list = [None, None]

    def run(index: int) -> None:
        reports[index] = sync(zoos[index], owner, progress=False)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner, loser = sorted(reports, key=lambda report: len(report.conflicts))
    assert winner.ok and len(winner.sent) == 2
    assert not loser.ok and len(loser.conflicts) == 2 and 'somebody else' in loser.conflicts[0].why
    assert hub.commit_counts == {f'{owner}/{name}': 1 for name in names('a')}
    # the loser's will, said aloud: on top of the winner's commit
    zoo = zoos[reports.index(loser)]
    assert len(sync(zoo, owner).sent) == 2
    for name in names('a'):
        assert len(history(hub, f'{owner}/{name}')) == 3


@pytest.mark.parametrize(
    'make, options, words',
    [
        (lambda path: path / 'missing', {}, 'missing'),
        (lambda path: path, {}, 'found none'),
        (lambda path: add_pair(path, 'a')[0].parent, {'workers': 0}, 'workers'),
        (lambda path: add_pair(path, 'a')[0].parent, {'namespace': '../up'}, 'expected a repo'),
    ],
)
def test_arguments(hub: HubServer, owner: str, tmp_path: Path, make, options: dict, words: str):
    with pytest.raises(ReparamError, match=words):
        sync(make(tmp_path), **{'namespace': owner, **options})
    assert not hub.log


@pytest.mark.slow
def test_ctrl_c(hub: HubServer, owner: str, zoo: Path):
    fault = hub.faults.add('slow', method='POST', path='/commit/', times=None, seconds=0.3)
    process = start(zoo, owner)
    while not fault.hits and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    for name in names(*'abc'):
        if f'{owner}/{name}' in hub.repos:
            assert set(files(hub, f'{owner}/{name}')) in ({'.gitattributes'}, FILES | {'.gitattributes'})
    hub.faults.clear()
    assert sync(zoo, owner).ok
    assert all(len(history(hub, f'{owner}/{name}')) == 2 for name in names(*'abc'))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_models(hub: HubServer, owner: str, tmp_path: Path):
    zoo, tags = tmp_path / 'zoo', [f'm{number:02d}' for number in range(50)]
    for seed, tag in enumerate(tags):
        add_pair(zoo, tag, seed)
    assert len(sync(zoo, owner).sent) == 100
    assert set(hub.commit_counts.values()) == {1} and len(hub.commit_counts) == 100
    hub.clear()
    assert len(sync(zoo, owner).skipped) == 100
    assert not hub.commit_counts and not hub.weight_bytes
    add_pair(zoo, 'm17', seed=1000)
    report = sync(zoo, owner)
    assert [result.repo_id for result in report.sent] == [f'{owner}/{name}' for name in names('m17')]
    assert len(report.skipped) == 98 and sum(hub.commit_counts.values()) == 2
    assert set(hub.weight_bytes) == set(hub.commit_counts)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments(hub: HubServer, owner: str, tmp_path: Path):
    """Each repository shows its old state or its new one, whenever a sync is killed, and the next one completes it."""
    zoo, tags = tmp_path / 'zoo', 'abc'
    for seed, tag in enumerate(tags):
        add_pair(zoo, tag, seed)
    process = start(zoo, owner)
    began = time.monotonic()
    _, errors = process.communicate(timeout=300)
    duration = time.monotonic() - began
    assert process.returncode == 0, errors
    generator = random.Random(0)
    touched = 0
    for number in range(20):
        old = {name: files(hub, f'{owner}/{name}') for name in names(*tags)}
        before = {name: len(history(hub, f'{owner}/{name}')) for name in names(*tags)}
        for seed, tag in enumerate(tags):
            add_pair(zoo, tag, seed=100 + 10 * number + seed)
        process = start(zoo, owner)
        time.sleep(generator.uniform(0.3, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        time.sleep(0.2)  # what the server has received by now it may still act on
        killed = {name: files(hub, f'{owner}/{name}') for name in names(*tags)}
        assert sync(zoo, owner, progress=False).ok
        new = {name: files(hub, f'{owner}/{name}') for name in names(*tags)}
        for name in names(*tags):
            assert killed[name] in (old[name], new[name]), f'kill {number}: {name} is half there'
            assert new[name] != old[name]
            assert new[name]['model.safetensors'] != old[name]['model.safetensors']
            assert len(history(hub, f'{owner}/{name}')) == before[name] + 1, f'kill {number}: {name} twice'
        touched += any(killed[name] == new[name] for name in names(*tags))
        assert sync(zoo, owner, progress=False).sent == []
    assert 0 < touched < 20  # some kills came before the first commit, some after it
