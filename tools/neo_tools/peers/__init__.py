"""Peers, other engines to compare with: PyTorch eager, Optimum on ONNX Runtime, and OpenVINO.

Their dependencies conflict with each other and with ours. So each peer has a virtual environment of
its own (`environments`) and a worker that its interpreter runs (`worker_torch`, `worker_optimum`,
`worker_openvino`); `client.Peer`, a `neo_tools.worker`, talks to it through pipes.

This `__init__` imports nothing: a worker must start where this project is not installed.
"""
