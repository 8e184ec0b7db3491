"""Where a run stands, what it is resumed from, and the models that it leaves."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dgsnet.config import ModelConfig
from dgsnet.errors import UserError
from dgsnet.model import checkpoint
from dgsnet.model.averages import average
from dgsnet.model.dgsnet import DGSNet
from dgsnet.training import drift, parallel
from dgsnet.training.checks import uses_surgery
from dgsnet.training.experts import FileExpert
from dgsnet.training.feed import Feed
from dgsnet.training.log import Log
from dgsnet.training.plan import BRANCHES, HEAD, Job, Position
from dgsnet.training.step import TRAIN_COLUMNS, Found

STATE_FILE = Path("state") / "resume.pt"


class State:
    """All that changes as a run goes on; with its configuration and data, all that decides how it ends.

    Attributes:
        backbone: fingerprint of the frozen encoder.
        position: stage, epoch and step.
        best: the measure of optim.best and negative loss of the model in best/; None before there is one.
        recent: `trained_state` of the last optim.average checkpoints of stage 2.
        sums: TRAIN_COLUMNS since the last logged step, weighted and added up; last, the sum of the weights.
        moments: `drift.moments`, likewise.
    """

    def __init__(
        self,
        job: Job,
        accelerator: Accelerator,
        model: DGSNet,
        expert: FileExpert | None,
        feed: Feed,
        backbone: str,
    ) -> None:
        self.job, self.accelerator = job, accelerator
        self.model, self.expert, self.feed, self.backbone = model, expert, feed, backbone
        self.position = Position(HEAD if uses_surgery(job.config) else BRANCHES)
        self.best: list[float] | None = None
        self.recent: list[dict[str, Tensor]] = []
        self.sums = torch.zeros(len(TRAIN_COLUMNS) + 1, device=accelerator.device)
        self.moments = torch.zeros(drift.size(model.dim), dtype=torch.float64, device=accelerator.device)

    def add(self, found: Found, weight: float) -> None:
        self.sums += weight * torch.cat([found.values, found.values.new_ones(1)])
        if found.moments is not None:
            self.moments += weight * found.moments

    def end_stage(self) -> None:
        """Go to the beginning of the next stage, or beyond the last, with average/ written."""
        if self.position.stage == BRANCHES and self.recent:
            state, model = average(self.recent, [self.job.config.model] * len(self.recent))
            self._write("average", state, self._trained_on(), {"averaged": len(self.recent)}, model)
        self.position = Position(self.position.stage + 1, step=self.position.step)

    def keep_best(self, result: dict[str, float]) -> None:
        """Write best/ if no validation had a better result; without validation, always."""
        # Equal AP, as at 1, is decided by the loss, and so is AP that one class alone does not have.
        measure = f"val_{self.job.config.optim.best}"
        score = [np.nan_to_num(result[measure]).item(), -result["val_loss"]] if result else None
        if score is None or self.best is None or score > self.best:
            self.best = score
            self._write("best", checkpoint.trained_state(self.model), self._trained_on(), result)

    def save(
        self, optimizer: torch.optim.Optimizer | None, log: Log, result: dict[str, float] | None = None
    ) -> None:
        """Write last/, then the state to resume from, which counts on all else being there.

        Between stages there is no optimiser. `result`: of a validation of this very model.
        """
        # All processes take part in what is gathered; the first one writes.
        sums, moments = (self.accelerator.reduce(x, "mean") for x in (self.sums, self.moments))
        trained, hashes = checkpoint.trained_state(self.model), self._trained_on()
        entries = parallel.optimizer_state(optimizer) if optimizer else None
        expert = self.expert and {
            name: checkpoint.whole(t).cpu() for name, t in self.expert.state_dict().items()
        }
        if self.position.stage == BRANCHES and self.position.stage_step:
            self._write("last", trained, hashes, result or {})
            if self.job.update and self.job.update.pins:
                self.job.update.pins.check(self.model, self.job.config, self.position.step)
            if self.job.config.optim.average:
                # Copies, since on a CPU these are the weights that training goes on with.
                kept = {name: tensor.clone() for name, tensor in trained.items()}
                self.recent = [*self.recent, kept][-self.job.config.optim.average :]
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "position": asdict(self.position),
                "model": trained,
                "optimizer": entries,
                "scaler": scaler.state_dict() if scaler else None,
                "expert": expert,
                "sums": sums,
                "moments": moments,
                "images_per_step": self.feed.plan.images,
                "best": self.best,
                "recent": self.recent,
                "metrics_bytes": log.sync(),
                "data": self.feed.data_hash,
                "backbone": self.backbone,
                "trained_on": torch.from_numpy(hashes),
            }
            (self.job.out / STATE_FILE).parent.mkdir(exist_ok=True)
            checkpoint.save_state(self.job.out / STATE_FILE, state)
        self.accelerator.wait_for_everyone()

    def restore(self) -> dict[str, Any] | None:
        """Go to where the run in `out` stands, if it has got anywhere; returns what was saved."""
        path = self.job.out / STATE_FILE
        if not path.is_file():
            return None
        saved = checkpoint.load_state(path)
        with checkpoint.damaged_state(path):
            self._take(saved)
        return saved

    def _take(self, saved: dict[str, Any]) -> None:
        for key, now, what in (
            ("data", self.feed.data_hash, "the training images, their labels or captions"),
            ("backbone", self.backbone, f"the weights of {self.job.config.model.name}"),
        ):
            if saved[key] != now:
                raise UserError(
                    f"cannot resume {self.job.out}: {what} have changed since it was started; start a new run"
                )
        checkpoint.load_trained_state(self.model, saved["model"])
        self.position, self.best = Position(**saved["position"]), saved["best"]
        least = {"stage": HEAD, "images_per_step": 1}
        sizes = {name: saved[name] for name in ("images_per_step", "metrics_bytes")}
        for name, value in (asdict(self.position) | sizes).items():
            if type(value) is not int or not least.get(name, 0) <= value < 2**62:
                raise ValueError(f"{name} is {value!r}")
        if self.best is not None and [type(x) for x in self.best] != [float, float]:
            raise ValueError(f"best is {self.best!r}")
        self.sums.copy_(saved["sums"])
        if self.expert is not None:
            self.expert.load_state_dict(saved["expert"])
        # A state of an older version has none of these.
        if "trained_on" in saved:
            self.feed.trained_on = set(saved["trained_on"].tolist())
        if "moments" in saved:
            self.moments.copy_(saved["moments"])
        self.recent = saved.get("recent", [])
        shapes = {name: tensor.shape for name, tensor in saved["model"].items()}
        if any({name: tensor.shape for name, tensor in one.items()} != shapes for one in self.recent):
            raise ValueError("recent models have other weights")
        # On another number of processes a step keeps its images, in more or fewer micro-batches.
        self.feed.plan.images = saved["images_per_step"]
        self.feed.readable = self.position.step > 0

    def _write(
        self,
        name: str,
        trained: dict[str, Tensor],
        hashes: np.ndarray,
        result: dict[str, float],
        model: ModelConfig | None = None,
    ) -> None:
        if self.accelerator.is_main_process:
            extra: dict[str, Any] = {key: value for key, value in result.items() if math.isfinite(value)}
            if self.job.update:
                extra["update"] = self.job.update.record
            checkpoint.write_model(
                self.job.out / name,
                trained,
                self.backbone,
                replace(self.job.config, model=model or self.job.config.model),
                trained_on=hashes,
                step=self.position.step,
                **extra,
            )

    def _trained_on(self) -> np.ndarray:
        """Hashes of the files that any process has trained on, int64, ascending."""
        own = self.feed.trained_on
        parts = gather_object([np.fromiter(own, np.int64, len(own))])
        return np.unique(np.concatenate(parts))
