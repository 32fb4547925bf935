"""Real workers on one asyncio loop: one decode worker, some prefill workers, gRPC and KV links between, without Ray or router."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from common.codec import chunk_from_wire, request_to_wire, started_from_wire, worker_ref_to_wire
from common.config import DecodeConfig, EngineConfig, ModelConfig, PrefillConfig, TracingConfig, TransferConfig
from common.rpc import connect, error_from_rpc
from common.types import FinishReason, Request, Role, SamplingParams, Started, TokenLogprob, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from common.worker import WorkerSpec
from decode_worker.server import DecodeWorker
from prefill_worker.server import PrefillWorker

TOKEN = "test-cluster-token"
PATIENCE_S = 120.0  # far beyond what anything here takes


def transfer_over(*transports: str, **limits: float) -> TransferConfig:
    """May be `inproc` as well, which no configuration offers: both workers are in this process."""
    return TransferConfig(**limits).model_copy(update={"transports": transports})  # type: ignore[arg-type]


def patient(*transports: str) -> TransferConfig:
    """Of workers none of which is ever hung: however busy the machine is, nobody is given up for being silent."""
    return transfer_over(*transports, lease_s=PATIENCE_S, handshake_timeout_s=PATIENCE_S)


@dataclass
class Answer:
    """What one Generate stream said."""

    started: Started | None = None
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    finish: dict[int, FinishReason] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        return self.token_ids[0]


@dataclass
class Workers:
    decode: DecodeWorker
    prefill: list[PrefillWorker]
    decode_ref: WorkerRef
    prefill_refs: list[WorkerRef]
    channel: grpc.aio.Channel

    def open(self, request: Request, *, prefill: Sequence[WorkerRef] | None = None) -> grpc.aio.UnaryStreamCall:
        refs = self.prefill_refs if prefill is None else prefill
        message = worker_pb2.GenerateRequest(request=request_to_wire(request), prefill=[worker_ref_to_wire(ref) for ref in refs])
        return worker_pb2_grpc.DecodeStub(self.channel).Generate(message, timeout=PATIENCE_S)

    async def generate(self, request: Request, *, prefill: Sequence[WorkerRef] | None = None) -> Answer:
        answer = Answer()
        try:
            async for event in self.open(request, prefill=prefill):
                if event.HasField("started"):
                    assert answer.started is None, "Started came twice"
                    answer.started = started_from_wire(event.started)
                for chunk in map(chunk_from_wire, event.chunks):
                    assert chunk.choice not in answer.finish, "a token after the finish"
                    answer.token_ids.setdefault(chunk.choice, []).extend(chunk.token_ids)
                    answer.logprobs.setdefault(chunk.choice, []).extend(chunk.logprobs)
                    if chunk.finish_reason is not None:
                        answer.finish[chunk.choice] = chunk.finish_reason
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return answer

    async def generate_together(self, work: Sequence[Request]) -> list[Answer]:
        """All at once, truly: the engine is held until it knows of every one, so that nothing is left to chance. They come in
        their order: who is preempted depends on it, and whether anybody is."""
        gate = threading.Event()
        before = set(self.decode._streams._streams)
        self.decode._loop.post(lambda: (gate.wait(PATIENCE_S), None)[1])
        running: list[asyncio.Future[Answer]] = []
        try:
            async with asyncio.timeout(PATIENCE_S):
                for item in work:
                    running.append(asyncio.ensure_future(self.generate(item)))
                    # Each is posted to the engine as it is entered there; other posts do not count.
                    while len(self.decode._streams._streams.keys() - before) < len(running):
                        await asyncio.sleep(0.001)
        finally:
            gate.set()
        return list(await asyncio.gather(*running))

    async def info(self, address: str) -> worker_pb2.InfoReply:
        channel = connect(address, TOKEN)
        try:
            return await worker_pb2_grpc.WorkerStub(channel).Info(worker_pb2.InfoRequest(), timeout=PATIENCE_S)
        finally:
            await channel.close(None)

    async def assert_nothing_leaks(self) -> None:
        """Before long every block of every pool is free or cached, and no lease is open."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            infos = [await self.info(ref.address) for ref in (self.decode_ref, *self.prefill_refs)]
            left = [
                (info.worker_id, info.blocks_total - info.blocks_free, info.blocks_in_transfer, info.leases_open)
                for info in infos
                if info.blocks_free != info.blocks_total or info.blocks_in_transfer or info.leases_open or info.requests_running
            ]
            if not left:
                return
            assert asyncio.get_running_loop().time() < deadline, f"leaked (worker, used blocks, in transfer, leases): {left}"
            await asyncio.sleep(0.02)


def request(
    prompt: Sequence[int],
    *,
    request_id: str = "r",
    max_tokens: int = 8,
    temperature: float = 0.0,
    seed: int = 1,
    num_choices: int = 1,
    model: str = "tiny",
    timeout_s: float = PATIENCE_S,
    **sampling: object,
) -> Request:
    return Request(
        request_id=request_id,
        model=model,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, temperature=temperature, **sampling),  # type: ignore[arg-type]
        num_choices=num_choices,
        timeout_s=timeout_s,
    )


@asynccontextmanager
async def running_workers(
    model_path: Path,
    *,
    engine: EngineConfig,
    name: str = "tiny",
    num_prefill: int = 1,
    prefill: PrefillConfig | None = None,
    decode: DecodeConfig | None = None,
    transports: tuple[str, ...] = ("shm", "tcp"),
    transfer: TransferConfig | None = None,
    prefill_engine: EngineConfig | None = None,
    tracing: TracingConfig | None = None,
) -> AsyncIterator[Workers]:
    model = ModelConfig(
        name=name,
        source=str(model_path),
        engine=engine,
        prefill=prefill or PrefillConfig(),
        decode=decode or DecodeConfig(local_prefill="never"),
    )
    config = transfer or patient(*transports)

    def spec(role: Role, index: int) -> WorkerSpec:
        used = model.model_copy(update={"engine": prefill_engine}) if prefill_engine and role is Role.PREFILL else model
        return WorkerSpec(
            worker_id=f"{name}/{role.value}/{index}",
            incarnation=1,
            role=role,
            model=used,
            model_path=str(model_path),
            transfer=config,
            cluster_token=TOKEN,
            tracing=tracing or TracingConfig(),
        )

    decoder = DecodeWorker(spec(Role.DECODE, 0))
    prefillers = [PrefillWorker(spec(Role.PREFILL, index)) for index in range(num_prefill)]
    decode_ref = await decoder.start()
    prefill_refs = [await worker.start() for worker in prefillers]
    channel = connect(decode_ref.address, TOKEN)
    try:
        yield Workers(decoder, prefillers, decode_ref, prefill_refs, channel)
    finally:
        await channel.close(None)
        for worker in prefillers:
            await worker.stop(0.0)
        await decoder.stop(0.0)
