"""The peers: PyTorch eager, Optimum on ONNX Runtime, OpenVINO, each in its own environment.

Their dependencies exclude each other and ours, so each peer is a virtual environment of its own
(`environments`), a worker script that its interpreter runs (`worker_torch`, `worker_optimum`,
`worker_openvino`) and a client that talks to it over pipes (`client.Peer`, a `neo_tools.worker`).
Nothing here is imported by this package itself: a worker must start where this project is not
installed.
"""
