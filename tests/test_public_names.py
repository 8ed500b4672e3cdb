"""The public names: no other, none missing, each with a docstring; and what importing them brings along."""

from importlib import import_module
from pathlib import Path

import pytest
from fresh import finished, run_code

PUBLIC = {
    'timm_reparam': [
        'ACBlock2d',
        'ACConv2d',
        'DBBConv2d',
        'DBBlock2d',
        'DOConv2d',
        'DOConvTranspose2d',
        'DynamicConv2d',
        'FusionReport',
        'LayerReport',
        'OREPAConv2d',
        'RefConv2d',
        'RefConvTranspose2d',
        'ReparamError',
        '__version__',
        'convert_model',
        'export_state_dict',
        'fuse_model',
        'import_state_dict',
        'is_variant',
        'models',
        'plan_conversion',
        'register_variant',
        'verify_fusion',
    ],
    'timm_reparam.layers': [
        'ACBlock2d',
        'ACConv2d',
        'DBBConv2d',
        'DBBlock2d',
        'DOConv2d',
        'DOConvTranspose2d',
        'DynamicConv2d',
        'Method',
        'OREPAConv2d',
        'RefConv2d',
        'RefConvTranspose2d',
        'ReparamConv2d',
        'ReparamConvTranspose2d',
        'ReparamLayer',
    ],
    'timm_reparam.hub': [
        'RepoResult',
        'SyncReport',
        'VerifyReport',
        'add_facts',
        'base_model_facts',
        'check_facts',
        'check_pair',
        'check_tag',
        'convert_checkpoint',
        'folder_name',
        'fuse_checkpoint',
        'load_checkpoint',
        'publish',
        'pull',
        'render_card',
        'save_checkpoint',
        'save_pair',
        'self_check',
        'sync',
        'verify',
        'verify_checkpoint',
        'verify_pair',
    ],
    'timm_reparam.models': ['register_variant'],
}


@pytest.mark.parametrize('module', PUBLIC)
def test_the_names(module: str) -> None:
    assert sorted(import_module(module).__all__) == PUBLIC[module]
    exec(f'from {module} import *', names := {})
    assert names.keys() - {'__builtins__'} == set(PUBLIC[module])


@pytest.mark.parametrize(
    'module, name', [(module, name) for module in PUBLIC for name in PUBLIC[module] if name != '__version__']
)
def test_each_has_a_docstring(module: str, name: str) -> None:
    text = getattr(import_module(module), name).__doc__
    assert text and text.strip() and not text.startswith(f'{name}(')  # which dataclasses write where there is none


def test_importing_is_light(tmp_path: Path) -> None:
    """Beside torch and timm the package imports the standard library and its own core."""
    code = (
        'import sys\n'
        'before = set(sys.modules)\n'
        'import timm_reparam\n'
        'print(*(set(sys.modules) - before - {name for name in sys.modules'
        ' if name.partition(".")[0] in sys.stdlib_module_names}))'
    )
    done = finished(run_code, code, folder=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    imported = done.stdout.split()
    assert 'timm_reparam.verify' in imported
    assert [name for name in imported if name.partition('.')[0] not in ('timm_reparam', 'torch', 'timm')] == []
    for room in ('hub', 'training', 'cli', 'plot', 'profile', 'results'):
        assert f'timm_reparam.{room}' not in imported
