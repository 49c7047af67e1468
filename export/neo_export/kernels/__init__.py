"""CUDA kernels that replace the decode graph, written in Triton: `neo-kernels`.

graph        reads what a decode graph computes, or refuses it
programs     the kernels in Triton
plan         a decode step as a list of launches
places       addresses of launch arguments
launches     maps a decode graph to launches
compiler     compiles Triton programs to machine code
build        writes the kernel file of a bundle
cli          `neo-kernels`
"""
