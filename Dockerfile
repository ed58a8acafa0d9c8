# The command line as an image:
#   docker build -t edgepack .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" edgepack build --target arm-cpu
#
# A package as a build step, without running a container; the build fails when the gate is not met:
#   docker build --target dist --output dist .
#   docker build --target dist --output dist --build-arg TARGET=mobile --build-context project=../my-model .
# `project` is the folder with the recipe, the model and its samples: this repository's example unless given.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY edgepack edgepack
COPY targets targets
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS runtime
# Dependencies come as wheels only: a slim image has no compiler, and its failure would be hard to read.
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --only-binary=:all: /wheels/*.whl \
    && useradd --create-home --uid 1000 edgepack \
    && install --directory --owner=edgepack --group=edgepack /work /dist
USER edgepack
WORKDIR /work
ENTRYPOINT ["edgepack"]
CMD ["--help"]

FROM scratch AS project
COPY . /

FROM runtime AS package
ARG RECIPE=edgepack.yaml
# Empty: the targets that the recipe names.
ARG TARGET=
COPY --from=project --chown=edgepack:edgepack . .
RUN edgepack build --recipe "$RECIPE" ${TARGET:+--target "$TARGET"} --output "/dist/{target}"

FROM scratch AS dist
COPY --from=package /dist /

# What `docker build .` without --target gives.
FROM runtime
