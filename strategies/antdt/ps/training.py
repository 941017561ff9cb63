"""A worker's part in the training of a run: it fetches weights, sends gradients, and meets the others between epochs."""

import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from strategies.antdt.ps.agent import Agent
from strategies.antdt.ps.agreement import Agreement
from strategies.antdt.ps.collectives import Collectives
from strategies.antdt.ps.loader import ShardBatch, ShardLoader
from strategies.antdt.ps.open_loop import OpenLoop
from strategies.antdt.ps.remote_parameters import RemoteParameters
from strategies.antdt.ps.rendezvous import begin_anew
from strategies.antdt.ps.schedules import Schedules
from strategies.antdt.ps.worker import ParameterClient
from strategies.antdt.service.client import Client

__all__ = ["Training"]

_PATIENCE_OF_THE_LATE = 5.0  # seconds: if nobody lets them in, the others have done


@dataclass
class Training:
    """What happens from the first step to the last.

    Attributes:
        module: what is trained.
        client: calls to the parameter servers.
        data: calls to the data-sharding server.
        loader: of this worker's batches.
        parameters: of the module.
        loop: of Lightning.
        schedules: of learning rates.
        agent: of the controller.
        agreement: with the other workers.
        collectives: of all workers.
        requeue: whether others get the samples of a gradient that is dropped.
        averages: whether a callback wants to see the weights after each step.
        divided: ranks among whom samples of evaluation are divided; None: not among those who are there.
        log: gets ``(epoch, version, positions)`` of each gradient that counts, for tests.
        synced: whether this worker holds what the servers have, as all others do.
    """

    module: nn.Module
    client: ParameterClient
    data: Client
    loader: ShardLoader
    parameters: RemoteParameters
    loop: OpenLoop
    schedules: Schedules
    agent: Agent
    agreement: Agreement
    collectives: Collectives
    requeue: bool
    averages: bool
    divided: list[int] | None
    log: list[tuple[int, int, Tensor]] | None
    synced: bool = False
    _fresh: bool = field(default=False, init=False)
    _begun: float = field(default=0.0, init=False)
    _version: int = field(default=0, init=False)

    # ---- beginning ----------------------------------------------------------------------------------------------------

    def enter_late(self) -> int:
        """Be let in by those who train already.

        Returns:
            The epoch that they train.

        Raises:
            ConnectionError: or ``ServiceError``: nobody does.
        """
        self.client.patience, patience = _PATIENCE_OF_THE_LATE, self.client.patience
        epoch = self.client.enter(0)
        self.client.patience = patience
        return epoch

    def catch_up(self, epoch: int) -> None:
        """Be where the others are, in an epoch that they have let this worker in to."""
        self.loop.join_epoch(epoch)
        self.client.look()
        for _ in range(epoch):
            self.schedules.step("epoch", self.loop.epoch + 1)

    # ---- a step -------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> ShardBatch:
        """The one that is being trained."""
        assert self.loader.current is not None
        return self.loader.current

    def begin_step(self) -> None:
        """Fetch weights, once the step may begin."""
        self.collectives.in_step, self.synced = True, False
        if not self._fresh:
            self._pull()
        self._fresh = False
        self._begun, self.parameters.waited = time.perf_counter(), 0.0

    def _pull(self) -> None:
        self.parameters.pull(self.loop.clip.norm, gate=self.batch.count > 0)
        self._version = self.client.version

    def push(self, samples: float) -> None:
        """Send the gradient, and see whether there is more to train.

        Args:
            samples: over how many the loss was the mean, tokens or boxes perhaps; of a shadow batch no matter.
        """
        batch = self.batch
        if batch.count:
            self._send(batch, samples)
        self.parameters.forget_gradients()
        self.agreement.hear()
        self.agent.obey(self.client.plan, self.loader)
        self.collectives.in_step = False
        spent = self.agreement.is_spent
        if spent:
            self.loop.end_training()
        if self.loader.ended or spent or self.loader.peek() == "end":
            # All is trained: say so to the loop before it asks, and take the servers' weights, which no one changes any more.
            self.loader.ended = True
            self._end_epoch()
            self.meet()
        elif self.averages and batch.count:
            self._pull()  # the callback that averages wants what this step has made of the weights
            self._fresh = True

    def _send(self, batch: ShardBatch, samples: float) -> None:
        gradient = self.parameters.gradient(samples)
        # Not what servers took for rows: a slow one must not make this worker look slow.
        computed = time.perf_counter() - self._begun - self.parameters.waited
        outcome = self.client.push(
            self.parameters.layout, gradient, self.parameters.hyperparameters(self.agent.lr_factor), version=self._version,
            items=batch.items, gen=self.data.gen,
        )  # fmt: skip
        self.agent.steps += 1
        if outcome.accepted:
            if self.log is not None:
                self.log.append((self.loader.epoch, self._version, batch.positions))
        else:
            self.agent.dropped += 1
            if self.requeue:
                self.loader.give_back(batch)
        if self.agent.measure(batch, computed) and len(self.collectives.present) > 1:  # else nobody would be left
            print(f"worker {self.collectives.rank} starts again: the controller found it slow", flush=True)
            self.data.leave()
            self.client.leave()
            begin_anew(self.client.run)

    # ---- together -----------------------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        """Tell the loop that the batch in its hands is the last."""
        self.client.look()
        if self.agreement.is_spent:
            self.loop.end_training()
        self.loop.end_epoch()

    def meet(self) -> None:
        """Take the servers' weights when all have come, so that all hold the same."""
        if self.synced:
            return
        self.collectives.in_step = False
        self._confer()
        self.collectives.share(self.module, but=self.parameters.trained)
        self.parameters.pull_everything(self.loop.clip.norm)
        self.synced = True

    def _confer(self) -> None:
        """Know alike who is there, what was asked for, and whether the epoch has ended: some may have heard it too late."""
        own = [self.divided, self.agreement.heard, self.loader.ended]
        found = list(self.collectives.gather(own, "a synchronisation").values())
        self.agreement.hear_all(heard for _, heard, _ in found)
        present = self.collectives.present = list(self.client.present) or self.collectives.present
        if any(divided != present for divided, _, _ in found):
            self.divided = list(present)
            self.loop.divide_evaluation_anew()
        if not self.loader.ended and any(ended for _, _, ended in found) and not self.collectives.parted:
            # A worker that saves while it waits for the last samples of others.
            self.loader.ended = True
            self._end_epoch()
            self.schedules.step("epoch", self.loop.epoch + 1)

    # ---- what is kept -------------------------------------------------------------------------------------------------

    def position(self) -> dict[str, Any]:
        """What a checkpoint says beside the weights: steps done, and what is left of the epoch."""
        return {"version": self.client.version, "ledger": self.data.snapshot()["ledger"]}

    def leave_data(self) -> None:
        """Nothing will be trained any more."""
        self.agent.flush()
        self.data.leave()
