"""Time and bytes of syncing a zoo of 50 models to the loopback Hub: the first time, again, and with one model changed.

    python tests/benchmarks/sync.py [--models 50] [--workers 4] [--model resnet10t_doconv] [--json]
    python tests/benchmarks/sync.py --zoo tests/benchmarks/zoo           # trained pairs, a result of accuracy.py

The models are small (8 channels), unless another --model is given: what is timed is what a sync does beside hashing
and sending large files, over a connection without delay. The bytes are counted by the server.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub.server import HubServer, client_environment  # noqa: E402

SMALL = dict(num_classes=2, channels=(8, 8, 8, 8), stem_width=4)
DATA_CONFIG = dict(input_size=(3, 32, 32), crop_pct=1.0)


def measure(hub: HubServer, models: int, workers: int, name: str | None, zoos: list[Path]) -> list[dict]:
    """Sync a zoo, three times or, of trained pairs, twice, and give what each time took and sent."""
    # only now does the client know where the Hub is
    import timm
    import torch
    from stand_in import randomise

    from timm_reparam import FusionReport
    from timm_reparam.hub import save_pair, sync

    # written down without a verification: sync verifies every pair itself
    unmeasured = FusionReport(algebra=1e-15, stored=1e-7, own=1e-7, bound=1e-6, top1_agreement=1.0, num_inputs=64)

    def add_pair(zoo: Path, number: int, seed: int) -> None:
        torch.manual_seed(seed)
        options = {} if name else SMALL
        model = randomise(timm.create_model(name or 'resnet10t_doconv', **options), seed=seed).eval()
        facts = {'license': 'mit'}
        save_pair(model, zoo, tag=f'm{number:02d}', report=unmeasured, facts=facts, data_config=DATA_CONFIG)

    rows = []
    with tempfile.TemporaryDirectory(prefix='benchmark-') as folder:
        zoo = Path(folder) / 'zoo'
        for given in zoos:
            shutil.copytree(given, zoo, dirs_exist_ok=True)  # of two with one name the last one counts
        for number in range(0 if zoos else models):
            add_pair(zoo, number, seed=number)
        for what in ('first', 'again') if zoos else ('first', 'again', 'one changed'):
            if what == 'one changed':
                add_pair(zoo, models // 2, seed=models)
            hub.clear()
            began = time.perf_counter()
            report = sync(zoo, 'owner', workers=workers, progress=False)
            assert report.ok, report
            rows.append(
                {
                    'sync': what,
                    'seconds': round(time.perf_counter() - began, 2),
                    'requests': len(hub.log),
                    'commits': sum(hub.commit_counts.values()),
                    'bytes_of_weights': sum(hub.weight_bytes.values()),
                    'bytes_received': sum(entry.received for entry in hub.log),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description='Times the sync of a zoo to the loopback Hub and counts its bytes.')
    parser.add_argument('--models', type=int, default=50, help='pairs in the zoo (default: 50)')
    parser.add_argument('--workers', type=int, default=4, help='models at a time (default: 4)')
    parser.add_argument('--model', help='architecture of its full size (default: a small resnet10t_doconv)')
    parser.add_argument('--zoo', nargs='+', type=Path, default=[], metavar='FOLDER', help='pairs to sync instead')
    parser.add_argument('--json', action='store_true', help='print the rows as json')
    args = parser.parse_args()
    with HubServer(tokens={'hf_owner': 'owner'}) as hub, tempfile.TemporaryDirectory(prefix='hub-home-') as home:
        environment = {**client_environment(hub.endpoint, home), 'HF_TOKEN': 'hf_owner'}
        os.environ.clear()  # of settings of the client, too
        os.environ.update(environment)
        rows = measure(hub, args.models, args.workers, args.model, args.zoo)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print('  '.join(f'{key:>16}' for key in rows[0]))
    for row in rows:
        print('  '.join(f'{value:>16,}' if not isinstance(value, str) else f'{value:>16}' for value in row.values()))


if __name__ == '__main__':
    main()
