"""Checkpoints on disk, their model cards, and the way to the Hub and back."""

from .card import render_card
from .convert import convert_checkpoint, fuse_checkpoint
from .copies import add_facts
from .facts import check_facts
from .folder import check_pair, save_checkpoint, save_pair
from .gate import VerifyReport, self_check, verify_checkpoint, verify_pair
from .load import load_checkpoint
from .names import check_tag, folder_name
from .report import RepoResult, SyncReport
from .sync import publish, pull, sync, verify
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
