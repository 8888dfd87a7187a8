# mhla_lightning in an image, for CPUs or CUDA; cluster/profiles/{pyxis,apptainer}.yaml name such an image.
#   docker build -t mhla .                              CUDA wheels of torch, which also run on CPUs
#   docker build -t mhla:cpu --build-arg DEVICE=cpu .   torch without CUDA: several GB smaller
#   apptainer build mhla.sif docker-daemon://mhla:latest
#   enroot import -o mhla.sqsh dockerd://mhla:latest
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" mhla run classification/deit_tiny_mhla_mnist_cpu
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm
ARG DEVICE=cuda
ARG EXTRAS=demo,language,video,diffusion,eval,s3,gs
# a C++ compiler for torch.compile and Triton, libaio for states on a disk, ssh for several nodes
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libaio-dev openssh-client \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/mhla
COPY . .
RUN if [ "$DEVICE" = cpu ]; then \
        pip install --no-cache-dir -c constraints.txt torch torchvision --index-url https://download.pytorch.org/whl/cpu; \
    fi \
    && pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" \
    && mhla --version
WORKDIR /work
ENTRYPOINT ["mhla"]
CMD ["--help"]
