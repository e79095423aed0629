"""Requests a second against replicas: the embedded server deployed on Ray Serve, on one machine.

    python scripts/bench_replicas.py [--clients 8] [--each 4] [--folder DIR]

The model, adapters and clients of `bench_server.py`; every client asks another adapter. What
`dora-serve deploy --to ray` writes is started by `serve run`, with as many replicas of so many
cores. Ray's proxy and the clients take their time from the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from bench_server import ADAPTERS, PORT, SHAPE, TINY, Load, drive, make_models, serving

PROGRAMS = Path(sys.executable).parent


def config(models: Path, replicas: int, threads: int) -> str:
    command = [
        str(PROGRAMS / "dora-serve"),
        "deploy",
        str(models),
        "--to",
        "ray",
        "--engine",
        "onnxruntime",
    ]
    command += ["--min-replicas", str(replicas), "--threads", str(threads)]
    asked = yaml.safe_load(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    asked["http_options"] = {"host": "127.0.0.1", "port": PORT}
    return str(yaml.safe_dump(asked))


def bench(folder: Path, replicas: int, threads: int, clients: int, each: int) -> Load:
    file = folder / "serve.yaml"
    file.write_text(config(folder / "all", replicas, threads))
    environment = {"DORA_SERVE_CACHE": str(folder / "cache"), "RAY_USAGE_STATS_ENABLED": "0"}
    with serving([str(PROGRAMS / "serve"), "run", str(file)], folder, environment):
        return asyncio.run(drive(ADAPTERS, clients, each))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--each", type=int, default=4, help="requests of a client")
    parser.add_argument("--folder", type=Path, help="where the models are made, and kept")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to try the script")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "one").exists():
            make_models(folder, TINY if options.tiny else SHAPE)
        print(
            "| replicas | cores of each | requests/s | tokens/s | first token, ms | p95 |", end=""
        )
        print(f" token, ms | p95 |\n|{'---:|' * 8}")
        for replicas, threads in ((1, 1), (cores, 1), (1, cores)):
            load = bench(folder, replicas, threads, options.clients, options.each)
            print(f"| {replicas} | {threads} | {load.cells()} |", flush=True)


if __name__ == "__main__":
    main()
