"""KV hand-off: the permission to write blocks, the writing, and the proof that what arrived is what was sent.

    decode worker d: owns the pool                          prefill worker p: computes the prompt
    ------------------------------------------------        -----------------------------------------------------
    KVReceiver(...), start(kinds, host) -> offers            KVSender(...)
    Prefill.Handshake(layout, offers) ------- gRPC -------->  sender.connect(offers, layout) -> kind; unlike: refused
       (the data link, authenticated both ways)  <---------   connects to one offer
    open(...) -> Incoming; blocks now have two owners
    Prefill.Run(request, incoming.ticket) --- gRPC -------->  sender.open(ticket) -> Outgoing
       lets the nonce in, once           <---- OPEN --------    first thing on the link; nothing is written before GRANT
       GRANT with the first credit       ----------------->
       verifies each piece as it comes   <---- pieces ------    push([(logical, source block)], layers) as layers are computed
       CREDIT: verified, go on           ----------------->     writes no more than it has credit for
       PULSE: still wanted               <---------------->     PULSE: still at it; who is silent for a lease is given up
       the writer is gone                <---- CLOSE -------    finish() -> TransferAccount
    complete(seal) -> KV is verified     <---- gRPC --------  Run's reply, the seal
    -- or, when anything at all goes wrong --
    abandon(release) -> blocks to free   ----- gRPC ------->  sender.release(nonces): nothing more is written, ever

Who calls what, how often. d calls `open` once per attempt; every Incoming ends in exactly one of `complete` (returned: the
blocks are verified and belong to the request alone) or `abandon` (returned: no writer can touch the blocks, they may be freed).
`wait_failed` tells d early, so that it can cancel Run. p calls `open` once per ticket and ends it by `finish` or `abort`;
`release` may come before, during, after or without `open`. All but `open` may be repeated. A push that cannot be honoured raises
at the next call on the same Outgoing. After a link was lost the sender connects again by itself, to the same incarnation only.

A piece is some layers of one block: contiguous in memory, so that what is computed first leaves first. Every layer of every block
of the ticket travels in exactly one piece; the seal has one digest for each block, over those of its pieces.

Whoever waits, waits for something that ends. For credit: the receiver returns it for what it has verified, so a receiver that
does not keep up stops its writers, one transfer at a time, and no other transfer or link. For life: each side gives up a transfer
of which the other one has said nothing for `lease.LEASE_S`. For the whole: the ticket's time. Explicit release is only quicker.

A block is not free while a writer may touch it. What ends a writer, by transport: its CLOSE, or the end of its link; where the
bytes pass through our own hands (tcp, shm, nixl), also our own decision, at once. Memory of ours that another process can write
to (cuda_ipc) stays in quarantine until that process goes on or dies; no timeout can change that.

The design space: d pulls or p pushes; one-sided or two-sided; control inside or beside the data. Chosen: p decides when what
leaves, as it is computed, so that transfer overlaps computation; who moves the bytes is the link's affair (over shm d does, from
where p says they lie). Permission is granted by the owner of the memory per nonce; logical block numbers travel, and where
something is to be written never does (the ticket holds it, under a MAC); control beside the data, on the workers' gRPC. Bytes are
checked in full, always, on the side that will compute with them. What travels is in d's layout, so d need not know p's: where
block size or dtype differ, p cuts its blocks anew (`recutting`, by `gather`, as `reshard` plans). Where workers have several
ranks, each rank is such an end by itself, for its part of each block (`ranks`). Two links for slow networks carry codes of a
byte a value (`wire_dtype`).

This package knows memory as regions of equal blocks and a `KVLayout`; it knows no engine, no tensor library, no gRPC.
"""

PROTOCOL_VERSION = 4
"""Of tickets, frames and seals together. Workers of different versions do not exchange KV."""
