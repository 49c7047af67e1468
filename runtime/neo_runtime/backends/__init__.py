"""The engines that run a bundle's graphs, and their KV caches.

Its parts; each imports only itself and those above it:

step_logits   the logits of one step, which may still be on the device
base          the interfaces that each engine implements
right_padded  splits prompts of several rows into prefill calls
failures      translates onnxruntime's errors
cpu           onnxruntime on the CPU
device        GPU memory, independent of the engine
cuda          onnxruntime's CUDA provider
tensorrt      TensorRT plans
choice        chooses the backend that runs a bundle
"""
