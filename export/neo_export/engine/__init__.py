"""TensorRT plans of a bundle: `neo-engine`.

flavour       which of NVIDIA's two TensorRT modules is installed and usable
device        the GPU that a plan is built for
ranges        sequence lengths, batch sizes and limits, checked against the bundle
network       the prefill graph in NVIDIA's parser, and its optimization profiles
progress      TensorRT's progress monitor
timing_cache  kernel timings kept between builds
build         one plan with a decode and a prefill profile, and its record
cli           `neo-engine`
"""
