# CPU:  docker build -t milan-pipe .
# CUDA: docker build -t milan-pipe:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#         --build-arg TORCH_INDEX=https://pypi.org/simple .
ARG BASE=python:3.12-slim
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=cluster,hub,report,segment

# torch.compile needs a C compiler; bases that are not Python's own have no Python.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && if ! command -v python3; then apt-get install -y --no-install-recommends python3-dev python3-venv; fi \
 && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/milan && useradd --create-home --uid 10001 milan && install -d -o milan /data
ENV PATH=/opt/milan/bin:$PATH HF_HOME=/data/.cache/huggingface

# A layer of its own, as it is large and changes seldom. The version is that of pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision --index-url "${TORCH_INDEX}"

COPY pyproject.toml README.md LICENSE /src/
COPY milan_pipe /src/milan_pipe
RUN pip install --no-cache-dir "/src[${EXTRAS}]"

USER 10001
WORKDIR /data
ENTRYPOINT ["milan-pipe"]
CMD ["--help"]
