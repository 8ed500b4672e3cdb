"""Time that importing timm_reparam takes beyond timm's own import: registering every family included.

    python tests/benchmarks/import_time.py

Every measurement is a process of its own; the smallest of them is what the import takes on a machine at rest.
"""

import argparse
import statistics
import subprocess
import sys

MEASURE = """
import time
import timm
start = time.perf_counter()
import timm_reparam
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description='Time the import of timm_reparam beyond that of timm.')
    parser.add_argument('--runs', type=int, default=10, help='processes to start (default: %(default)s)')
    runs = parser.parse_args().runs
    seconds = [float(subprocess.check_output([sys.executable, '-c', MEASURE])) for _ in range(runs)]
    print(f'smallest {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s, {runs} processes')


if __name__ == '__main__':
    main()
