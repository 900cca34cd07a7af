# The server and the thin client as images, on processors and on NVIDIA's GPUs. docs/container.md says how to run them.
#
#   docker build -t optwire .                                 the server
#   docker build -t optwire-client --target client .          what a client program imports, and nothing else
#   docker build -t optwire-cuda12 --build-arg VARIANT=cuda12 .   CUDA comes from JAX's wheels, the base stays the same
#
# Builds with the classic builder as well as with BuildKit. Each image is the base, one large layer of what we need and one
# small layer of ours, so that a new version of ours moves two megabytes. Files carry no time of their own and bytecode is
# not checked against one: from the same versions, a build elsewhere makes the same large layer.
ARG BASE_IMAGE=python:3.13-slim

# -- the installer, which stays out of what runs
FROM ${BASE_IMAGE} AS installer
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
COPY deploy/install /usr/local/bin/install-into

# -- what is needed: written once, in pyproject.toml. As long as the lists stay the same, so do the large layers.
FROM installer AS needs
ARG VARIANT=cpu
COPY pyproject.toml /src/
RUN python3 -c 'import sys, tomllib; \
variant = sys.argv[1]; \
variant in ("cpu", "cuda12", "cuda13") or sys.exit(f"VARIANT: {variant!r}, expected cpu, cuda12 or cuda13"); \
project = tomllib.load(open("/src/pyproject.toml", "rb"))["project"]; \
client, server = project["dependencies"], project["optional-dependencies"]["server"]; \
server = [need.replace("jax>", f"jax[{variant}]>") if need.startswith("jax>") and variant != "cpu" else need for need in server]; \
print(*client, sep="\n", file=open("/client.txt", "w")); \
print(*client, *server, sep="\n", file=open("/server.txt", "w"))' "${VARIANT}"

# -- ours
FROM installer AS ours
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY client/python client/python
COPY server server
RUN /opt/pip/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel . && install-into /layer --no-deps /wheel/*.whl

# -- the thin client
FROM installer AS client-needs
COPY --from=needs /client.txt /
RUN mkdir -p /layer/opt && cp -a /opt/venv /layer/opt && install-into /layer -r /client.txt

FROM ${BASE_IMAGE} AS client
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
COPY --from=client-needs /layer /
COPY --from=ours /layer /
USER 10001:10001
# As process 1, Python hears SIGINT; it does not hear SIGTERM unless the program says so.
STOPSIGNAL SIGINT
CMD ["python3"]
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="optwire-client" \
    org.opencontainers.image.description="The thin client of optwire, a remote optimizer: grpcio, protobuf, numpy." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# -- the server
FROM installer AS server-needs
COPY --from=needs /server.txt /
RUN mkdir -p /layer/opt && cp -a /opt/venv /layer/opt && install-into /layer -r /server.txt

FROM ${BASE_IMAGE} AS server
# Nothing is written outside /tmp, so any user id and a read-only root file system will do.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
COPY --from=server-needs /layer /
COPY --from=ours /layer /
USER 10001:10001
EXPOSE 50051
STOPSIGNAL SIGTERM
# gRPC health, the same answer that a Kubernetes `grpc` probe gets.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["optwire", "health", "--target", "localhost:50051"]
ENTRYPOINT ["optwire"]
# --insecure: the server refuses an address beyond loopback without TLS unless told that something else keeps people
# out. In here that is the container's own network: publish the port to loopback (-p 127.0.0.1:50051:50051), keep it on a
# private network, or put TLS in front.
CMD ["serve", "--listen", "0.0.0.0:50051", "--insecure"]
ARG VARIANT=cpu
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="optwire" \
    org.opencontainers.image.description="The server of optwire, a remote optimizer." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    optwire.variant="${VARIANT}"
