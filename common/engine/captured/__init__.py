"""Decode steps of fixed shape, so that a GPU can be given a whole step at once.

    batch of single tokens -> bucket -> packed inputs, one copy -> programs: model, logits, draws -> one copy back, one event

    buckets       which shapes there are, and which one a batch takes
    packing       a step's inputs as one block of int32, and the views of it
    drawing       what is to be drawn behind a step's logits, and what the step cannot draw
    memory_plan   how a device's memory is shared out
    programs      the same operations run one by one, or captured as a CUDA graph and replayed
    steps         what the runner asks

What has no bucket (prompts, drafts, more sequences than the largest) is computed as before. Buckets, packing, the memory plan and
programs that are run one by one are the same on a CPU, where tests hold them to the tokens of the plain runner. Graphs need CUDA.
"""
