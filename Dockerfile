# The versions that the tests run with, for a CUDA device or a CPU: docs/install.md has how to build and run it.
# torch's wheels bring the CUDA libraries of their release, and the host the driver: an image of CUDA would hold a second copy.
FROM python:3.12-slim-trixie

# Triton compiles its launchers with gcc and Python's headers, PlanLM its operators for the CPU with g++.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/planlm
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY planlm planlm
COPY kernels kernels
COPY csrc csrc
RUN pip install --no-cache-dir --constraint constraints.txt ".[report,metrics,tensorboard,liger]"

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 planlm \
    && install --directory --owner planlm /home/planlm/.cache /work
USER planlm
WORKDIR /work
ENTRYPOINT ["planlm"]
CMD ["doctor"]
