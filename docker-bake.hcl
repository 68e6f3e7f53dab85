# All images in one call with BuildKit's cache: `VERSION=0.1.0 COMMIT=$(git rev-parse --short=12 HEAD) docker buildx bake`.
# `make images` builds the same with plain docker, podman or buildah.

variable "PREFIX" {
  default = "moe-asr"
}
variable "VERSION" {
  default = "dev"
}
variable "COMMIT" {
  default = "unknown"
}
variable "BASE_IMAGE" {
  default = "python:3.11-slim-bookworm"
}

group "default" {
  targets = ["base", "stages"]
}

function "tags" {
  params = [name]
  result = ["${PREFIX}/${name}:${VERSION}", "${PREFIX}/${name}:${COMMIT}"]
}

target "dependencies" {
  context    = "."
  dockerfile = "docker/dependencies/Dockerfile"
  args = {
    BASE_IMAGE = BASE_IMAGE
  }
}

target "base" {
  context    = "."
  dockerfile = "docker/base/Dockerfile"
  contexts = {
    "moe-asr/dependencies" = "target:dependencies"
  }
  args = {
    VERSION = VERSION
    COMMIT = COMMIT
  }
  tags = tags("base")
}

target "stages" {
  name       = stage
  matrix = {
    stage = ["extract", "cluster", "gating", "experts", "asr"]
  }
  context    = "."
  dockerfile = "stages/${stage}/Dockerfile"
  contexts = {
    "moe-asr/base" = "target:base"
  }
  tags = tags(stage)
}
