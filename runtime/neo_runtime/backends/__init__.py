"""Engines that run a bundle's graphs, and the caches in their memory.

Its parts; each imports only itself and those above it:

step_logits   the result of a step, which may still be on the device
base          what the runtime needs of each engine
right_padded  prompts of several rows, cut into calls
failures      what it means when onnxruntime fails
cpu           onnxruntime on a CPU
device        a GPU's memory, whatever the engine
cuda          onnxruntime's CUDA provider
tensorrt      TensorRT plans
choice        which of them runs a bundle
"""
