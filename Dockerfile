# The server in a container: docker run -p 127.0.0.1:50051:50051 optwire
# Builds with the classic builder as well as with BuildKit.
ARG BASE_IMAGE=python:3.13-slim

# -- stage 1: our wheel, and the list of what it needs
FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# Written once, in pyproject.toml. As long as the list stays the same, so does the large layer of stage 2.
RUN python3 -c 'import tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *project["optional-dependencies"]["server"], sep="\n")' > /requirements.txt
COPY proto proto
COPY client/python client/python
COPY server server
RUN python3 -m venv /opt/build && /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# -- stage 2: what runs
FROM ${BASE_IMAGE}
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=build /requirements.txt /opt/requirements.txt
RUN python3 -m venv /opt/venv && pip install --no-cache-dir -r /opt/requirements.txt
# A new version of ours moves only what follows, a few hundred kilobytes.
COPY --from=build /wheel /opt/wheel
RUN pip install --no-cache-dir --no-deps /opt/wheel/*.whl

# Nothing is written outside /tmp, so any user id and a read-only root file system will do.
USER 10001:10001
EXPOSE 50051
STOPSIGNAL SIGTERM
# gRPC health, the same answer that a Kubernetes `grpc` probe gets.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["optwire", "health", "--target", "localhost:50051"]
ENTRYPOINT ["optwire"]
# --insecure: the server refuses an address beyond loopback without TLS unless told that something else keeps people
# out. In here that is the container's own network: publish the port to loopback (-p 127.0.0.1:50051:50051), keep it on a
# private network, or put TLS in front.
CMD ["serve", "--listen", "0.0.0.0:50051", "--insecure"]
