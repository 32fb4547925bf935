"""Kernels in Triton, one per file, each beside a reference in torch that takes the same arguments.

    operations -> turn_and_store, add_norm, gated, sampler ... -> launches on the tensors' device

Nothing here is imported unless an engine is to compute with it (`choice`): an engine on a CPU loads no Triton. With
TRITON_INTERPRET=1 in the environment, before Triton is imported, the kernels run on the CPU, slowly and one program after the
other; that is how they are tested where there is no GPU. The interpreter is right in fp32 and fp16; its arithmetic in bf16 is
not, so kernels widen what they load to fp32 before they compute, and tests multiply matrices in fp32 and fp16.
"""

import os

# What Triton does without being told changes between its versions, and it warns of that.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
