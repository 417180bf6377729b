"""The client's side of a run on many workers: parts out, reports in, until every part is done.

Dask brings the workers, their addresses and its dashboard. Which worker does which part is decided here, by a `Dealer`:
a task names its worker, so none waits in a queue of one that has died or stands still. Nothing travels but the job
(where the cache and the photos are), part numbers, and reports of some hundred bytes; features go from a worker to the
cache. A report comes as an event, through the scheduler: as a task's result it would lie with the worker, which may die
or freeze before it is fetched.
"""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regionspot.cache.progress import Progress
from regionspot.pipeline.clusters import RECONNECT_SECONDS, address_of, client_of, dashboard, gone, trouble_of
from regionspot.pipeline.dealing import Dealer, Offer
from regionspot.pipeline.part_worker import Job, PartReport, do_task

if TYPE_CHECKING:
    from distributed import Client, Future

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # between two looks which workers there are
SAY_SECONDS = 60.0  # between two lines about what is waited for
LOST_SECONDS = 5.0  # from the end of a task until its report, which was sent before, counts as lost


@dataclass
class Totals:
    """What the workers did together, as far as they are.

    parts           that they wrote; `others` were done by other runs meanwhile
    seconds         since the begin; `busy`: those of all parts, of which `stages` has each stage's
    most_workers    that were there at once
    with_failures   parts some of whose pictures could not be read
    """

    pictures: int = 0
    failed: int = 0
    ignored: int = 0
    regions: int = 0
    bytes: int = 0
    parts: int = 0
    others: int = 0
    most_workers: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)
    with_failures: list[int] = field(default_factory=list)

    def add(self, report: PartReport) -> None:
        """Count a part that one of the workers has written."""
        self.parts += 1
        self.pictures += report.pictures
        self.failed += report.failed
        self.ignored += report.ignored
        self.regions += report.regions
        self.bytes += report.bytes
        if report.failed:
            self.with_failures.append(report.part)
        self.busy += report.seconds
        self.stages.update(report.stages)

    def shares(self) -> dict[str, float]:
        """Each stage's share of the workers' time."""
        return {stage: seconds / max(self.busy, 1e-9) for stage, seconds in self.stages.items()}


