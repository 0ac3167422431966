"""Runs the llama.cpp server of the xllamacpp wheel until it is ended: one of the peers."""

from __future__ import annotations

import argparse
import threading

import xllamacpp


def main() -> None:
    """Serves one model with the server's own defaults but for size, threads and address."""
    parser = argparse.ArgumentParser(prog="python -m bench.xllamacpp_server", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--cells", type=int, required=True)
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.n_parallel = args.sequences
    params.n_ctx = args.cells
    params.n_batch = params.n_ubatch = 512
    params.kv_unified = True
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    params.ui = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
