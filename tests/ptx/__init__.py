# SPDX-License-Identifier: Apache-2.0
"""A machine that executes the PTX of the Mosaic GPU kernels in NumPy, and raises where it is used against its rules.

A kernel is compiled by the real compiler for an H200 that is not there (`launch`); its PTX (`text`) is then executed
block by block (`block`), warp by warp (`warp`), 32 lanes at a time. Rules are those of NVIDIA's "Parallel Thread
Execution ISA" 9.0, which docstrings name by the titles of its sections; where one states an assumption, it says so.

What is modelled: arithmetic of registers to the bit (`arithmetic`); shared memory, and who has seen which write to it
(`shared`); mbarriers (`barriers`) and named barriers; tensor copies with their boxes, swizzles and zeros beyond the end
(`tensors`); wgmma's fragments, descriptors and asynchrony (`wgmma`); an order of warps drawn at random.

What raises `Fault`: two accesses of shared memory, one of them a write, that no barrier orders; a product or a copy out
of shared memory that reads what was written without a proxy fence; a register used while a product may still read or
write it, or handed to one without `wgmma.fence`; misaligned and stray addresses; a deadlock; a block that ends with a
copy or a product under way or a barrier half arrived at. An instruction that is not known is a `NotImplementedError`.

What is not modelled: SASS, which ptxas makes of the PTX; accesses of global memory that blocks, or warps, do not order;
clusters; time; how far off `ex2.approx`, `rsqrt.approx` and `div.full` are (exact here) and in which order wgmma adds
(float64 here, rounded once); lanes of a warp that diverge (a branch that would is a `Fault`), and races between them.
"""
