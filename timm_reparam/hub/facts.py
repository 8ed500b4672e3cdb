"""The files that describe a checkpoint folder: ``config.json``, and ``training.json`` with the facts.

Keys of ``training.json`` that cards use; other keys are kept:

- ``form``: 'train_time' or 'fused'; ``name``: name of the folder; ``tag``; ``variant``; ``stock_architecture``;
- ``repo``: Hub repo of the folder, 'owner/name', only in published files;
- ``base_model``: the weights that the training started from, dict(id=Hub repo, revision=commit or None, license=...),
  or None for random weights;
- ``license``, ``license_name``, ``license_link``: licence of the weights, if it is not that of the base model;
- ``dataset``: dict(name=..., id=Hub dataset, split=..., train_images=..., validation_images=..., label_names=[...]);
- ``metrics``: by form, for instance dict(train_time=dict(top1=97.5), fused=dict(top1=97.5)), accuracies in percent;
- ``logit_difference``: largest absolute difference between the logits of the two forms;
- ``profile``: by form, as returned by :meth:`timm_reparam.profile.Profile.to_dict`;
- ``fusion``: report of the verification, as returned by :meth:`timm_reparam.FusionReport.to_dict`;
- ``sibling``: the other form, dict(name=..., repo=Hub repo, by default in the same namespace, sha256=hash of its
  model.safetensors);
- ``results``: comparison of the method with stock over several seeds, a list of ``to_dict`` of
  :class:`timm_reparam.results.Summary`;
- ``recipe``: settings of the training run; ``environment``: versions of the software.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import ReparamError
from ..results import Summary

__all__ = [
    'CARD_NAME',
    'CONFIG_NAME',
    'FACTS_NAME',
    'FILES',
    'FORMAT',
    'FORMAT_KEY',
    'FORMS',
    'OF_ONE_FORM',
    'WEIGHTS_NAME',
    'check_facts',
    'is_published_id',
    'is_repo_id',
    'is_size',
    'license_data',
    'missing_license',
    'plain',
    'read_config',
    'read_facts',
    'sha256_of',
    'state_license',
    'stated_license',
    'write_facts',
    'write_text',
]

CONFIG_NAME = 'config.json'
FACTS_NAME = 'training.json'
WEIGHTS_NAME = 'model.safetensors'
CARD_NAME = 'README.md'
FILES = (CARD_NAME, CONFIG_NAME, FACTS_NAME, WEIGHTS_NAME)
# The entry of config.json with its format, and the newest format, which is the one that is written. Format 1, that of
# 0.1.0, had no such entry, and recorded only those options of the layers that were given.
FORMAT_KEY = 'reparam_format'
FORMAT = 2
FORMS = ('train_time', 'fused')
# Facts that the two forms of a pair do not share.
OF_ONE_FORM = ('form', 'name', 'repo', 'sibling')

# The Hub's licence identifiers (https://huggingface.co/docs/hub/repositories-licenses). Any other licence is written as
# 'other' with its name, so the list need not be complete.
_LICENSES = frozenset(
    'afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0'
    ' bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5'
    ' cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0'
    ' cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0'
    ' cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl'
    ' gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by'
    ' ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unlicense wtfpl zlib'.split()
)


_LAYER = {
    **dict.fromkeys(('kernel', 'algebra', 'stored', 'own', 'bound'), float),
    **{'name': str, 'num_inputs': int, 'problems': [str]},
}
_PROFILE = {
    **dict.fromkeys(('parameters', 'trainable_parameters', 'macs', 'batch_size', 'runs'), int),
    **dict.fromkeys(('latency_ms', 'latency_spread_ms'), float),
}
# Types of the facts, all of them optional: a type, a list of one type, or a dict by key, with '' for any other key.
_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(('name', 'tag', 'variant', 'stock_architecture', 'repo'), str),
    **dict.fromkeys(('license', 'license_name', 'license_link'), str),
    'base_model': dict.fromkeys(('id', 'revision', 'license'), str),
    'dataset': {
        **dict.fromkeys(('name', 'id', 'split'), str),
        **dict.fromkeys(('train_images', 'validation_images'), int),
        'label_names': [str],
    },
    'metrics': dict.fromkeys(FORMS, {'': float}),
    'profile': dict.fromkeys(FORMS, _PROFILE),
    'fusion': {
        **dict.fromkeys(('algebra', 'algebra_bound', 'stored', 'own', 'bound', 'top1_agreement'), float),
        **dict.fromkeys(('num_inputs', 'num_layers'), int),
        **dict.fromkeys(('layers_without_input', 'problems'), [str]),
        **{'layers_off': [_LAYER], 'worst_layer': _LAYER},
    },
    'sibling': dict.fromkeys(('name', 'repo', 'sha256'), str),
    'logit_difference': float,
    'results': [dict],
    'recipe': dict,
    'environment': {'': str},
}


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Args:
        folder: Checkpoint folder.

    Returns:
        The configuration; ``architecture`` is a string and ``model_args`` and ``pretrained_cfg`` are dicts.

    Raises:
        ReparamError: The file does not exist, does not describe a timm model, or has a format that this version does
            not know.
    """
    path = Path(folder) / CONFIG_NAME
    config = _read_json(path)
    if config is None:
        raise ReparamError(f'{path}: not found; expected a checkpoint folder with {CONFIG_NAME} and {WEIGHTS_NAME}')
    config.setdefault('model_args', {})
    config.setdefault('pretrained_cfg', {})
    for key, kind in (('architecture', str), ('model_args', dict), ('pretrained_cfg', dict)):
        _check(config.get(key), kind, f'{path}.{key}')
    version = config.get(FORMAT_KEY, 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ReparamError(
            f'{path}.{FORMAT_KEY}: expected a positive integer, got {version!r}; save or fetch the checkpoint again'
        )
    if version > FORMAT:
        raise ReparamError(
            f'{path}.{FORMAT_KEY}: expected at most {FORMAT}, got {version}, of a newer version; upgrade timm-reparam'
        )
    return config


def read_facts(folder: str | Path) -> dict[str, Any] | None:
    """Read ``training.json`` of a checkpoint folder.

    Args:
        folder: Checkpoint folder.

    Returns:
        The facts, or None if the folder has no such file.

    Raises:
        ReparamError: The file is not json, or a fact has the wrong type.
    """
    path = Path(folder) / FACTS_NAME
    facts = _read_json(path)
    return facts if facts is None else check_facts(facts, str(path))


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``training.json`` of a checkpoint folder."""
    write_text(folder / FACTS_NAME, json.dumps(facts, indent=2) + '\n')


def write_text(path: Path, text: str) -> None:
    """Write a text file with the same bytes on every system."""
    path.write_text(text, encoding='utf-8', newline='\n')


def check_facts(facts: Mapping[str, Any], place: str = 'facts') -> dict[str, Any]:
    """Check that the facts about a checkpoint have the types that cards rely on.

    Args:
        facts: Facts about a checkpoint, see the head of this module. Other keys are kept.
        place: Origin of the facts, for error messages.

    Returns:
        The same facts as plain json values.

    Raises:
        ReparamError: A value has the wrong type or cannot be written as json; the message names its key.
    """
    if not isinstance(facts, Mapping):
        raise ReparamError(f'{place}: expected a dict, got {type(facts).__name__}')
    plain_facts: dict[str, Any] = {}
    for key, value in facts.items():
        try:
            plain_facts[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ReparamError(f'{place}.{key}: expected finite json values, got {value!r} ({error})') from error
    _check(plain_facts, _SCHEMA, place)
    if plain_facts.get('form', FORMS[0]) not in FORMS:
        raise ReparamError(f'{place}.form: expected one of {FORMS}, got {plain_facts["form"]!r}')
    for index, entry in enumerate(plain_facts.get('results') or ()):
        Summary.from_dict(entry, f'{place}.results[{index}]')
    return plain_facts


def _check(value: Any, schema: Any, place: str) -> None:
    """Raise ReparamError unless a json value matches a schema; see `_SCHEMA`."""
    kind: type = schema if isinstance(schema, type) else type(schema)
    kinds: Any = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ReparamError(f'{place}: expected {kind.__name__}, got {value!r:.200}')
    # integers in json have any size
    if kind is float and isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ReparamError(f'{place}: expected a float, got an integer that is too large for one')
    if isinstance(schema, list):
        for index, entry in enumerate(value):
            _check(entry, schema[0], f'{place}[{index}]')
    elif isinstance(schema, dict):
        for key, entry in value.items():
            inner = schema.get(key, schema.get(''))
            if inner is not None and entry is not None:
                _check(entry, inner, f'{place}.{key}')


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file in hexadecimal digits.

    Raises:
        ReparamError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ReparamError(
            f'{path}: cannot be read ({error.strerror}); expected the weights of a checkpoint'
        ) from error
    return digest.hexdigest()


def stated_license(facts: Mapping[str, Any]) -> str | None:
    """Return the licence that the facts state, or else that of the base model; None if neither is known."""
    return facts.get('license') or (facts.get('base_model') or {}).get('license')


def license_data(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence as front matter: 'other' and a name if the Hub has no identifier for it.

    Args:
        facts: Facts about a checkpoint, see the head of this module.

    Returns:
        Entries of the front matter; empty if no licence is known.
    """
    base = facts.get('base_model') or {}
    name = plain(stated_license(facts) or '').lower()
    stated = bool(facts.get('license'))
    link = plain(facts['license_link']) if stated and facts.get('license_link') else None
    if name in _LICENSES - {'other'}:
        return {'license': name}
    if name == 'other':
        name = plain((facts.get('license_name') if stated else None) or '').lower()
    name = re.sub(r'[^a-z0-9.]+', '-', name).strip('-.')
    if not name or name in ('unknown', 'none', 'other'):
        return {}
    data = {'license': 'other', 'license_name': name}
    if link is None and not stated and is_published_id(base.get('id')):
        link = f'https://huggingface.co/{base["id"]}'
    if link is not None and re.fullmatch(r'https://[A-Za-z0-9][A-Za-z0-9._~/?#=&%+-]*|LICEN[CS]E[A-Za-z0-9._-]*', link):
        data['license_link'] = link
    return data


def missing_license(facts: Sequence[Mapping[str, Any]], license: str | None) -> str | None:
    """Return the licence to add when a pair is published.

    Args:
        facts: The facts of each of the two forms.
        license: The licence given by the user, if any.

    Returns:
        The given licence, or None if the facts state one already.

    Raises:
        ReparamError: No licence is known or given, or the given one differs from the facts or is not a licence.
    """
    found = [license_data(one).get('license') for one in facts]
    known = {one for one in found if one is not None}
    if license is not None and not known <= {license}:
        raise ReparamError(f'license: the weights are under {", ".join(sorted(known))}, got {license!r}; leave it out')
    if None not in found:
        return None
    if license is None:
        raise ReparamError(
            'license: the licence of the weights is unknown (trained from scratch, or from weights without one); give'
            ' it with license= (--license on the command line)'
        )
    if not re.fullmatch(r'[a-z0-9][a-z0-9.-]{0,63}', license):
        raise ReparamError(f"license: expected an identifier as the Hub lists them, 'apache-2.0', got {license!r}")
    if not all(license_data({**one, 'license': license}) for one in facts):
        raise ReparamError(
            f"license: {license!r} states no licence; give an identifier as the Hub lists them, 'apache-2.0', or the"
            " name of your own licence, 'name-of-licence-1.0'"
        )
    return license


def state_license(pretrained_cfg: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the licence that the facts state into a pretrained_cfg, where timm reads it."""
    pretrained_cfg.pop('license', None)  # timm writes no empty entries
    if license := stated_license(facts):
        pretrained_cfg['license'] = license


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ReparamError(f'{path}: cannot be read as json ({error})') from error
    if not isinstance(value, dict):
        raise ReparamError(f'{path}: expected a json object, got {type(value).__name__}')
    return value


def is_repo_id(text: Any) -> bool:
    """Whether a value is a valid repo id, with or without a namespace."""
    # older clients accept letters that are not ascii
    if not isinstance(text, str) or not text.isascii():
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def is_published_id(text: Any) -> bool:
    """Whether a value is a valid repo id with a namespace."""
    return is_repo_id(text) and text.count('/') == 1


def is_size(value: Any) -> bool:
    """Whether a value is three integers: channels, height and width of images."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(side, int) and not isinstance(side, bool) for side in value)
    )


def plain(text: str) -> str:
    """Return text as one line without control characters. Quoting is left to the yaml library."""
    return ' '.join(''.join(character if character.isprintable() else ' ' for character in text).split())
