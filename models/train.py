"""Train the demo model: `python -m models.train`. Seeded, with fixed steps, on two CPU cores."""

import argparse
import itertools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import distributed
from torch.multiprocessing.spawn import spawn

from models.batches import MicroBatch, micro_batches
from models.bpe import train_tokenizer
from models.mixtures import PHASES, Phase
from models.network import Llama, Shape, block
from models.optimizer import Optimizer

PROCESSES = 2
"""Two processes of one thread each: much faster on a busy machine than one process of two."""
WARM_UP = 40
"""Steps of the first phase over which the learning rate grows."""
SEED = 7
TOKENIZER_SEED = 11


def rate_factor(phase: Phase, step: int, first: bool) -> float:
    """Learning-rate factor at `step` of the phase: a cosine between the two rates."""
    start, end = phase.rate
    factor = end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    return factor * min(1.0, (step + 1) / WARM_UP) if first else factor


class Trainer:
    """One process of the training run."""

    def __init__(self, rank: int, folder: Path) -> None:
        self._rank, self._folder = rank, folder
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._model = Llama(Shape(vocabulary=self._tokenizer.get_vocab_size()), SEED)
        self._model.run_block = torch.compile(block, dynamic=True)
        self._optimizer = Optimizer(self._model, rank, PROCESSES)
        self._done = 0
        self._started = time.monotonic()

    def resume(self) -> None:
        """Continue from the last checkpoint; the batches before it are skipped."""
        saved = torch.load(self._folder / "checkpoint.pt")
        self._model.load_state_dict(saved["model"])
        self._optimizer.load(saved["optimizer"])
        self._done = saved["step"]

    def run(self, save_every: int) -> None:
        """All phases, in order."""
        before = 0
        for phase in PHASES:
            batches = micro_batches(phase, self._tokenizer)
            skip = min(max(self._done - before, 0), phase.steps)
            mine = itertools.islice(
                batches, skip * phase.micro_batches + self._rank, None, PROCESSES
            )
            for step in range(skip, phase.steps):
                loss, tokens = self._step(
                    itertools.islice(mine, phase.micro_batches // PROCESSES),
                    rate_factor(phase, step, before == 0),
                )
                self._done = before + step + 1
                if self._rank == 0 and self._done % 10 == 0:
                    seconds = time.monotonic() - self._started
                    print(
                        f"{phase.name} {self._done} loss {loss:.4f} {tokens} {seconds:.0f} s",
                        flush=True,
                    )
                if self._rank == 0 and self._done % save_every == 0:
                    self._save()
            before += phase.steps
        if self._rank == 0:
            self._save()

    def _step(self, batches: Iterator[MicroBatch], factor: float) -> tuple[float, int]:
        """One step on this process's share; mean loss and tokens (with padding) over all."""
        total, count, tokens = 0.0, 0, 0
        for batch in batches:
            loss = self._model.loss(batch.tokens, batch.graded)
            torch.autograd.backward(loss)
            total += float(loss.detach())
            count += int(batch.graded[:, 1:].sum())
            tokens += batch.tokens.numel() * PROCESSES
        mean = self._optimizer.reduce(total, count)
        self._optimizer.step(factor)
        return mean, tokens

    def _save(self) -> None:
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state(),
            "step": self._done,
        }
        partial = self._folder / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self._folder / "checkpoint.pt")


def _process(rank: int, folder: Path, port: int, resume: bool, save_every: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=PROCESSES)
    trainer = Trainer(rank, folder)
    if resume:
        trainer.resume()
    trainer.run(save_every)
    distributed.destroy_process_group()


def main() -> None:
    """Train the tokenizer and the model; both lie in the folder afterwards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/model"))
    parser.add_argument("--port", type=int, default=29511, help="for the two processes to meet")
    parser.add_argument("--resume", action="store_true", help="from the folder's checkpoint")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not options.resume:
        train_tokenizer(TOKENIZER_SEED).save(str(options.folder / "tokenizer.json"))
    arguments = (options.folder, options.port, options.resume, options.save_every)
    spawn(_process, arguments, nprocs=PROCESSES)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
