# For GPU clusters. Python packages are those of constraints.txt, as everywhere else; the base image brings the CUDA
# compiler, which DeepSpeed needs to build its kernels. Choose another with --build-arg CUDA_IMAGE=...
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${CUDA_IMAGE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ git libibverbs-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/coe
ENV PATH=/opt/coe/bin:${PATH} PYTHONUNBUFFERED=1

WORKDIR /opt/coe-megatron
# Packages first, so that a change of the code does not install them anew.
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY coe_megatron/__init__.py coe_megatron/__init__.py
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[dev]'
COPY . .
CMD ["python", "launch/pretrain_coe.py", "--help"]
