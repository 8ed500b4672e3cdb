"""Checkpoints on disk, their model cards, and the way to the Hub and back."""

from .cards import check_facts, render_card
from .checkpoint import (
    add_facts,
    check_pair,
    check_tag,
    convert_checkpoint,
    folder_name,
    fuse_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_pair,
)
from .gate import VerifyReport, self_check, verify_checkpoint, verify_pair
from .publish import RepoResult, SyncReport, publish
from .pull import pull, verify
from .sync import sync
from .training import base_model_facts

__all__ = [
    'RepoResult',
    'SyncReport',
    'VerifyReport',
    'base_model_facts',
    'check_facts',
    'add_facts',
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
]
