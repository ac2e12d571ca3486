"""How long a kernel should take on a GPU that isn't here: a model, small enough to be read, of one processor running compiled code.

What it starts from is the machine code that the GPU would run (`aot` makes it), not the source:

    code       listings of SASS and of AMD's assembly into instructions: which pipe, what is read and written, bytes, operations
    devices    what a GPU has of each, and where the number is from
    warp       a quarter of a processor, cycle by cycle: its resident warps issue in order, wait for registers, for copies in
               flight and for each other's use of the pipes and of the memory
    predict    how many programs fit, how long each takes at that crowding, and how the grid is spread over the processors
    attention  the calls of the attention family, and how much work is in each launch: a table
    linear     the same for products with quantised matrices
    moe        the same for mixtures of experts
    step       a whole step against the sum of its kernels
    report     results/gpu/predicted-FAMILY.json, and docs/performance-gpu.md out of all of those

    python -m minfer.kernels.triton.cost --family attention

Everything it says is a **prediction**. It is there to find waste that can be seen without a GPU (a loop whose instructions take longer
than its bytes, copies that nothing overlaps, a grid that leaves processors idle) and to say what a run must check first.

Left out: conflicts between banks of shared memory, the L1 cache, refresh and turn-around of the memory, clocks that drop under load,
instruction fetch, and all that a barrier costs because warps of a program drift apart.
"""
