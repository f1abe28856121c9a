# shoal in a container, with the CPU build of torch by default.
#
#   docker build -t shoal .
#   docker run -p 8000:8000 -e SHOAL_API_KEY=choose-one -v shoal-models:/models shoal
#
# For NVIDIA GPUs (docker run --gpus all): docker build --build-arg TORCH_INDEX= -t shoal:cuda .
# The server listens on all of the container's interfaces, so it will not start without a key.

FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
# For the CPU kernels; without a compiler the image builds too, and runs several times slower.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/shoal
COPY constraints.txt pyproject.toml setup.py README.md LICENSE NOTICE ./
COPY src ./src
RUN PIP_EXTRA_INDEX_URL="$TORCH_INDEX" \
    /opt/shoal/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.12-slim
RUN useradd --create-home --uid 1000 shoal \
    && install --directory --owner=shoal /models
COPY --from=build /opt/shoal /opt/shoal
ENV PATH=/opt/shoal/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/models \
    HF_HOME=/models/huggingface
USER 1000
WORKDIR /home/shoal
VOLUME /models
EXPOSE 8000
# The first start downloads the model: /health answers as soon as the process listens.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["shoal", "serve"]
CMD ["smollm2-135m", "--host", "0.0.0.0", "--port", "8000"]
