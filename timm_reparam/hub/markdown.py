"""Text that is safe in Markdown, whatever it contains."""

import re

from .facts import is_published_id, plain

__all__ = ['code_span', 'escape', 'fenced', 'hub_link']

# Markdown allows a backslash before any ascii punctuation. Harmless marks are not escaped, such as the dot, dash and
# underscore inside a word. A dot after "www" and a colon before a slash are escaped, since they would make a link.
_MARKUP = re.compile(
    r"""[!#$&()*;<=>?@\[\]\\^`{|}~]|(?<![A-Za-z0-9])[._-]|[._-](?![A-Za-z0-9])|(?<=www)\.|:(?=/)""", re.IGNORECASE
)
_ENTITIES = {'<': '&lt;', '>': '&gt;', '&': '&amp;'}


def escape(text: str) -> str:
    """One line of text without markup for Markdown and HTML, at any position in a line."""
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0], '\\' + match[0]), plain(text))


def code_span(text: str) -> str:
    """One line of text as a code span."""
    text = plain(text)
    fence = '`' * (_longest_backticks(text) + 1)
    padding = ' ' if text.startswith('`') or text.endswith('`') else ''
    return f'{fence}{padding}{text}{padding}{fence}'


def fenced(text: str, language: str) -> str:
    """Lines of text as a code block."""
    fence = '`' * max(3, _longest_backticks(text) + 1)
    return f'{fence}{language}\n{text}\n{fence}'


def hub_link(repo: str) -> str:
    """A link to a repo on the Hub, or the plain text if it is not a valid repo id."""
    return f'[{escape(repo)}](https://huggingface.co/{repo})' if is_published_id(repo) else escape(repo)


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall('`+', text)), default=0)
