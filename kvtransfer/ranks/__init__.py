"""KV from rank to rank: workers of several processes hand over without any byte of one rank passing through another.

    prefill worker                                                  decode worker
    rank 0   RankSenders ---- tickets, seals (gRPC, rank 0 only) ---- RankReceivers   rank 0
      |  \\ orders                                                  orders /  |
      |   rank 1   RankEnd: a KVSender ====== link, KV ======> a KVReceiver: RankEnd  rank 1
      RankEnd ============================== links, KV =============================> RankEnd

Who gives what to whom follows from the degrees of both sides alone (`parts`, after `kvtransfer.reshard`). For each two ranks that
share anything there is a ticket of its own, for a part of every block, under the names of these two ranks; and with it a transfer
as between two workers of one process: a link that both authenticate, a nonce that is good once, credit, lease, digests and
quarantine. To the worker they are one: it is complete when all are, one that fails ends all, and blocks come back when the last
writer is gone.

    parts            which part of a block travels between which two ranks: pure
    rank_end         what a rank does: the ordinary sender or receiver, for one rank
    orders           rank 0's orders to another rank and its answers, as JSON over a pair of sockets
    beside           what another rank runs beside its share of the model: carries the orders out
    rank_senders     rank 0 of a prefill worker: all ranks as one sender
    rank_receivers   rank 0 of a decode worker: all ranks as one receiver

Each rank has a pool of its own, with a window of every block: its layers, its heads. To a transfer a rank's block is a row of
units, one for each head of each layer, so that whatever two ranks share of a block is a few ranges of it, contiguous on both
sides.
"""
