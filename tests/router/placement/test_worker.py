"""A worker's load as the router sees it, against an exact account of who knows what."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from common.load import WorkerLoad, WorkerReport, WorkerShape
from common.types import Role, WorkerRef
from router.placement.worker import Charge, Worker

SHAPE = WorkerShape(block_tokens=16, layout_fingerprint=b"f", blocks_total=1000, step_tokens=256)


def worker() -> Worker:
    return Worker(WorkerRef("w", 1, "w:1"), Role.PREFILL, "m", 0)


@dataclass
class TrueWorker:
    """What the worker has, and which dispatches it has ever counted in a report on this stream."""

    waiting: dict[int, int] = field(default_factory=dict)  # dispatch -> tokens
    foreign: int = 0  # tokens that another router sent
    untold: list[int] = field(default_factory=list)
    sequence: int = 0

    def report(self, *, whole: bool) -> WorkerReport:
        if whole:
            self.sequence, self.untold = 0, list({*self.waiting, *self.untold})
        self.sequence += 1
        told, self.untold = tuple(self.untold), []
        tokens = sum(self.waiting.values()) + self.foreign
        return WorkerReport(
            sequence=self.sequence,
            load=WorkerLoad(waiting=len(self.waiting), queued_tokens=tokens),
            shape=SHAPE if whole else None,
            dispatches=told,
        )


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_dispatch_counts_once(data: st.DataObject) -> None:
    """Dispatches travel, arrive, are computed and closed; reports travel, are repeated, come late or break off."""
    seen, true = worker(), TrueWorker()
    travelling: dict[int, int] = {}
    open_ids: dict[int, int] = {}
    reports: list[tuple[WorkerReport, int]] = []  # on their way, of which stream
    told: set[int] = set()  # dispatches that the last report taken over counted, now or before
    reported_tokens, stream, taken_over = 0, 0, 0
    number = 0
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(
            st.sampled_from(["dispatch", "arrive", "compute", "close", "send", "receive", "repeat", "break", "other"])
        )
        match action:
            case "dispatch":
                number += 1
                tokens = data.draw(st.integers(1, 500))
                seen.open(number, Charge.for_prefill(tokens, tokens), 0.0)
                open_ids[number] = travelling[number] = tokens
            case "arrive" if travelling:
                arrived = data.draw(st.sampled_from(sorted(travelling)))
                true.waiting[arrived] = travelling.pop(arrived)
                true.untold.append(arrived)
            case "compute" if true.waiting:
                del true.waiting[data.draw(st.sampled_from(sorted(true.waiting)))]
            case "close" if open_ids:
                closed = data.draw(st.sampled_from(sorted(open_ids)))
                seen.close(closed, 0.0)
                seen.close(closed, 0.0)
                del open_ids[closed]
            case "send":
                reports.append((true.report(whole=true.sequence == 0), stream))
            case "other":
                true.foreign = data.draw(st.integers(0, 500))
            case "receive" | "repeat" if reports:
                report, of_stream = reports[0]
                if action == "receive":
                    reports.pop(0)
                if of_stream != stream:
                    continue  # that stream is closed; nothing of it is delivered
                if seen.report(report, 0.0):
                    assert report.sequence == taken_over + 1
                    told = {*report.dispatches} if report.shape is not None else told | {*report.dispatches}
                    taken_over, reported_tokens = report.sequence, report.load.queued_tokens
                elif action == "receive":
                    assert report.sequence <= taken_over
                if report.sequence == 1 and action == "repeat":
                    reports.pop(0)  # a whole picture is never sent twice
            case "break":
                seen.break_off()
                stream, true.sequence = stream + 1, 0
                told, taken_over, reported_tokens = set(), 0, 0
        unseen = {one: tokens for one, tokens in open_ids.items() if one not in told}
        assert seen.queued_tokens == reported_tokens + sum(unseen.values())
        assert seen.unseen_requests == len(unseen)
        assert seen.num_open == len(open_ids)
        assert seen.unseen_pairs >= -1e-6


def test_it_is_free_when_what_is_queued_is_computed() -> None:
    one = worker()
    quick, slow = one.prompt_s(100, 100), one.prompt_s(400, 400)
    one.open(1, Charge.for_prefill(100, 100), 10.0)
    one.open(2, Charge.for_prefill(400, 400), 10.0)
    assert abs(one.free_at_s - (10.0 + quick + slow)) < 1e-9
    one.report(WorkerReport(1, WorkerLoad(queued_tokens=50), SHAPE, dispatches=(1,)), 11.0)
    assert 11.0 + slow < one.free_at_s < 11.0 + slow + quick, "what the report counts is half done, the other is to come"
    one.close(1, 12.0)
    one.close(2, 12.0)
    one.report(WorkerReport(2, WorkerLoad()), 13.0)
    assert one.free_at_s == 13.0


def test_without_reports_a_worker_is_free_when_nothing_of_ours_is_left() -> None:
    one = worker()
    one.open(1, Charge.for_prefill(5000, 5000), 0.0)
    assert one.free_at_s > 0.1
    one.prefilled(1, 0.1)
    assert one.free_at_s == 0.1
    assert (one.unseen_requests, one.unseen_tokens) == (1, 0)
    one.close(1, 0.2)
    assert (one.unseen_requests, one.num_open) == (0, 0)


def test_a_second_whole_picture_counts_anew() -> None:
    """What it does not name arrived nowhere, as far as it knows: it is counted here."""
    one = worker()
    one.open(1, Charge.for_prefill(100, 100), 0.0)
    one.open(2, Charge.for_prefill(30, 30), 0.0)
    one.report(WorkerReport(1, WorkerLoad(queued_tokens=130), SHAPE, dispatches=(1, 2)), 0.0)
    assert one.queued_tokens == 130
    one.report(WorkerReport(1, WorkerLoad(queued_tokens=30), SHAPE, dispatches=(2,)), 0.0)
    assert one.queued_tokens == 130
