"""TensorRT plans of a bundle: `neo-engine`.

flavour    which of NVIDIA's two modules is installed, and whether it can be used
device     the GPU that the plan is for
ranges     lengths, batch and limits, checked against the bundle
network    the prefill graph through NVIDIA's parser
progress   TensorRT's progress monitor as lines of the command
build      one plan with a prefill and a decode profile, and its record
"""
