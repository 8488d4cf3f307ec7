# batchbench in a container. Results are written to /results, a folder of the host:
#
#     docker build -t batchbench .
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/results" batchbench run
#
# With CUDA (the host needs NVIDIA's driver and container toolkit):
#
#     docker build -t batchbench:cuda --build-arg DEVICE=cuda .
#     docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/results" batchbench:cuda run
#
# Mount a folder at /cache to keep downloaded models and compiled kernels.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cpu
# The version comes from git.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN case "$DEVICE" in \
      cpu) set -- --extra-index-url https://download.pytorch.org/whl/cpu . ;; \
      cuda) set -- ".[gpu]" ;; \
      *) echo "DEVICE=$DEVICE: must be cpu or cuda" >&2; exit 2 ;; \
    esac \
    && python -m venv /opt/batchbench \
    && /opt/batchbench/bin/python -m pip install --no-cache-dir -c constraints.txt "$@"

FROM python:${PYTHON}-slim
# g++ compiles the CPU kernels, and Triton needs a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/batchbench /opt/batchbench
# Any user may write to these, so that --user works. PyTorch asks for the name of the user, which
# USER gives to one that is not in /etc/passwd.
RUN useradd --uid 1000 batchbench \
    && mkdir --mode 1777 /results /cache
ENV PATH=/opt/batchbench/bin:$PATH \
    HOME=/cache \
    USER=batchbench \
    BATCHBENCH_CACHE=/cache/batchbench \
    HF_HOME=/cache/huggingface
USER 1000:1000
WORKDIR /results
ENTRYPOINT ["batchbench"]
CMD ["--help"]
