# An image for each part, with that part's locked dependencies and nothing else:
#   docker build --target service|relay|worker .
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS installer
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements/ requirements/

FROM installer AS build
RUN pip install --quiet --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY migrations/ migrations/
COPY reservation_service/ reservation_service/
COPY outbox_relay/ outbox_relay/
COPY data_platform/ data_platform/
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# The programs' environment, without pip: nothing is installed later.
FROM installer AS environment
RUN python -m venv --without-pip /app

FROM environment AS service-installed
RUN pip --python /app/bin/python install --quiet --require-hashes -r requirements/service.txt -r requirements/tracing.txt
COPY --from=build /build/dist/ dist/
RUN pip --python /app/bin/python install --quiet --no-deps dist/*.whl

FROM environment AS relay-installed
RUN pip --python /app/bin/python install --quiet --require-hashes -r requirements/relay.txt -r requirements/tracing.txt
COPY --from=build /build/dist/ dist/
RUN pip --python /app/bin/python install --quiet --no-deps dist/*.whl

FROM environment AS worker-installed
RUN pip --python /app/bin/python install --quiet --require-hashes -r requirements/loader.txt -r requirements/tracing.txt
COPY --from=build /build/dist/ dist/
RUN pip --python /app/bin/python install --quiet --no-deps dist/*.whl

FROM ${PYTHON_IMAGE} AS runtime
# Fresh volumes take their owner from these folders: so that `secrets` needs no root to fill them.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin app \
 && for part in reservations-db analytics-db owners service relay worker analyst grafana; do \
      install -d -o app -g app "/run/secrets/$part"; done
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /tmp

FROM runtime AS relay
COPY --from=relay-installed /app /app
CMD ["outbox-relay", "run"]

FROM runtime AS worker
COPY --from=worker-installed /app /app
CMD ["data-platform", "run"]

FROM runtime AS service
COPY --from=service-installed /app /app
EXPOSE 8000
CMD ["reservation-service", "serve", "--host", "0.0.0.0"]
