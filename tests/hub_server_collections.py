"""The collections of the loopback Hub."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hub_server_routes import Refusal, Request, Response, page, require_writer, route
from hub_store import Collection, Item

if TYPE_CHECKING:
    from hub_server import HubServer

_SLUG = r'(?P<slug>[^/]+/[^/]+)'


def _collection(hub: 'HubServer', user: str | None, slug: str) -> Collection:
    """The collection with that slug (its id, the end of the slug, is what counts), if the user may see it."""
    for collection in hub.collections.values():
        if collection.slug.rsplit('-', 1)[-1] == slug.rsplit('-', 1)[-1]:
            if not collection.private or hub.may_write_in(collection.namespace, user):
                return collection
    raise Refusal(404 if user else 401, '', 'Collection not found')


def _own_collection(hub: 'HubServer', request: Request, user: str | None, slug: str) -> Collection:
    """The collection with that slug, if the user may change it."""
    collection = _collection(hub, user, slug)
    if not hub.may_write_in(collection.namespace, require_writer(hub, request, user)):
        raise Refusal(403, '', "You don't have the required permissions to perform this action")
    return collection


def _slug(namespace: str, title: str, id_: str) -> str:
    words = re.sub('[^0-9a-z]+', '-', title.lower()).strip('-')
    return f'{namespace}/{words}-{id_}'


def _collection_json(hub: 'HubServer', collection: Collection) -> dict:
    items = [
        {
            '_id': item.id,
            'id': item.target,
            'type': item.kind,
            'position': position,
            **({} if item.note is None else {'note': {'text': item.note, 'html': item.note}}),
        }
        for position, item in enumerate(collection.items)
    ]
    return {
        'slug': collection.slug,
        'title': collection.title,
        'description': collection.description,
        'owner': {'name': collection.namespace, 'type': 'org' if collection.namespace in hub.orgs else 'user'},
        'private': collection.private,
        'theme': collection.theme,
        'upvotes': 0,
        'position': list(hub.collections.values()).index(collection),
        'lastUpdated': '2024-01-01T00:00:00.000Z',
        'items': items,
    }


def _short(data: Mapping, name: str, limit: int) -> str | None:
    text = data.get(name)
    if text is not None and (not isinstance(text, str) or len(text) > limit):
        raise Refusal(400, '', f'"{name}" must be text of at most {limit} characters')
    return text


@route('GET', '/api/collections')
def _list_collections(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    owner, item = (request.query.get(name, [''])[0] for name in ('owner', 'item'))
    found = [
        # The client numbers them itself, and of each list of items the Hub shows the beginning here.
        {key: value[:4] if key == 'items' else value for key, value in shown.items() if key != 'position'}
        for collection in hub.collections.values()
        for shown in [_collection_json(hub, collection)]
        if owner in ('', collection.namespace)
        and (not item or any(item == f'{entry.kind}s/{entry.target}' for entry in collection.items))
        and (not collection.private or hub.may_write_in(collection.namespace, user))
    ]
    return page(hub, request, found)


@route('POST', '/api/collections')
def _create_collection(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    data, writer = request.data(), require_writer(hub, request, user)
    title, namespace = _short(data, 'title', 60), data.get('namespace')
    if not title:
        raise Refusal(400, '', 'A collection needs a title')
    if not hub.may_write_in(namespace, writer):
        raise Refusal(403, '', f'You don\'t have the rights to create a collection under "{namespace}"')
    for collection in hub.collections.values():
        if (collection.namespace, collection.title) == (namespace, title):
            raise Refusal(409, '', 'This collection already exists', json={'slug': collection.slug})
    slug = _slug(namespace, title, hub.new_id())
    private = bool(data.get('private'))
    collection = Collection(slug, title, namespace, private, _short(data, 'description', 150))
    hub.collections[slug] = collection
    return Response(json=_collection_json(hub, collection))


@route('GET', f'/api/collections/{_SLUG}')
def _get_collection(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    return Response(json=_collection_json(hub, _collection(hub, user, match['slug'])))


@route('PATCH', f'/api/collections/{_SLUG}')
def _update_collection(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    collection, data = _own_collection(hub, request, user, match['slug']), request.data()
    title, description = _short(data, 'title', 60), _short(data, 'description', 150)
    if title:
        del hub.collections[collection.slug]
        collection.title = title
        collection.slug = _slug(collection.namespace, title, collection.slug.rsplit('-', 1)[-1])
        hub.collections[collection.slug] = collection
    collection.description = collection.description if description is None else description
    collection.private = data.get('private', collection.private)
    collection.theme = data.get('theme', collection.theme)
    return Response(json={'success': True, 'data': _collection_json(hub, collection)})


@route('DELETE', f'/api/collections/{_SLUG}')
def _delete_collection(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    del hub.collections[_own_collection(hub, request, user, match['slug']).slug]
    return Response(json={'success': True})


@route('POST', f'/api/collections/{_SLUG}/items')
def _add_item(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    collection, data = _own_collection(hub, request, user, match['slug']), request.data()
    target, kind = data.get('item', {}).get('id'), data.get('item', {}).get('type')
    if kind != 'model' or target not in hub.repos:
        raise Refusal(404, '', f'There is no {kind} {target}')
    if any((item.target, item.kind) == (target, kind) for item in collection.items):
        raise Refusal(409, '', f'{target} is in the collection already')
    collection.items.append(Item(hub.new_id(), kind, target, _short(data, 'note', 500)))
    return Response(json=_collection_json(hub, collection))


def _item(collection: Collection, id_: str) -> Item:
    for item in collection.items:
        if item.id == id_:
            return item
    raise Refusal(404, '', 'Item not found')


@route('PATCH', rf'/api/collections/{_SLUG}/items/(?P<item>\w+)')
def _update_item(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    collection, data = _own_collection(hub, request, user, match['slug']), request.data()
    item, note = _item(collection, match['item']), _short(data, 'note', 500)
    item.note = item.note if note is None else note
    if 'position' in data:
        collection.items.remove(item)
        collection.items.insert(data['position'], item)
    return Response(json={'success': True})


@route('DELETE', rf'/api/collections/{_SLUG}/items/(?P<item>\w+)')
def _delete_item(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    collection = _own_collection(hub, request, user, match['slug'])
    collection.items.remove(_item(collection, match['item']))
    return Response(json={'success': True})
