"""Copy checkpoint folders, with further facts if any are given. No model is loaded."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import as_reparam_error, make_zoo, write_all
from .card import render_card
from .facts import (
    CARD_NAME,
    CONFIG_NAME,
    FACTS_NAME,
    OF_ONE_FORM,
    WEIGHTS_NAME,
    check_facts,
    read_config,
    read_facts,
    state_license,
    write_facts,
    write_text,
)
from .names import fused_path, train_time_path

__all__ = ['add_facts', 'copy_checkpoints', 'stage']


def copy_checkpoints(folders: Sequence[str | Path], zoo: str | Path) -> list[Path]:
    """Copy checkpoint folders into a zoo under their own names, all of them or none.

    A folder of that name is replaced if it holds the same architecture.

    Args:
        folders: Checkpoint folders that load; other files in them are not copied.
        zoo: Where to copy them; made if its parent exists.

    Returns:
        The copies.

    Raises:
        ReparamError: A folder is not a checkpoint, or the place is not writable or taken by something else.
    """
    zoo = Path(zoo).absolute()
    drafts = [_Copy(Path(folder), zoo / Path(folder).name) for folder in folders]
    make_zoo(zoo)
    write_all(drafts)
    return [draft.target for draft in drafts]


def stage(source: Path, place: Path, facts: Mapping[str, Any]) -> Path:
    """Copy a checkpoint folder and add facts to the copy; the weights are a hard link, and the card is rendered again.

    Args:
        source: Checkpoint folder, with facts.
        place: Folder to put the copy into, under the same name.
        facts: Facts to add or to change.

    Returns:
        The new folder.

    Raises:
        ReparamError: The source is not a checkpoint, or a fact has the wrong type.
    """
    folder = place / source.name
    with as_reparam_error(place):
        folder.mkdir()
        copy = _Copy(source, folder, facts)
        copy.write_model(folder, link=True)
        copy.write_texts(folder, render=True)
    return folder


def add_facts(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Add facts to a saved checkpoint, for instance its licence, and render its card again.

    If the folder is one form of a pair, the other form gets the facts too, except those of one form (``form``,
    ``name``, ``repo``, ``sibling``). A card that was edited by hand is kept. A licence is also written into
    ``config.json``, where timm reads it.

    Args:
        folder: Checkpoint folder.
        facts: Facts to add or to change, see :mod:`timm_reparam.hub.facts`.

    Returns:
        The folder.

    Raises:
        ReparamError: The folder is not a checkpoint or cannot be written, or a fact has the wrong type.
    """
    folder = Path(folder).absolute()
    copies = [_Copy(folder, folder, facts)]
    other = fused_path(folder) if train_time_path(folder) == folder else train_time_path(folder)
    if ((read_facts(other) or {}).get('sibling') or {}).get('name') == folder.name:
        shared = {key: value for key, value in facts.items() if key not in OF_ONE_FORM}
        copies.append(_Copy(other, other, shared))
    write_all(copies)
    return folder


class _Copy:
    """A copy of a checkpoint folder that is ready to be written, with further facts if any are given."""

    def __init__(self, source: Path, target: Path, facts: Mapping[str, Any] | None = None):
        self.source, self.target = source, target
        self.facts = None if facts is None else check_facts(facts)

    @property
    def architecture(self) -> str:
        """Architecture of the source; read late, with the lock held, because the source may be the target."""
        return read_config(self.source)['architecture']

    def write_model(self, folder: Path, link: bool = False) -> None:
        """Copy the configuration, and copy the weights or link to them."""
        shutil.copyfile(self.source / CONFIG_NAME, folder / CONFIG_NAME)
        place = _link_or_copy if link else shutil.copyfile
        place(self.source / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        if self.facts is not None and {'license', 'base_model'} & self.facts.keys():
            config = read_config(folder)
            state_license(config['pretrained_cfg'], {**(read_facts(self.source) or {}), **self.facts})
            write_text(folder / CONFIG_NAME, json.dumps(config, indent=2))

    def write_texts(self, folder: Path, render: bool = False) -> None:
        """Copy facts and card if they exist; with further facts, render the card unless it was edited by hand."""
        for name in (FACTS_NAME, CARD_NAME):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)
        if self.facts is not None:
            card = folder / CARD_NAME
            renders = render or not card.is_file() or card.read_bytes() == render_card(folder).encode()
            write_facts(folder, {**(read_facts(folder) or {}), **self.facts})
            if renders:
                write_text(card, render_card(folder))


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file. Saves replace files and never write into one, so the link keeps its content."""
    try:
        os.link(source, target)
    except OSError:  # the target may be on another file system
        shutil.copyfile(source, target)
