"""A worker of several processes: ranks that divide a model's layers (pipeline) and the heads of each layer (tensor).

    rank = stage * tensor_parallel + shard               TP 2, PP 2:   rank 0, rank 1 -> rank 2, rank 3
                                                                        layers 0..14     layers 15..29

    rank 0   the worker: scheduler, blocks, RPC, tickets, sampling; and the first share of the model
    others   children of it (`rank_process`): their share, the blocks that they are told

Each step is described once, by rank 0, to all (`messages`); between ranks go partial sums within a stage (`sums`), hidden rows
from stage to stage, and logits to rank 0. All of that travels over sockets that the ranks were born with (`links`): they have no
address, nobody else can connect, and the end of a process is seen at once. Where each rank has a GPU, sums and rows go from GPU
to GPU instead (`collective`). `group` starts the ranks and watches over them.

    share      who has what of a model
    model      the model of one share, by torch or by the native kernels
    stage      a share computes its part of a step
    swaps      swap space of all ranks as one
    connections  by what a share is connected to others: sockets, or torch.distributed (`collective`)
    group      rank 0's view: one `compute` for all

KV. Each rank has a pool of its own, whose blocks hold its window (its layers, its heads) of the worker's blocks, under the same
numbers on all ranks. Rank 0 alone knows who has which block; what it does with one (copies, swaps) it has all ranks do. What a
rank of a prefill worker has written it sends by itself to the ranks of the decode worker that read it, by what it runs beside its
share; rank 0 says when, and nothing is gathered or reordered on the way.

Exactness. Partial sums are added in the order of the ranks, in fp32: a result depends on the degree, and on nothing else that the
result of one process would not depend on. Stages change no bit.

What it does not do: ranks on several hosts, captured steps on GPUs, and more shards than KV heads.
"""