def run_parts(
    client: Client,
    job: Job,
    parts: Mapping[int, int],
    totals: Totals,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Have the workers of `client` do `parts` (with the number of pictures of each), and say how far they are.

    totals  counts what was done
    check   called after each part; what it raises ends the run

    At an interrupt the workers end what they hold, then KeyboardInterrupt is raised; at a second one at once. Raises
    CacheError, in one line, when a part cannot be done or the scheduler is gone; what is written by then stays.
    """
    with _Run(client, job, parts, totals, check) as run:
        try:
            run.until(lambda: run.dealer.finished)
            run.hear_what_is_under_way()
        except KeyboardInterrupt:
            run.finish_what_is_held()
            raise


class _Run:
    def __init__(
        self, client: Client, job: Job, parts: Mapping[int, int], totals: Totals, check: Callable[[], None]
    ) -> None:
        self._client, self._job, self._pictures, self._check = client, job, parts, check
        self._address = address_of(client)  # which a client forgets when it loses its scheduler
        self._run = uuid.uuid4().hex
        self._topic = f"regionspot-{self._run}"
        # The number of an offer with the worker's report, or with the future of a task that ended.
        self._news: queue.SimpleQueue[tuple[int, PartReport | Future[Any]]] = queue.SimpleQueue()
        self._offers: dict[int, tuple[Offer, Future[Any]]] = {}
        self._given_up: dict[int, Offer] = {}  # whose workers may do the part all the same
        self._found_done: set[int] = set()  # parts that others did, as far as is known
        self._ended: dict[int, float] = {}  # when, by the number of their offers, tasks ended whose report is not here
        self._clients = ExitStack()  # those made in place of one whose connection broke
        self._connection: Any = None
        self._polled = self._said = float("-inf")
        self.stopping = False
        self.dealer, self.totals = Dealer(parts), totals
        self.progress = Progress(sum(parts.values()), "pictures")

    def __enter__(self) -> _Run:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        """Forget what is still under way: a second run of a part that is done, and what an error leaves."""
        futures = [future for _, future in self._offers.values()]
        self._offers.clear()
        if self._client.status == "running":
            self._client.cancel(futures, force=True)
            self._client.unsubscribe_topic(self._topic)
        self._clients.close()

    def until(self, over: Callable[[], bool]) -> None:
        """Deal parts out and take reports in, until that is so."""
        while not over():
            self._look_for_workers()
            while not self.stopping and (offer := self.dealer.next_offer(time.monotonic())) is not None:
                self._send(offer)
            try:
                number, news = self._news.get(timeout=POLL_SECONDS / 2)
            except queue.Empty:
                continue
            if number not in self._offers:
                self._hear_late(number, news)
            elif isinstance(news, PartReport):
                self._take_in(self._offers.pop(number)[0], news)
            elif news.status == "finished":
                self._ended[number] = time.monotonic()
            else:
                self._has_no_report(self._offers.pop(number)[0], news)

    def hear_what_is_under_way(self) -> None:
        """Wait for the reports of workers that may have done what was found done, so that it is counted as theirs."""
        deadline = time.monotonic() + LOST_SECONDS
        self.until(
            lambda: (
                time.monotonic() > deadline
                or self._found_done.isdisjoint(offer.part for offer in self._given_up.values())
            )
        )

    def finish_what_is_held(self) -> None:
        """Wait for the parts that workers hold now."""
        self.stopping = True
        log.info(
            "stopping: the workers end the %d parts that they hold; interrupt again to leave them", len(self._offers)
        )
        self.until(lambda: not self._offers)

    def _send(self, offer: Offer) -> None:
        if offer.again:
            log.info("part %d is offered to %s as well", offer.part, offer.worker)
        future = self._client.submit(
            do_task,
            self._job,
            offer.part,
            offer.again,
            self._topic,
            offer.number,
            # Of this run alone: a worker may still be at a task of an earlier one that was cancelled, and would take
            # one of the same key for it.
            key=f"part-{offer.part:05d}-{offer.number}-{self._run}",
            workers=[offer.worker],
            allow_other_workers=False,
            pure=False,
        )
        self._offers[offer.number] = (offer, future)
        future.add_done_callback(lambda ended: self._news.put((offer.number, ended)))

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        """Called in dask's thread with what a worker said."""
        number, report = event[1]["number"], event[1]["report"]
        self._news.put((number, PartReport(**report)))

    def _workers(self) -> dict[str, int]:
        """The workers there are and their threads; by a new connection where the one there was broke."""
        deadline = time.monotonic() + RECONNECT_SECONDS
        while time.monotonic() < deadline:
            try:
                if self._client.status != "running" or self._client.scheduler_comm is not self._connection:
                    self._connect_again()
                return dict(self._client.nthreads())
            except (OSError, TimeoutError):
                time.sleep(0.05)
        raise gone(self._address)

    def _connect_again(self) -> None:
        """Dask mends a connection by itself, but trips over it at times, and sends nothing of the meantime again."""
        log.warning("%s: the connection to the scheduler broke; connecting again", self._address)
        self._client = self._clients.enter_context(client_of(self._address))
        for offer, _ in self._offers.values():  # what was sent last may never have arrived
            self._given_up[offer.number] = offer
            self.dealer.is_left(offer)
        self._offers.clear()
        self._listen()
        for event in self._client.get_events(self._topic):
            self._hear(event)

    def _listen(self) -> None:
        self._connection = self._client.scheduler_comm
        self._client.subscribe_topic(self._topic, self._hear)

    def _hear_late(self, number: int, news: PartReport | Future[Any]) -> None:
        """Of a worker that was thought to be gone, or that this process was cut off from."""
        if isinstance(news, PartReport) and news.outcome == "done" and number in self._given_up:
            self._part_is_done(self._given_up.pop(number), news, time.monotonic())

    def _take_in(self, offer: Offer, report: PartReport) -> None:
        now = time.monotonic()
        if report.outcome in ("done", "there"):
            self._part_is_done(offer, report, now)
        elif report.outcome == "held":
            self._say(f"waiting for part {offer.part}, which {report.message} is at work on")
            self.dealer.is_held(offer, now)
        elif report.outcome == "left":
            self.dealer.is_left(offer)
        else:
            self._worker_failed(offer, report.message)

    def _has_no_report(self, offer: Offer, future: Future[Any]) -> None:
        trouble = trouble_of(future)
        if trouble is None:  # its worker has died or is about to be found gone, or the connection broke
            self._given_up[offer.number] = offer
            self.dealer.is_left(offer)
        else:
            self._worker_failed(offer, trouble)

    def _part_is_done(self, offer: Offer, report: PartReport, now: float) -> None:
        new = offer.part not in self.dealer.done
        self.dealer.is_done(offer, now)
        self.totals.seconds = self.progress.seconds
        if report.outcome == "done":
            self._found_done.discard(offer.part)  # when the report came late
            self.totals.add(report)
        elif new:
            self._found_done.add(offer.part)
        self.totals.others = len(self._found_done)
        self._check()
        if new:
            shares = self.totals.shares()
            self.progress.stage_seconds = {stage: share * self.progress.seconds for stage, share in shares.items()}
            self.progress.step(self._pictures[offer.part])

    def _worker_failed(self, offer: Offer, message: str) -> None:
        if not self.stopping:
            log.warning("%s gets no more parts: %s", offer.worker, message)
        self.dealer.has_failed(offer, f"worker {offer.worker}: {message}")

    def _look_for_workers(self) -> None:
        now = time.monotonic()
        if now - self._polled < POLL_SECONDS:
            return
        self._polled = now
        before = self.dealer.workers
        for offer in self.dealer.workers_are(self._workers()):
            log.warning("%s is gone; part %d goes to another worker", offer.worker, offer.part)
            self._forget(offer)
        self._give_up_lost_reports(now)
        self.totals.most_workers = max(self.totals.most_workers, self.dealer.workers)
        if self.dealer.workers != before:
            link = dashboard(self._client)
            log.info("%d workers%s", self.dealer.workers, f"; dashboard: {link}" if link else "")
        if not self.dealer.workers:
            self._say(f"{self._address}: no worker is there; parts go out as soon as one is")

    def _give_up_lost_reports(self, now: float) -> None:
        """Have parts offered again whose reports did not come: what was done of them is found."""
        for number in [number for number, since in self._ended.items() if now - since >= LOST_SECONDS]:
            del self._ended[number]
            if (found := self._offers.pop(number, None)) is not None:
                log.warning("%s ended part %d without a report", found[0].worker, found[0].part)
                self.dealer.is_left(found[0])

    def _forget(self, offer: Offer) -> None:
        if (found := self._offers.pop(offer.number, None)) is not None:
            self._given_up[offer.number] = offer
            self._client.cancel([found[1]], force=True)

    def _say(self, words: str) -> None:
        now = time.monotonic()
        if now - self._said >= SAY_SECONDS:
            self._said = now
            log.info("%s", words)
