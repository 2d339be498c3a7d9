# relssl with PyTorch, for CPUs or NVIDIA GPUs. This file has not been built yet: no container runtime was at hand.
#
#   docker build -t relssl .                                                                 # PyTorch with CUDA, several gigabytes
#   docker build -t relssl --build-arg TORCH=https://download.pytorch.org/whl/cpu .          # PyTorch for CPUs, far smaller
#   docker run --rm --shm-size 2g -v "$PWD/photos:/data/photos:ro" -v "$PWD/runs:/work/runs" relssl pretrain /data/photos
#
# `--gpus all` gives it the GPUs, `--user "$(id -u):$(id -g)"` lets it write a folder that is yours alone, and --shm-size is what loader
# workers hand images over in.
FROM python:3.11-slim

ARG TORCH=https://pypi.org/simple
RUN pip install --no-cache-dir --index-url "$TORCH" torch torchvision

COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir "/source[onnx,parquet]"

# Anybody may write here, whatever user the container runs as.
RUN useradd --uid 1000 relssl && mkdir -p /work/runs /work/cache /data && chmod 777 /work /work/runs /work/cache /data
ENV RELSSL_DATA=/data RELSSL_CACHE=/work/cache HOME=/work
WORKDIR /work
USER relssl
VOLUME ["/data", "/work/runs"]
ENTRYPOINT ["relssl"]
CMD ["--help"]
