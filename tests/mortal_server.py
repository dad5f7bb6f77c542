"""A server process that comes back when it is killed: loads once, forks one child a life.

Run as: python mortal_server.py MODEL_FOLDER PORT [recompute]. Prints the child's pid when it
serves.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = (
    "1"  # a fork must not inherit a pool of threads that do not exist in it
)

from transformers import AutoModelForCausalLM, AutoTokenizer

from dlora.cloud.limits import Limits
from dlora.cloud.model import CloudModel
from dlora.server.server import Server


def main(folder: str, port: int, *words: str) -> None:
    """Serve; after each SIGKILL serve again."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    has_one = Path(folder, "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_one else None
    while True:
        pid = os.fork()
        if pid == 0:
            limits = Limits(edge_first=1, edge_last=1, recompute="recompute" in words)
            cloud = CloudModel(model, model_id="example-org/llama", limits=limits)
            server = Server(cloud, tokenizer, port=port)
            server.start()
            print(os.getpid(), flush=True)
            time.sleep(600)
            os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
