"""Checkpoints on disk and their model cards."""

from .cards import check_facts, render_card
from .checkpoint import (
    check_pair,
    check_tag,
    folder_name,
    fuse_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_pair,
    verify_checkpoint,
)

__all__ = [
    'check_facts',
    'check_pair',
    'check_tag',
    'folder_name',
    'fuse_checkpoint',
    'load_checkpoint',
    'render_card',
    'save_checkpoint',
    'save_pair',
    'verify_checkpoint',
]
