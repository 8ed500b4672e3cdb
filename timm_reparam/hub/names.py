"""Names of checkpoint folders, which are also the names of their repos on the Hub.

The two forms of a pair lie beside each other: ``<model>.<tag>`` is train-time, ``<model>.<tag>_fused`` is fused.
"""

import re
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import ReparamError

__all__ = ['FUSED_SUFFIX', 'check_tag', 'folder_name', 'fused_path', 'train_time_path']

FUSED_SUFFIX = '_fused'
# Device names on Windows, where no file may have such a name, with any extension.
_RESERVED = re.compile(r'con|prn|aux|nul|(?:com|lpt)[0-9]', re.IGNORECASE)


def folder_name(model_name: str, tag: str, fused: bool) -> str:
    """Return the name of a checkpoint folder, which is also its repo name on the Hub.

    Args:
        model_name: Architecture of the train-time form.
        tag: Name of the training result.
        fused: Whether it is the fused form.
    """
    return f'{model_name}.{tag}' + (FUSED_SUFFIX if fused else '')


def train_time_path(folder: str | Path) -> Path:
    """Return the folder of the train-time form of a pair, given that of either form."""
    folder = Path(folder).absolute()
    return folder.with_name(folder.name.removesuffix(FUSED_SUFFIX) or folder.name)


def fused_path(folder: Path) -> Path:
    """Return the folder of the fused form, given that of the train-time form."""
    return folder.with_name(folder.name + FUSED_SUFFIX)


def check_tag(tag: str, model_name: str = 'model') -> str:
    """Check that both forms of a model can be stored under a tag, on disk and on the Hub.

    Args:
        tag: Name of the training result.
        model_name: Architecture of the train-time form; the length of the whole name is limited.

    Returns:
        The tag.

    Raises:
        ReparamError: The tag does not give a valid repo name.
    """
    if not isinstance(tag, str) or not re.fullmatch(r'[A-Za-z0-9._-]+', tag):
        raise ReparamError(f'tag: expected letters, digits, ".", "_" and "-", got {tag!r}; give another --tag')
    if _RESERVED.fullmatch(tag.partition('.')[0]):
        raise ReparamError(f'tag: {tag!r} is a reserved name on Windows; give another --tag')
    if tag.endswith(FUSED_SUFFIX):
        raise ReparamError(f'tag: {tag!r} ends with {FUSED_SUFFIX!r}, which marks the fused form; give another --tag')
    for fused in (False, True):
        try:
            validate_repo_id(folder_name(model_name, tag, fused))
        except HFValidationError as error:
            raise ReparamError(f'tag: {tag!r} does not give a valid repo name ({error}); give another --tag') from error
    return tag
