# Recoup in an image: one binary, no shell, no root.
#   docker build -t recoup .
#   docker run --rm -p 8000:8000 -v "$PWD/models:/models:ro" recoup serve /models/books-nvfp4 --host 0.0.0.0
# A GPU needs no other image: `--gpus all`, and the driver's library is found when the program starts.

FROM rust:1.89-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin recoup && cp target/release/recoup /recoup

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /recoup /usr/local/bin/recoup
# The hub's downloads and remembered hashes, where a volume may be mounted.
ENV HF_HOME=/home/nonroot/.cache/huggingface
EXPOSE 8000
USER 65532:65532
# Whether it is ready says GET /health; the image holds nothing that could ask, what runs it does.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/recoup"]
CMD ["serve", "--help"]
