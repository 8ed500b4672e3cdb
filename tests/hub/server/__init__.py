"""A small Hugging Face Hub on 127.0.0.1, so that the real client can be tested over real HTTP.

It speaks the Hub's protocol for model repositories. The reading half: `resolve` (HEAD and GET, with ranges), model
info, the list of models, tree, paths-info, refs and commits. The writing half: repositories and their settings,
branches and tags, cards, preupload, LFS (batch, PUT, verify) and atomic commits with compare-and-swap, also as pull
requests. It knows who may do what, and answers with the error codes by which the client tells a
missing repository from a missing revision, a missing file or a gate. On demand it goes wrong. In a test:

    with HubServer(tokens={'hf_me': 'me'}) as hub:
        hub.commit('someone/model', {'config.json': '{}', 'model.safetensors': Path('weights.safetensors')})
        api = HfApi(endpoint=hub.endpoint, token='hf_me')
        api.model_info('someone/model')
        assert hub.paths('HEAD') == []
        hub.faults.add('drop_after', method='POST', path='/api/models/me/model/commit/')
        api.create_repo('me/model')  # a user may write in the namespace of that name and in those of `orgs`
        api.create_commit('me/model', operations, commit_message='It lands, and the client is not told')
        assert hub.commit_counts['me/model'] == 1 and hub.weight_bytes['me/model'] == weights_size

and from a shell, where every FOLDER/namespace/name is one repository:

    cd tests; python -m hub.server --port 8000 FOLDER

Only the standard library is used, and nothing here imports huggingface_hub, which reads its settings when it is
imported: `client_environment` gives those settings, to be set before that.

A request passes through four parts: `_Handler` in server.py (HTTP to `Request`), `HubServer.answer` (faults, the user,
errors, the log), a route (routes.py, reading.py and writing.py: a function that turns a `Request` into a `Response`),
and `Hub` (store.py), the repositories, which know nothing of HTTP. What can go wrong is in faults.py.
"""

from .faults import Fault, Faults
from .routes import Refusal, Request, Response
from .server import HubServer, Logged, client_environment
from .store import Blob, Commit, Hub, Repo, Source

__all__ = [
    'Blob',
    'Commit',
    'Fault',
    'Faults',
    'Hub',
    'HubServer',
    'Logged',
    'Refusal',
    'Repo',
    'Request',
    'Response',
    'Source',
    'client_environment',
]
