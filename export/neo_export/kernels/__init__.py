"""A decode step as kernels of its own, for CUDA.

graph        what a decode graph computes, or why it has no kernels
programs     the kernels, in Triton's language
plan         launches, as data
places       where their arguments lie
launches     which programs compute a graph
compiler     programs become machine code
build        a file of kernels for a bundle
cli          `neo-kernels`
"""
