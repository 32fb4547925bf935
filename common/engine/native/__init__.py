"""A decoder step in one call: C++ that is compiled on the machine it runs on, for CPUs.

    kernels: auto | native | torch      decided by `choice.choose_model`
    build     C++ source -> shared library in the cache, once per machine and source; in the background, or before the
              start where it must be settled who computes: weights in blocks of a file, exact mode, ranks
    library   the C interface: structures and calls
    panels    weights in the layout that the kernels read, in one piece of memory
    model     a `Model` over the two

Torch serves until the library is there, if it is made in the background; the switch happens between two steps. KV is written as
torch writes it, within rounding, so workers with and without native kernels exchange blocks.
"""
