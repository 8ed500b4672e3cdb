"""One collection on the Hub for the models of a zoo."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..errors import ReparamError
from .transport import HubClient, check_repo_id

__all__ = ['add_to_collection']

_DESCRIPTION = 'Models trained with over-parameterised convolutions: train-time and fused forms (timm-reparam)'


def add_to_collection(
    client: HubClient, namespace: str, title: str, repo_ids: Sequence[str], *, private: bool = False
) -> tuple[str, int]:
    """Put models into the collection of that title, which is made if the namespace has none.

    Args:
        client: The Hub.
        namespace: Owner of the collection.
        title: Its title.
        repo_ids: The models; those that are in it already are left alone.
        private: Whether a new collection is private.

    Returns:
        The slug of the collection and how many models were added.

    Raises:
        ReparamError: The title is empty or too long, or the Hub refuses.
    """
    if not isinstance(title, str) or not title.strip() or len(title) > 59 or not title.isprintable():
        raise ReparamError(f'collection: expected a title of 1 to 59 characters in one line, got {title!r}')
    for repo_id in repo_ids:
        check_repo_id(repo_id)
    wanted = f'{namespace}: collection {title!r}'
    api = client.api

    def find() -> Any:
        return next((found for found in api.list_collections(owner=namespace) if found.title == title), None)

    try:
        collection = client.call(wanted, find)
        if collection is None:
            collection = client.call(
                wanted,
                api.create_collection,
                title,
                namespace=namespace,
                description=_DESCRIPTION,
                private=private,
                exists_ok=True,
            )
        # the list gives the first items only
        collection = client.call(wanted, api.get_collection, collection.slug)
        there = {item.item_id for item in collection.items}
        new = [repo_id for repo_id in repo_ids if repo_id not in there]
        for repo_id in new:
            client.call(wanted, api.add_collection_item, collection.slug, repo_id, 'model', exists_ok=True)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise client.failure(wanted, error) from None
    return collection.slug, len(new)
