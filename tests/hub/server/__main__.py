"""`python -m hub.server` in the folder tests: folders on disk behind a port, for a client in another process."""

import argparse
import signal
import threading
from pathlib import Path

from . import HubServer


def main() -> None:
    parser = argparse.ArgumentParser(description='Serves folders as repositories of a Hugging Face Hub on 127.0.0.1.')
    parser.add_argument('folder', type=Path, help='every FOLDER/namespace/name is one repository')
    parser.add_argument('--port', type=int, default=0, help='port to listen on (default: a free one)')
    parser.add_argument('--token', action='append', default=[], metavar='TOKEN=USER', help='who may write as whom')
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f'{args.folder} is not a folder')
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell starts it in the background
    with HubServer(args.port, dict(token.split('=', 1) for token in args.token)) as hub:
        repos = hub.add_zoo(args.folder)
        print(f'HF_ENDPOINT={hub.endpoint} HF_HUB_DISABLE_XET=1', flush=True)
        print('\n'.join(repos), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == '__main__':
    main()
